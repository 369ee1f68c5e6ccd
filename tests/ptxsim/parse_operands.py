"""Operands of a statement (ISA, "Instruction Operands", "Constants")."""

from __future__ import annotations

import re

from .ir import Address, Imm, Not, Pair, ParseError, Special, Symbol, Vector


def parse_operand(text: str, line: int, lookup):
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(parse_operand(part, line, lookup) for part in split(text[1:-1])))
    if text.startswith("["):
        inside = split(text[1:-1])
        base = inside[0].strip()
        offset = 0
        match = re.match(r"(.+?)\s*([+-])\s*(0[xX][0-9a-fA-F]+|-?\d+)$", base)
        if match:
            base, offset = match[1], int(match[3], 0) * (1 if match[2] == "+" else -1)
        coordinates = ()
        if len(inside) > 1:
            second = parse_operand(inside[1], line, lookup)
            coordinates = second.parts if isinstance(second, Vector) else (second,)
        return Address(parse_operand(base, line, lookup), offset, coordinates)
    if text.startswith("!"):
        return Not(parse_operand(text[1:], line, lookup))
    if "|" in text:
        first, second = text.split("|")
        return Pair(parse_operand(first, line, lookup), parse_operand(second, line, lookup))
    if text == "_":
        return None
    found = lookup(text)
    if found is not None:
        return found
    if text.startswith("%"):
        return Special(text[1:])
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return Imm(int(text[2:], 16), 32)
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return Imm(int(text[2:], 16), 64)
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        text = text.rstrip("U")
        digits = text.lstrip("-")
        base = 8 if len(digits) > 1 and digits[0] == "0" and digits.isdigit() else 0
        value = int(digits, base)
        return Imm(-value if text.startswith("-") else value)
    if re.match(r"-?\d*\.\d+(e[+-]?\d+)?$", text):
        return Imm(float(text))
    match = re.match(r"([\w$]+)\s*\+\s*(\d+)$", text)
    if match:
        return Address(Symbol(match[1]), int(match[2]))
    if re.match(r"[\w$]+$", text):
        return Symbol(text)
    raise ParseError(f"line {line}: operand not understood: {text!r}")


def split(text: str) -> list[str]:
    """By the commas outside of braces and brackets."""
    parts, depth, last = [], 0, 0
    if "{" not in text and "[" not in text:
        return [part for part in text.split(",")] if text.strip() else []
    for i, char in enumerate(text):
        if char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    if text[last:].strip():
        parts.append(text[last:])
    return parts
