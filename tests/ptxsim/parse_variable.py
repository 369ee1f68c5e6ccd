"""Variables in state spaces (ISA, "Variables")."""

from __future__ import annotations

import re

from .ir import SIZES, Variable

VARIABLE = re.compile(
    r"(?P<ext>(?:\.(?:visible|extern|weak)\s+)*)\.(?P<space>shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)


def parse_variable(found: re.Match) -> Variable:
    size, item = SIZES[found["type"]], SIZES[found["type"]]
    external = "extern" in (found["ext"] or "")
    for dim in re.findall(r"\[(\d*)\]", found["dims"] or ""):
        size *= int(dim or 0)
    data = b""
    if found["init"]:
        numbers = re.findall(r"0[fd][0-9a-fA-F]+|0[xX][0-9a-fA-F]+|-?\d+", found["init"])
        for number in numbers:
            value = int(number[2:], 16) if number[:2] in ("0f", "0d") else int(number, 0)
            data += (value & ((1 << 8 * item) - 1)).to_bytes(item, "little")
    return Variable(found["name"], found["space"], int(found["align"] or item), size, 0, external, data)
