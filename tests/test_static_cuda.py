"""benchmarks/static_cuda.py: it sees what is wrong with machine code, and knows the kernels by their names."""

import pytest

from benchmarks.static_cuda import Kernel, kernel_of, parse

PREFIX = "_ZN6fastbp4cuda"
CHAIN = f"{PREFIX}17chain_rule_kernelINS_3act4reluELNS_5DtypeE2ELNS0_5ReadsE0ELb1EEEvNS0_9ChainRuleEdd"
COMPRESSED = f"{PREFIX}23compressed_value_kernelINS_3act4geluELNS_5DtypeE1ELb1EEEvNS0_15CompressedValueEddb"
PRODUCT = f"{PREFIX}14product_kernelILNS_5DtypeE3ELNS0_7Product4KindE2ELNS0_5ReadsE1EEEv14CUtensorMap_st"
SOUND_CHAIN = ["LDG.E.128 R4, desc[UR6][R2.64]", "STG.E.128 desc[UR6][R2.64], R4"]
SOUND_PRODUCT = [
    *SOUND_CHAIN,
    "HGMMA.64x128x16.F32 R24, gdesc[UR20].tnspB, R24",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "UTMALDG.2D.MULTICAST [UR20], [UR12], UR4",
]


def faults(name, code, stack=0):
    usage = f"Function {name}:\n  REG:128 STACK:{stack} SHARED:0"
    lines = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(code))
    ((_, found),) = parse("sm_90a", usage, f"Function : {name}\n{lines}\n")
    return found.faults


def without(code, word):
    return [line for line in code if word not in line]


@pytest.mark.parametrize(("name", "code"), [(CHAIN, SOUND_CHAIN), (PRODUCT, SOUND_PRODUCT)])
def test_sound_code(name, code):
    assert faults(name, code) == ()


@pytest.mark.parametrize(
    ("name", "code", "fault"),
    [
        (CHAIN, [*SOUND_CHAIN, "STL [R1], R2"], "1 spills, 0 bytes of stack"),
        (CHAIN, [SOUND_CHAIN[0], "STG.E desc[UR6][R2.64], R4"], "no stores of 16 bytes"),
        (CHAIN, [SOUND_CHAIN[1], "LDG.E.U16 R4, desc[UR6][R2.64]"], "no loads of 16 bytes"),
        (PRODUCT, without(SOUND_PRODUCT, "HGMMA"), "no HGMMA"),
        (PRODUCT, without(SOUND_PRODUCT, "DEPBAR"), "every wgmma is waited for at once"),
        (PRODUCT, without(SOUND_PRODUCT, "MULTICAST"), "nothing is loaded for two blocks"),
        (PRODUCT, [*SOUND_PRODUCT, "HGMMA.64x128x16.F32 R24, R8, gdesc[UR20], R24"], "from registers"),
    ],
)
def test_each_fault(name, code, fault):
    (found,) = faults(name, code)
    assert fault in found


def test_a_stack_frame():
    assert faults(CHAIN, SOUND_CHAIN, stack=8) == ("0 spills, 8 bytes of stack",)


def test_names():
    assert kernel_of("sm_80", CHAIN) == Kernel("sm_80", "chain_rule", "bf16", "relu", True)
    gathered = CHAIN.replace("E0ELb1", "E1ELb0")
    assert kernel_of("sm_80", gathered) == Kernel("sm_80", "chain_rule from y gathered", "bf16", "relu", False)
    assert kernel_of("sm_100", COMPRESSED) == Kernel("sm_100", "compressed_value", "fp32", "gelu", True)
    assert kernel_of("sm_90a", PRODUCT) == Kernel("sm_90a", "product dgrad", "fp16", "from y", True)
    from_side = PRODUCT.replace("ReadsE1", "ReadsE2")
    assert kernel_of("sm_90a", from_side) == Kernel("sm_90a", "product dgrad", "fp16", "from y and side", True)
