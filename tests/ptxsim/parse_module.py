"""PTX text into a module; a kernel of it is parsed when somebody asks for it."""

from __future__ import annotations

import re
from bisect import bisect_right

from .ir import Module, ParseError
from .parse_kernel import KernelParser
from .parse_variable import VARIABLE, parse_variable

_HEADER = re.compile(r"\.version\s+\S+|\.target\s+[\w, ]+|\.address_size\s+\d+|\.file[^\n]*|\.pragma\s+\"[^\"]*\"")


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def parse(text: str) -> Module:
    clean = re.sub(r"//[^\n]*", _blank, text)
    clean = re.sub(r"/\*.*?\*/", _blank, clean, flags=re.S)
    target = re.search(r"\.target\s+(\w+)", clean)
    module = Module(text, target[1] if target else "")
    module.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
    starts = [0]
    for match in re.finditer("\n", clean):
        starts.append(match.end())

    def line_of(pos: int) -> int:
        return bisect_right(starts, pos)

    pos = 0
    entry = re.compile(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(entry|func)\b")
    while True:
        match = entry.search(clean, pos)
        between = clean[pos : match.start()] if match else clean[pos:]
        between = re.sub(r"\.section.*", "", between, flags=re.S)
        for statement in between.split(";"):
            found = VARIABLE.search(statement.strip())
            rest = _HEADER.sub("", statement).strip()
            if not found and rest:
                raise ParseError(f"a directive of the module is not understood: {rest[:80]}")
            if found:
                variable = parse_variable(found)
                (module.shared if variable.space == "shared" else module.globals)[variable.name] = variable
        if not match:
            return module
        if match[1] == "func":
            head = clean[match.start() : clean.find("\n", match.end() + 1)]
            raise ParseError(f"line {line_of(match.start())}: .func is not emulated: {' '.join(head.split())[:120]}")
        body = clean.index("{", match.end())
        end = _matching(clean, body)
        head = clean[match.end() : body]
        name = re.match(r"\s*([\w$]+)", head)[1]
        module.kernels[name] = KernelParser(module, head, clean, body + 1, end, line_of).parse
        pos = end + 1


def _matching(text: str, at: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ParseError("a brace is not closed")
