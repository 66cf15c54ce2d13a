"""PTX as text, to instructions whose operands are registers, constants and addresses.

The core (tests/support/ptx/core) knows what instructions do; here is only how they are written:
scopes and names of registers, labels, variables in the state spaces, and kernel parameters.
"""

import re
import struct
from dataclasses import dataclass, field

import numpy as np

SHARED_BASE = 1024
IMMEDIATE_BYTES = 32 * 4 + 32 * 8
TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}

# (kind, text, width, negated, offset, value, parts); kinds are the core's: r register, i immediate,
# m memory, v vector, p pair, l label, s symbol, _ nothing.
Operand = tuple[str, str, str, bool, int, int, tuple[object, ...]]
# (text, opcode, guard, negated, operands, targets)
Instruction = tuple[str, str, int, bool, list[Operand], list[int]]

STATEMENT = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;{]*(?:\{[^{}]*\}[^;{]*)*);)")
# Comments, and lines that say where the source is: they end in no semicolon.
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)\b[^\n]*", re.S | re.M)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
VARIABLE = re.compile(
    r"\.(global|const|shared|local)\s+((?:\.\w+\s+|\d+\s+)*?)(?:\.align\s+(\d+)\s+)?"
    r"\.([busf]\d+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*([^;]*))?;"
)
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
MASK = (1 << 64) - 1


class SyntaxFault(ValueError):
    """PTX that this parser does not understand."""


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: where it lies in parameter space, and its bytes. kind: b, u, s or f."""

    name: str
    kind: str
    offset: int
    size: int


@dataclass
class Parsed:
    """A kernel, ready for the core."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction]
    constants: bytes
    register_bytes: int
    predicate_bytes: int
    local_bytes: int
    shared_bytes: int
    specials: list[tuple[str, int]]
    variables: list[np.ndarray]  # of global and constant memory
    threads: int | None  # that it must be launched with
    most_threads: int | None


@dataclass
class Scope:
    """Names that a pair of braces holds."""

    number: int
    registers: dict[str, str] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)


def entries(text: str) -> list[str]:
    """The names of a module's kernels."""
    return [match[1] for match in ENTRY.finditer(COMMENT.sub("", text))]


def parse(text: str, entry: str = "") -> Parsed:
    """The kernel of a module whose name contains `entry`; there must be one such kernel."""
    text = COMMENT.sub(" ", text)
    found = [m for m in ENTRY.finditer(text) if entry == m[1] or entry in m[1]]
    exact = [m for m in found if m[1] == entry]
    if len(exact or found) != 1:
        raise SyntaxFault(f"{len(found)} kernels have {entry!r} in their names: {entries(text)}")
    return _Parser(text, (exact or found)[0]).parse()


