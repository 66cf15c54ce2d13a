"""Whether a chat template does nothing with what messages say but write it, told by its syntax.

Such a template writes two chats alike, but for their texts, if these have the same roles, are
strings, and agree in the white space around them and in which of them are empty. Every expression
has a kind, which says what of a message it may hold. A template that uses a text, or what holds
one, in any way that is not known here to be the same for every text is said to look at it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum, auto

from jinja2 import Environment, TemplateError, nodes

from lora_engine.data.generation_blocks import with_marks


class _Kind(Enum):
    """What the value of an expression holds."""

    PLAIN = auto()  # nothing that a message says
    TEXT = auto()  # a string with texts of messages in it, or PLAIN
    MESSAGE = auto()  # a message, or PLAIN
    MESSAGES = auto()  # several, or PLAIN
    LOOP = auto()  # Jinja's variable of that name


_WRITTEN = (_Kind.PLAIN, _Kind.TEXT)
_SPACE = frozenset(("trim", "strip", "lstrip", "rstrip"))  # what they remove is around the text
_TYPE_TESTS = frozenset(
    (
        *("string", "none", "defined", "undefined", "mapping", "iterable", "sequence", "number"),
        *("boolean", "true", "false", "callable"),
    )
)
# Filters that make no Markup, which would escape the texts it is joined with.
_FILTERS = frozenset(
    (
        *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "indent"),
        *("int", "items", "join", "last", "length", "list", "lower", "max", "min", "reject"),
        *("rejectattr", "replace", "reverse", "round", "select", "selectattr", "sort", "string"),
        *("sum", "title", "tojson", "trim", "unique", "upper"),
    )
)
_OF_LOOP: Mapping[str, _Kind] = {
    **dict.fromkeys(("index", "index0", "revindex", "revindex0", "first", "last"), _Kind.PLAIN),
    **dict.fromkeys(("length", "depth", "depth0"), _Kind.PLAIN),
    **dict.fromkeys(("previtem", "nextitem"), _Kind.MESSAGE),
}
_CHANGING = frozenset(("strftime_now", "lipsum"))  # functions that give another value each time
_NOT_READ = frozenset((*dir(dict), "weight"))  # of a message, which may hold anything
_ARITHMETIC = (
    *(nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Slice, nodes.Operand, nodes.Keyword),
)


class _Looks(Exception):
    """The template may look at a text."""


def only_writes_texts(template: str, given: Collection[str] = ()) -> bool:
    """Whether it writes texts, without the white space around them or with it, and no more.

    given: the names of the variables that it gets beside `messages`.
    """
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(with_marks(template))
        _Flow(parsed, given).follow()
    except (_Looks, TemplateError, RecursionError):
        return False
    return True


class _Flow:
    """Where texts go in a template. A name has one kind throughout, whatever its scope."""

    def __init__(self, template: nodes.Template, given: Collection[str]) -> None:
        self._template = template
        self._kinds = {"messages": _Kind.MESSAGES, "loop": _Kind.LOOP}
        self._unsure = set(given)  # names that may be PLAIN, whatever their kind
        self._macros = {macro.name for macro in template.find_all(nodes.Macro)}
        self._spaces = {ref.name for ref in template.find_all(nodes.NSRef)}

    def follow(self) -> None:
        """Raises _Looks where a text may be looked at."""
        before: tuple[dict[str, _Kind], set[str]] | None = None
        while before != (now := (dict(self._kinds), set(self._unsure))):
            before = now
            self._all(self._template.body)  # again: in a loop a name is read before it is set

    def _all(self, statements: Iterable[nodes.Node]) -> None:
        for statement in statements:
            match statement:
                case nodes.Output():
                    self._kind_among(_WRITTEN, *statement.nodes)
                case nodes.If():
                    self._if(statement)
                case nodes.For(recursive=False):
                    self._for(statement)
                case nodes.Assign():
                    self._assign(statement.target, self._kind(statement.node), statement.node)
                case nodes.AssignBlock(filter=None):
                    self._assign(statement.target, _Kind.TEXT)
                    self._all(statement.body)
                case nodes.Macro():
                    self._plain(*statement.defaults)
                    self._all(statement.body)
                case nodes.CallBlock(args=[]):
                    self._kind_among(_WRITTEN, statement.call)
                    self._all(statement.body)
                case nodes.ExprStmt():
                    self._kind(statement.node)
                case nodes.Continue() | nodes.Break():
                    pass
                case _:
                    raise _Looks

    def _if(self, statement: nodes.If) -> None:
        self._truth(statement.test)
        self._all(statement.body)
        if not self._is_always_string(statement.test):
            self._all(statement.elif_)
            self._all(statement.else_)

    def _is_always_string(self, test: nodes.Node) -> bool:
        """Whether it asks of what is a message's content if it is a string."""
        match test:
            case nodes.Test(name="string", node=nodes.Getattr() | nodes.Getitem() as asked):
                is_message = self._kind(asked.node) is _Kind.MESSAGE and self._is_sure(asked.node)
                return is_message and self._kind(asked) is _Kind.TEXT
        return False

    def _is_sure(self, expression: nodes.Node) -> bool:
        """Whether it is one or more messages, and never PLAIN."""
        match expression:
            case nodes.Name(name=name):
                return name in self._kinds and name not in self._unsure
            case nodes.Getitem(node=of):
                return self._kind(of) is _Kind.MESSAGES and self._is_sure(of)
        return False

    def _for(self, loop: nodes.For) -> None:
        over = self._kind(loop.iter)
        if over not in (_Kind.PLAIN, _Kind.MESSAGES):
            raise _Looks
        of_each = _Kind.MESSAGE if over is _Kind.MESSAGES else over
        self._assign(loop.target, of_each, loop.iter)
        if loop.test is not None:
            self._truth(loop.test)
        self._all(loop.body)
        self._all(loop.else_)

    def _assign(self, target: nodes.Node, kind: _Kind, source: nodes.Node | None = None) -> None:
        """source: what the value is, or an item of."""
        match target:
            case nodes.Name(name=name):
                if source is None or not self._is_sure(source):
                    self._unsure.add(name)
                self._kinds[name] = _joined(self._kinds.get(name, _Kind.PLAIN), kind)
            case nodes.NSRef(name=name, attr=attribute):
                key = f"{name}.{attribute}"
                self._kinds[key] = _joined(self._kinds.get(key, _Kind.PLAIN), kind)
            case nodes.Tuple(items=items) if kind is _Kind.PLAIN:
                for item in items:
                    self._assign(item, kind)
            case _:
                raise _Looks

    def _kind_among(self, allowed: Sequence[_Kind], *expressions: nodes.Node) -> _Kind:
        """The kind of all together, each of which is allowed."""
        found = {self._kind(expression) for expression in expressions}
        if not found.issubset(allowed):
            raise _Looks
        return _joined(*found)

    def _plain(self, *expressions: nodes.Node | None) -> _Kind:
        return self._kind_among((_Kind.PLAIN,), *filter(None, expressions))

    def _truth(self, expression: nodes.Node) -> _Kind:
        """Of what is asked only whether it is true, which is the same for all texts."""
        match expression:
            case nodes.And() | nodes.Or():
                self._truth(expression.left)
                self._truth(expression.right)
            case _:
                self._kind(expression)
        return _Kind.PLAIN

    def _kind(self, expression: nodes.Node) -> _Kind:
        match expression:
            case nodes.TemplateData() | nodes.Const():
                return _Kind.PLAIN
            case nodes.Name(name=name):
                is_function = name in self._macros or name == "caller" or name in _CHANGING
                if is_function or name in self._spaces:
                    raise _Looks
                return self._kinds.get(name, _Kind.PLAIN)
            case nodes.Getattr(attr=attribute):
                return self._item(expression.node, nodes.Const(attribute))
            case nodes.Getitem(arg=item):
                return self._item(expression.node, item)
            case nodes.Add():
                return self._kind_among(_WRITTEN, expression.left, expression.right)
            case nodes.Concat():
                return self._kind_among(_WRITTEN, *expression.nodes)
            case nodes.CondExpr():
                self._truth(expression.test)
                first, other = expression.expr1, expression.expr2
                return _joined(self._kind(first), self._kind(other or nodes.Const("")))
            case nodes.And() | nodes.Or():
                return _joined(self._kind(expression.left), self._kind(expression.right))
            case nodes.Not():
                return self._truth(expression.node)
            case nodes.Test():
                return self._test(expression)
            case nodes.Compare():
                return self._compared(expression)
            case nodes.Filter():
                return self._filtered(expression)
            case nodes.Call():
                return self._called(expression)
            case _ if isinstance(expression, _ARITHMETIC):
                return self._plain(*expression.iter_child_nodes())
        raise _Looks

    def _item(self, of: nodes.Node, key: nodes.Node) -> _Kind:
        """What `of[key]` or `of.key` is."""
        name = key.value if isinstance(key, nodes.Const) else None
        if isinstance(of, nodes.Name) and of.name in self._spaces:
            if not isinstance(name, str):
                raise _Looks
            return self._kinds.get(f"{of.name}.{name}", _Kind.PLAIN)
        self._plain(key)
        kind = self._kind(of)
        if kind is _Kind.PLAIN:
            return kind
        if kind is _Kind.MESSAGES and not isinstance(name, str):
            return kind if isinstance(key, nodes.Slice) else _Kind.MESSAGE
        if kind is _Kind.MESSAGE and isinstance(name, str) and name not in _NOT_READ:
            return _Kind.TEXT if name == "content" else _Kind.PLAIN
        if kind is _Kind.LOOP and isinstance(name, str) and name in _OF_LOOP:
            return _OF_LOOP[name]
        raise _Looks

    def _test(self, test: nodes.Test) -> _Kind:
        if self._kind(test.node) is _Kind.PLAIN:
            return self._plain(*_arguments(test))
        if test.name in _TYPE_TESTS and not _arguments(test):
            return _Kind.PLAIN
        raise _Looks

    def _compared(self, compared: nodes.Compare) -> _Kind:
        match compared.expr, [(operand.op, operand.expr) for operand in compared.ops]:
            case nodes.Const(value=str(key)), [("in" | "notin", of)] if key not in _NOT_READ:
                self._kind_among((_Kind.PLAIN, _Kind.MESSAGE), of)
            case asked, [("eq" | "ne", nodes.Const(value=None | ""))]:
                self._truth(asked)
            case _:
                self._plain(compared.expr, *compared.ops)
        return _Kind.PLAIN

    def _filtered(self, filtered: nodes.Filter) -> _Kind:
        if filtered.node is None or filtered.name not in _FILTERS:
            raise _Looks
        kind, arguments = self._kind(filtered.node), _arguments(filtered)
        self._plain(*arguments)
        match kind, filtered.name:
            case (_Kind.PLAIN, _) | (_Kind.TEXT, "string" | "default" | "d"):
                return kind
            case (_Kind.TEXT, "trim") | (_Kind.MESSAGES, "list" | "reverse") if not arguments:
                return kind
            case _Kind.MESSAGES, "length" | "count":
                return _Kind.PLAIN
            case _Kind.MESSAGES, "first" | "last":
                return _Kind.MESSAGE
        raise _Looks

    def _called(self, call: nodes.Call) -> _Kind:
        arguments = _arguments(call)
        self._plain(*arguments)
        match call.node:
            case nodes.Name(name=name) if name in self._macros or name == "caller":
                return _Kind.TEXT
            case nodes.Getattr(attr=name, node=of) if name in _SPACE and not arguments:
                return self._kind_among(_WRITTEN, of)
            case nodes.Getattr(attr="get", node=of) if arguments:
                return self._item(of, arguments[0])
        return self._plain(call.node)


def _arguments(of: nodes.Call | nodes.Filter | nodes.Test) -> list[nodes.Node]:
    return [*of.args, *of.kwargs, *filter(None, (of.dyn_args, of.dyn_kwargs))]


def _joined(*kinds: _Kind) -> _Kind:
    """The kind of what may be of any of these."""
    found = {kind for kind in kinds if kind is not _Kind.PLAIN}
    if len(found) > 1:
        raise _Looks
    return found.pop() if found else _Kind.PLAIN
