"""The body of a kernel: statements, labels, scopes and directives (ISA, "Directives")."""

from __future__ import annotations

import re

from .ir import SIZES, Instr, Kernel, Not, ParseError, Reg, Symbol, Variable
from .parse_operands import parse_operand, split
from .parse_variable import VARIABLE, parse_variable

_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_SPACE = re.compile(r"\s+")
_LOCATION = re.compile(r"\.(loc|file)\s")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align1>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s*(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?:\.align\s+(?P<align2>\d+)\s+)?(?P<name>[\w$]+)\s*(?:\[(?P<size>\d+)\])?"
)


class KernelParser:
    def __init__(self, module, head, text, start, end, line_of):
        self.module, self.head, self.text, self.start, self.end, self.line_of = module, head, text, start, end, line_of
        self.registers: list[Reg] = []
        self.scopes: list[dict] = [{}]
        self.counter = 0
        self.scope_numbers = [0]
        self.labels: dict[str, int] = {}
        self.instrs: list[Instr] = []
        self.shared: dict[str, Variable] = {}
        self.local: dict[str, Variable] = {}
        self.tables: dict[str, list[str]] = {}
        self.source: tuple[str, ...] = ()  # of the last .loc
        self.inlined: dict[str, str] = {}  # locations, and where the function they are in was inlined

    def parse(self) -> Kernel:
        name = self.name = re.match(r"\s*([\w$]+)", self.head)[1]
        params, size = [], 0
        for match in _PARAM.finditer(self.head):
            item = SIZES[match["type"]]
            align = int(match["align1"] or match["align2"] or item)
            if not match["size"]:
                align = item  # .ptr .align says where it points to
            size = -(-size // align) * align
            params.append(Variable(match["name"], "param", align, item * int(match["size"] or 1), size))
            size += params[-1].size
        directives = {}
        for match in re.finditer(r"\.(\w+)((?:\s+\d+(?:\s*,\s*\d+)*)?)", self.head[self.head.rfind(")") + 1 :]):
            directives[match[1]] = tuple(int(x) for x in re.findall(r"\d+", match[2]))
        if len(params) != self.head.count(".param"):
            raise ParseError(f"kernel {name}: a parameter is not understood: {self.head}")
        try:
            self._statements()
        except ParseError as error:
            raise ParseError(f"kernel {name}, {error}") from None
        pending = []
        for instr in self.instrs:
            if instr.op == "bra":
                label = instr.args[0]
                instr.target = self._label(label)
            pending.append(instr)
        tables = {name: [self._label(Symbol(x)) for x in labels] for name, labels in self.tables.items()}
        labels = dict(self.labels)
        return Kernel(
            name, params, size, self.instrs, labels, self.registers, self.shared, self.local, tables, directives
        )

    def _label(self, label) -> int:
        if label.name not in self.labels:
            raise ParseError(f"kernel {self.name}: label {label.name} is unknown")
        return self.labels[label.name]

    def _statements(self) -> None:
        text, pos, end = self.text, self.start, self.end
        waiting: list[tuple[Instr, tuple[int, ...]]] = []
        while True:
            space = _SPACE.match(text, pos)
            if space:
                pos = space.end()
            if pos >= end:
                break
            char = text[pos]
            if char == "{":
                self.scopes.append({})
                self.counter += 1
                self.scope_numbers.append(self.counter)
                pos += 1
                continue
            if char == "}":
                self.scopes.pop()
                self.scope_numbers.pop()
                pos += 1
                continue
            if char == ";":
                pos += 1
                continue
            if _LOCATION.match(text, pos):
                stop = text.index("\n", pos)
                self._location(text[pos:stop])
                pos = stop
                continue
            label = _LABEL.match(text, pos)
            if label:
                name = label[1]
                self.labels[self._scoped(name, len(self.scope_numbers) - 1)] = len(self.instrs)
                self.last_label = name
                pos = label.end()
                continue
            stop = text.index(";", pos)
            statement = text[pos:stop].strip()
            line = self.line_of(pos)
            pos = stop + 1
            if statement.startswith("."):
                self._directive(statement, line)
            else:
                instr = self._instruction(statement, line)
                if instr.op == "bra":
                    waiting.append((instr, tuple(self.scope_numbers)))
                self.instrs.append(instr)
        for instr, numbers in waiting:  # labels are known only now: of the innermost scope that has the name
            name = instr.args[0].name
            for number in reversed(numbers):
                scoped = name if number == 0 else f"{name}@{number}"
                if scoped in self.labels:
                    instr.args[0] = Symbol(scoped)
                    break

    def _location(self, statement: str) -> None:
        """.loc file line column, function_name label, inlined_at file line column (ISA, ".loc")."""
        numbers = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", statement)
        if not numbers:
            return
        places = [f"{self.module.files.get(file, file)}:{line}" for file, line in numbers]
        if len(places) > 1:
            self.inlined[places[0]] = places[1]
            outer, seen = places[1], {places[0]}
            while outer in self.inlined and outer not in seen:
                seen.add(outer)
                outer = self.inlined[outer]
            places[1] = outer
        else:
            self.inlined.pop(places[0], None)
        self.source = tuple(places)

    def _scoped(self, name: str, depth: int) -> str:
        number = self.scope_numbers[depth]
        return name if number == 0 else f"{name}@{number}"

    def _directive(self, statement: str, line: int) -> None:
        if statement.startswith(".reg"):
            match = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", statement, re.S)
            for item in match[2].split(","):
                item = item.strip()
                counted = re.match(r"([\w$%]+)<(\d+)>", item)
                names = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [item]
                for name in names:
                    self.scopes[-1][name] = self._new_reg(match[1], name)
            return
        if statement.startswith((".pragma", ".noreturn")):
            return
        if statement.startswith(".branchtargets"):
            self.tables[self.last_label] = [x.strip() for x in statement[len(".branchtargets") :].split(",")]
            return
        found = VARIABLE.match(statement)
        if not found:
            raise ParseError(f"line {line}: directive not understood: {statement[:80]}")
        variable = parse_variable(found)
        {"shared": self.shared, "local": self.local}[variable.space][variable.name] = variable

    def _new_reg(self, type: str, name: str):
        return (type, name)  # numbered where it is first used: most kernels declare more than they use

    def _lookup(self, name: str):
        for scope in reversed(self.scopes):
            if name in scope:
                found = scope[name]
                if not isinstance(found, Reg):
                    found = scope[name] = Reg(len(self.registers), *found)
                    self.registers.append(found)
                return found
        return None

    def _instruction(self, statement: str, line: int) -> Instr:
        guard = None
        rest = statement
        if rest.startswith("@"):
            match = re.match(r"@(!?)\s*([\w$%]+)\s+", rest)
            guard = self._lookup(match[2])
            if guard is None:
                raise ParseError(f"line {line}: no register {match[2]}")
            guard = Not(guard) if match[1] else guard
            rest = rest[match.end() :]
        match = re.match(r"([a-z][\w.:]*)\s*", rest)
        if match is None:
            raise ParseError(f"line {line}: a statement is not understood: {statement[:80]}")
        parts = match[1].split(".")
        args = [parse_operand(part, line, self._lookup) for part in split(rest[match.end() :])]
        text = re.sub(r"\s+", " ", statement)
        return Instr(parts[0], tuple(parts[1:]), args, guard, line, text, index=len(self.instrs), source=self.source)