class _Parser:
    def __init__(self, text: str, entry: re.Match[str]) -> None:
        self.text, self.entry = text, entry
        self.body = text[entry.end() : _closing(text, entry.end())]
        self.parameters = _parameters(entry[2] or "")
        self.types: dict[str, str] = {}
        self.families: dict[str, str] = {}  # %r of %r<10>
        self.offsets: dict[str, tuple[str, int]] = {}
        self.register_bytes = self.predicate_bytes = self.local_bytes = 0
        self.immediates: dict[int, int] = {}
        self.specials: dict[str, int] = {}
        self.symbols: dict[str, int] = {p.name: p.offset for p in self.parameters}
        self.variables: list[np.ndarray] = []
        self.shared_bytes = 0
        self.scopes = [Scope(0)]

    def parse(self) -> Parsed:
        self._place_variables()
        statements, labels, tables = self._statements()
        instructions = [self._instruction(*statement, labels, tables) for statement in statements]
        # Lanes that run over the end have returned.
        instructions.append(("ret;", "ret", -1, False, [], []))
        return Parsed(
            name=self.entry[1],
            parameters=self.parameters,
            instructions=instructions,
            constants=_replicated(list(self.immediates)),
            register_bytes=self.register_bytes,
            predicate_bytes=self.predicate_bytes,
            local_bytes=self.local_bytes,
            shared_bytes=self.shared_bytes,
            specials=list(self.specials.items()),
            variables=self.variables,
            threads=_threads(self.entry[3], "reqntid"),
            most_threads=_threads(self.entry[3], "maxntid"),
        )

    def _place_variables(self) -> None:
        """Gives the variables that the kernel names their addresses."""
        used = set(re.findall(r"[\w$]+", self.body))
        dynamic: list[tuple[str, int]] = []
        end = SHARED_BASE
        for match in VARIABLE.finditer(self.text):
            space, _, align, kind, name, dims, initial = match.groups()
            if name not in used or name in self.symbols:
                continue
            each = TYPE_BYTES[kind[1:]]
            alignment = int(align or each)
            counts = [int(n or 0) for n in re.findall(r"\[(\d*)\]", dims)]
            size = each * int(np.prod(counts, dtype=int))
            if space == "shared" and size == 0:
                dynamic.append((name, alignment))
            elif space == "shared":
                self.symbols[name] = end = -(-end // alignment) * alignment
                end += size
            elif space == "local":
                start = -(-self.local_bytes // 16) * 16
                self.symbols[name] = start
                self.local_bytes = start + size
            else:
                self.symbols[name] = self._global(kind, size, alignment, initial)
        for name, alignment in dynamic:
            end = -(-end // max(alignment, 16)) * max(alignment, 16)
            self.symbols[name] = end
        self.shared_bytes = end - SHARED_BASE

    def _global(self, kind: str, size: int, alignment: int, initial: str | None) -> int:
        memory = np.zeros(size + alignment, np.uint8)
        begin = -memory.ctypes.data % alignment
        view = memory[begin : begin + size]
        self.variables.append(view)
        values = re.findall(r"[^\s,{}]+", initial or "")
        if values:
            each = TYPE_BYTES[kind[1:]]
            data = b"".join((_literal(v) & MASK).to_bytes(8, "little")[:each] for v in values)
            view[: len(data)] = np.frombuffer(data, np.uint8)
        return int(view.ctypes.data)

    def _statements(
        self,
    ) -> tuple[list[tuple[str, list[Scope]]], dict[str, int], dict[str, list[str]]]:
        """Instructions with the scopes they are in, where labels are, and tables of branches."""
        statements: list[tuple[str, list[Scope]]] = []
        labels: dict[str, int] = {}
        tables: dict[str, list[str]] = {}
        position, scope_count, last_label = 0, 0, ""
        body = self.body
        while match := STATEMENT.match(body, position):
            position = match.end()
            brace, label, statement = match.groups()
            if brace == "{":
                scope_count += 1
                self.scopes = [*self.scopes, Scope(scope_count)]
            elif brace == "}":
                self.scopes = self.scopes[:-1]
            elif label is not None:
                self.scopes[-1].labels.add(label)
                last_label = _scoped(label, self.scopes[-1])
                labels[last_label] = len(statements)
            else:
                statement = " ".join(statement.split())
                if statement.startswith(".reg"):
                    self._declare(statement)
                elif statement.startswith(".branchtargets"):
                    names = statement.removeprefix(".branchtargets").split(",")
                    tables[last_label] = [name.strip() for name in names]
                elif statement and not statement.startswith("."):
                    statements.append((statement, self.scopes))
        rest = body[position:].strip()
        if rest and not rest.startswith("."):
            raise SyntaxFault(f"not understood: {rest[:80]!r}")
        return statements, labels, tables

    def _declare(self, statement: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        if match is None:
            raise SyntaxFault(f"not understood: {statement!r}")
        for name in match[2].split(","):
            family = re.match(r"\s*(\S+?)<\d+>", name)
            if family is not None:
                self.families[family[1]] = match[1]
            else:
                unique = _scoped(name.strip(), self.scopes[-1])
                self.scopes[-1].registers[name.strip()] = unique
                self.types[unique] = match[1]

    def _instruction(
        self,
        statement: str,
        scopes: list[Scope],
        labels: dict[str, int],
        tables: dict[str, list[str]],
    ) -> Instruction:
        self.scopes = scopes
        guard, negated, rest = -1, False, statement
        if match := re.match(r"@(!?)\s*([%\w$]+)\s+", statement):
            _, guard = self._register(match[2]) or ("", -1)
            negated, rest = match[1] == "!", statement[match.end() :]
        opcode, _, arguments = rest.partition(" ")
        written = _split(arguments)
        targets: list[int] = []
        if opcode.startswith("bra"):
            targets = [labels[self._label(written[0])]]
            written = []
        elif opcode.startswith("brx"):
            targets = [labels[self._label(x)] for x in tables[self._label(written[1])]]
            written = written[:1]
        operands = [self._operand(text, opcode) for text in written]
        return f"{statement};", opcode, guard, negated, operands, targets

    def _label(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope.labels:
                return _scoped(name, scope)
        return name

    def _register(self, name: str) -> tuple[str, int] | None:
        """Width and offset of a register, which gets its place when it is first named."""
        for scope in reversed(self.scopes):
            if name in scope.registers:
                name = scope.registers[name]
                break
        if name not in self.offsets:
            kind = self.types.get(name)
            if kind is None:
                family = re.match(r"(%?[A-Za-z_$]+?)\d+$", name)
                kind = self.families.get(family[1]) if family else None
            if kind is None:
                return None
            self.offsets[name] = self._place(kind)
        return self.offsets[name]

    def _place(self, kind: str) -> tuple[str, int]:
        if kind == "pred":
            self.predicate_bytes += 4
            return "p", self.predicate_bytes - 4
        wide = kind.endswith("64")
        if kind.endswith("128"):
            raise SyntaxFault("registers of 128 bits are not implemented")
        offset = self.register_bytes
        self.register_bytes += 256 if wide else 128
        return ("d" if wide else "w"), offset

    def _immediate(self, text: str, value: int) -> Operand:
        value &= MASK
        index = self.immediates.setdefault(value, len(self.immediates))
        return ("i", text, "", False, index * IMMEDIATE_BYTES, value, ())

    def _operand(self, text: str, opcode: str) -> Operand:
        if text == "_":
            return ("_", text, "", False, 0, 0, ())
        if text.startswith("{"):
            parts = tuple(self._operand(part, opcode) for part in _split(text[1:-1]))
            return ("v", text, "", False, 0, 0, parts)
        if text.startswith("["):
            return self._address(text, opcode)
        if "|" in text:
            parts = tuple(self._operand(part.strip(), opcode) for part in text.split("|"))
            return ("p", text, "", False, 0, 0, parts)
        negated = text.startswith("!")
        name = text.lstrip("! ")
        register = self._register(name)
        if register is not None:
            return ("r", text, register[0], negated, register[1], 0, ())
        if name.startswith("%"):
            if name not in self.specials:
                self.specials[name] = self._place("b32")[1]
            return ("r", text, "w", False, self.specials[name], 0, ())
        value = self._value(name, opcode)
        return ("s", text, "", False, 0, 0, ()) if value is None else self._immediate(text, value)

    def _value(self, text: str, opcode: str) -> int | None:
        if text in self.symbols:
            return self.symbols[text]
        moved = re.match(r"([\w$]+)\s*\+\s*(-?\w+)$", text)  # symbol + displacement
        if moved and moved[1] in self.symbols:
            return self.symbols[moved[1]] + int(moved[2], 0)
        if text == "WARP_SZ":
            return 32
        if re.match(r"-?\d*\.\d+|-?\d+\.", text):
            single = opcode.endswith(".f32")
            return int.from_bytes(struct.pack("<f" if single else "<d", float(text)), "little")
        if INTEGER.match(text) or re.match(r"0[fFdD][0-9a-fA-F]+$", text):
            return _literal(text)
        return None

    def _address(self, text: str, opcode: str) -> Operand:
        """[base], [base + displacement] or [base, {coordinates}]."""
        first, *coordinates = _split(text[1:-1])
        match = re.match(r"([^\s+]+?)\s*(?:\+\s*(-?\w+))?$", first.strip())
        if match is None:
            raise SyntaxFault(f"not understood: {text!r}")
        displacement = int(match[2] or "0", 0)
        parts = tuple(self._operand(part, opcode) for part in (match[1], *coordinates))
        if parts[0][0] == "s":
            raise SyntaxFault(f"unknown name in {text!r}")
        return ("m", text, "", False, 0, displacement & MASK, parts)


def _scoped(name: str, scope: Scope) -> str:
    return f"{name}@{scope.number}" if scope.number else name


def _closing(text: str, position: int) -> int:
    """Where the brace that is open at `position` closes."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise SyntaxFault("a brace is not closed")


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    parts.append(text[begin:].strip())
    return [part for part in parts if part]


def _literal(text: str) -> int:
    if text[:2] in ("0f", "0F", "0d", "0D") and len(text) > 2:
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(None, (part.strip() for part in _split(text))):
        kind = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([busf])(\d+)", declaration)
        name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", declaration)
        if kind is None or name is None:
            raise SyntaxFault(f"not understood: {declaration!r}")
        each = TYPE_BYTES[kind[3]]
        alignment, size = int(kind[1] or each), each * int(name[2] or 1)
        offset = -(-offset // alignment) * alignment
        parameters.append(Parameter(name[1], kind[2], offset, size))
        offset += size
    return parameters


def _threads(attributes: str, directive: str) -> int | None:
    match = re.search(rf"\.{directive}\s+([\d\s,]+)", attributes)
    return int(np.prod([int(n) for n in re.findall(r"\d+", match[1])])) if match else None


def _replicated(values: list[int]) -> bytes:
    """Each value as 32 lanes of 32 bits and 32 of 64 bits."""
    wide = np.array(values, np.uint64).reshape(-1, 1).repeat(32, 1)
    narrow = (wide & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return b"".join(n.tobytes() + w.tobytes() for n, w in zip(narrow, wide, strict=True))
