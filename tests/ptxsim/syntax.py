"""The instructions that are emulated: of each opcode, the modifiers that are understood.

Whatever is not described here is an "unsupported" fault when it is met: no modifier is passed over in silence. A
modifier that changes no result (cache operators and hints, memory ordering of what is sequentially consistent here) is
accepted by name. What follows an opcode is matched as a whole.
"""

from __future__ import annotations

import re

from .faults import Unsupported
from .ir import Address, Instr, Not, Pair, Special, Vector
from .special_registers import known

INT, BITS = r"[us](16|32|64)", r"b(16|32|64)"
HALF = r"(f16|bf16)(x2)?"
ORDER = "(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"
SPACE = r"(global|shared(::(cta|cluster))?|local|param(::entry)?|const)"
SCOPE = r"(cta|cluster|gpu|sys)"
EVICT = r"(L1::(evict_normal|evict_unchanged|evict_first|evict_last|no_allocate))"
PREFETCH = r"(L2::(64|128|256)B)"
TYPE = r"([bus](8|16|32|64)|f(32|64)|b128)"
SHARED = r"shared(::(cta|cluster))?"
CVT_INT = r"[us](8|16|32|64)"

FORMS = {
    # Moves, comparison and selection
    "mov": r"(pred|[bus](16|32|64)|f(32|64))",
    "cvta": rf"(to\.)?{SPACE}\.u(32|64)",
    "selp": r"([bus](16|32|64)|f(32|64))",
    "slct": r"(ftz\.)?([bus](16|32|64)|f(32|64))\.(s32|f32)",
    "setp": rf"{ORDER}((\.(and|or|xor))?(\.ftz)?\.([bus](16|32|64)|f(32|64)|f16|bf16)|\.b?f16x2)",
    "set": rf"{ORDER}\.(u32|s32|f32)\.([bus](16|32|64)|f(32|64))",
    # Integers and bits
    **dict.fromkeys(("and", "or", "xor", "not"), rf"(pred|{BITS})"),
    "shl": BITS,
    "shr": r"[bus](16|32|64)",
    "shf": r"[lr]\.(wrap|clamp)\.b32",
    "bfi": r"b(32|64)",
    "bfe": r"[us](32|64)",
    "prmt": "b32",
    "lop3": "b32",
    **dict.fromkeys(("popc", "clz", "brev"), r"b(32|64)"),
    "bfind": r"[us](32|64)",
    "rem": INT,
    # Integers and floats; directed roundings of f32 alone
    **dict.fromkeys(
        ("add", "sub", "mul"),
        rf"{INT}|(r[nzmp]\.)?(ftz\.)?(sat\.)?f32|(rn\.)?f64|(rn\.)?{HALF}|(lo|hi)\.{INT}|wide\.[us](16|32)",
    ),
    "mad": rf"(lo|hi)\.{INT}|wide\.[us](16|32)|r[nzmp]\.(ftz\.)?(sat\.)?f32|rn\.f64",
    "fma": rf"r[nzmp]\.(ftz\.)?(sat\.)?f32|rn\.f64|rn\.{HALF}",
    "div": rf"{INT}|(rn|full|approx)\.(ftz\.)?f32|rn\.f64",
    **dict.fromkeys(("min", "max"), rf"{INT}|[us]16x2|(ftz\.)?(NaN\.)?f32|f64|(NaN\.)?{HALF}"),
    "abs": rf"s(16|32|64)|(ftz\.)?f32|f64|{HALF}",
    "neg": rf"s(16|32|64)|(ftz\.)?f32|f64|{HALF}",
    "copysign": r"f(32|64)",
    "ex2": r"approx\.((ftz\.)?f32|(ftz\.)?bf16(x2)?|f16(x2)?)",
    "lg2": r"approx\.(ftz\.)?f32",
    "tanh": rf"approx\.(f32|{HALF})",
    **dict.fromkeys(("sin", "cos"), r"approx\.(ftz\.)?f32"),
    **dict.fromkeys(("rcp", "sqrt"), r"(approx|rn)\.(ftz\.)?f32|rn\.f64|approx\.ftz\.f64"),
    "rsqrt": r"approx\.(ftz\.)?f(32|64)",
    "testp": r"(finite|infinite|number|notanumber)\.f(32|64)",
    "cvt": "|".join(
        (
            rf"{CVT_INT}\.{CVT_INT}|sat\.([us](8|16|32)|s64)\.([us](8|16|32)|s64)",
            rf"rn\.f(32|64)\.{CVT_INT}|rn\.f16\.[us](8|16)",
            rf"r[nzmp]i\.(ftz\.)?{CVT_INT}\.(f16|bf16|f32|f64)",
            r"(r[nzmp]i\.)?(ftz\.)?(sat\.)?f32\.f32|(r[nzmp]i\.)?f64\.f64|(r[nzmp]i\.)?f16\.f16",
            r"r[nzmp]\.(ftz\.)?(sat\.)?f32\.f64|rn\.(ftz\.)?(f16|bf16)\.f32|rn\.f16\.f64|(ftz\.)?f64\.f32",
            r"(ftz\.)?f32\.(f16|bf16)|f64\.(f16|bf16)",
            r"rn\.(f16x2|bf16x2)\.f32|rn\.satfinite\.e4m3x2\.f32|rn\.f16x2\.e4m3x2",
        )
    ),
    # Memory
    **dict.fromkeys(
        ("ld", "ldu"),
        rf"((volatile|weak|relaxed\.{SCOPE}|acquire\.{SCOPE})\.)?({SPACE})?\.?((ca|cg|cs|lu|cv)\.)?(nc\.)?"
        rf"({EVICT}\.)?(L2::cache_hint\.)?({PREFETCH}\.)?(v[24]\.)?{TYPE}",
    ),
    "st": rf"((volatile|weak|relaxed\.{SCOPE}|release\.{SCOPE})\.)?({SPACE})?\.?((wb|cg|cs|wt)\.)?({EVICT}\.)?"
    rf"(L2::cache_hint\.)?(v[24]\.)?{TYPE}",
    **dict.fromkeys(
        ("atom", "red"),
        rf"((relaxed|acquire|release|acq_rel)\.)?({SCOPE}\.)?((global|{SHARED})\.)?"
        r"((add|min|max)\.([us](32|64)|f(32|64))|(and|or|xor|exch|cas)\.b(32|64))",
    ),
    "mapa": r"(shared::cluster\.)?u(32|64)",
    "isspacep": r"(global|shared(::(cta|cluster))?|local|param)",
    "createpolicy": r"(fractional|range)\..*",
    "prefetch": ".*",
    "prefetchu": ".*",
    "applypriority": r"(global\.)?L2::evict_normal",
    # Lanes and warps
    "shfl": r"sync\.(bfly|up|down|idx)\.b32",
    "vote": r"sync\.((all|any|uni)\.pred|ballot\.b32)",
    "redux": r"sync\.((add|min|max)\.[us]32|(and|or|xor)\.b32)",
    "elect": "sync",
    "activemask": "b32",
    "ldmatrix": rf"sync\.aligned\.m8n8\.x[124](\.trans)?\.{SHARED}\.b16",
    "stmatrix": rf"sync\.aligned\.m8n8\.x[124](\.trans)?\.{SHARED}\.b16",
    "mma": r"sync\.aligned\.(m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32|"
    r"m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32)",
    "setmaxnreg": r"(inc|dec)\.sync\.aligned\.u32",
    # Barriers, fences and asynchronous operations
    "bar": r"(cta\.)?(sync|arrive)|warp\.sync",
    "barrier": r"(cta\.)?(sync|arrive)(\.aligned)?|"
    r"cluster\.(arrive(\.(release|relaxed))?|wait(\.acquire)?)(\.aligned)?",
    "fence": rf"(sc|acq_rel|acquire|release)\.{SCOPE}|mbarrier_init\.release\.cluster|"
    rf"proxy\.async(\.(global|{SHARED}))?",
    "membar": r"(cta|gl|sys)",
    "mbarrier": "|".join(
        (
            rf"(init|inval)(\.{SHARED})?\.b64",
            rf"arrive(\.expect_tx)?(\.release\.(cta|cluster))?(\.{SHARED})?\.b64",
            rf"expect_tx(\.relaxed\.(cta|cluster))?(\.{SHARED})?\.b64",
            rf"(test|try)_wait(\.parity)?(\.acquire\.(cta|cluster))?(\.{SHARED})?\.b64",
        )
    ),
    "cp": "|".join(
        (
            rf"async\.(ca|cg)\.{SHARED}\.global(\.L2::cache_hint)?(\.{PREFETCH})?",
            r"async\.(commit_group|wait_group|wait_all)",
            r"async\.bulk\.(commit_group|wait_group(\.read)?)",
            rf"async\.bulk\.tensor\.[1-5]d\.{SHARED}\.global(\.tile)?\.mbarrier::complete_tx::bytes"
            r"(\.multicast::cluster)?(\.L2::cache_hint)?",
            r"async\.bulk\.tensor\.[1-5]d\.global\.shared::cta(\.tile)?\.bulk_group(\.L2::cache_hint)?",
        )
    ),
    "wgmma": r"(fence|commit_group|wait_group)\.sync\.aligned|"
    r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16\.bf16|f16\.f16)",
    # Control, and hints
    "bra": "(uni)?",
    "brx": r"idx(\.uni)?",
    "ret": "(uni)?",
    "exit": "",
    "trap": "",
    "brkpt": "",
    "pmevent": "(mask)?",
    "nanosleep": "u32",
    "griddepcontrol": "(launch_dependents|wait)",
}
_COMPILED = {op: re.compile(form) for op, form in FORMS.items()}

# .sync.aligned and what the ISA says is .aligned without the word: all lanes of the warp come together.
ALIGNED_BY_NAME = frozenset(("bar.sync", "bar.arrive", "bar.cta.sync", "bar.cta.arrive"))


def check(instr: Instr) -> None:
    """That every modifier of an instruction is understood."""
    form = _COMPILED.get(instr.op)
    if form is None:
        raise Unsupported(f"the instruction {instr.name} is not emulated")
    if not form.fullmatch(".".join(instr.mods)):
        raise Unsupported(f"this form of {instr.op} is not emulated: {instr.name}")

    for arg in instr.args:
        _check_operand(arg)


def _check_operand(arg) -> None:
    if isinstance(arg, Special) and not known(arg.name):
        raise Unsupported(f"the special register %{arg.name} is not emulated")
    inside = {Not: lambda: (arg.of,), Vector: lambda: arg.parts, Pair: lambda: (arg.first, arg.second)}
    inside[Address] = lambda: (arg.base, *arg.coordinates)
    for part in inside.get(type(arg), tuple)():
        _check_operand(part)


def aligned(instr: Instr) -> bool:
    return "aligned" in instr.mods or instr.name in ALIGNED_BY_NAME
