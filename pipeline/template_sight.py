"""What a chat template can see of what was said, found by reading it once.

Most templates only write contents down. Of such a one, the page of a dialogue is the page of any
other dialogue of the same roles and tools with the contents put in, and needn't be proven again.
The proof is an abstract interpretation that knows nothing of contents but this: each is text, not
empty, without blanks at its edges, and holds none of the needles that are found on the way. A
template that does anything else with a content counts as one that looks.
"""

from collections.abc import Iterable
from functools import reduce

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.template_kinds import (
    ONE_CONTENT,
    TEXTS,
    TYPE_TESTS,
    Kind,
    Looks,
    Names,
    attribute,
    join,
    join_names,
)


def needles_of(template: str) -> tuple[str, ...] | None:
    """Return the texts that a template looks for in contents, or None where it sees more of them.

    Its page depends on roles and tools alone, but for the contents in it, where no content is
    empty, has blanks at its edges, or holds a needle, and messages have no other fields. Only a
    content that is written as JSON may look otherwise: its quotes do.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    reader = _Reader()
    try:
        reader.read(environment.parse(template).body, {"messages": Kind.MESSAGES})
    except (Looks, TemplateError):  # an unknown tag is one that we can't read
        return None
    return tuple(sorted(reader.needles))


class _Reader:
    def __init__(self) -> None:
        self.needles = set[str]()

    def read(self, body: Iterable[nodes.Node], names: Names) -> None:
        """Follow statements; `names` changes as they assign."""
        for node in body:
            match node:
                case nodes.Output():
                    self._each(node.nodes, names, TEXTS)
                case nodes.If():
                    self._if(node, names)
                case nodes.For(recursive=False):
                    self._for(node, dict(names))
                case nodes.Assign(target=nodes.Name(name=name)):
                    names[name] = self.kind(node.node, names)
                case nodes.Assign(target=nodes.NSRef()):
                    # An attribute outlives its loop, so it is clean or the template is refused.
                    self._each([node.node], names, {Kind.CLEAN})
                case nodes.Break() | nodes.Continue():
                    pass
                case _:
                    raise Looks(type(node).__name__)

    def _each(self, values: Iterable[nodes.Node], names: Names, allowed: set[Kind]) -> None:
        for value in values:
            if self.kind(value, names) not in allowed:
                raise Looks(type(value).__name__)

    def _if(self, node: nodes.If, names: Names) -> None:
        """Follow the branches that some dialogue may take, each with names of its own."""
        ends = list[Names]()
        for branch in (node, *node.elif_):
            self.kind(branch.test, names)
            answer = self.known(branch.test, names)
            if answer is not False:
                ends.append(self._branch(branch.body, names))
            if answer:
                break
        else:
            ends.append(self._branch(node.else_, names))
        joined = reduce(join_names, ends)
        names.clear()
        names.update(joined)

    def _branch(self, body: list[nodes.Node], names: Names) -> Names:
        inner = dict(names)
        self.read(body, inner)
        return inner

    def _for(self, node: nodes.For, names: Names) -> None:
        kind = self.kind(node.iter, names)
        if kind not in (Kind.CLEAN, Kind.MESSAGES):
            raise Looks("a loop over what was said")
        over_messages = kind is Kind.MESSAGES
        self._branch(node.else_, names)
        if over_messages and not isinstance(node.target, nodes.Name):
            raise Looks("a message taken apart")
        item, loop = (Kind.MESSAGE, Kind.LOOP) if over_messages else (Kind.CLEAN, Kind.CLEAN)
        names |= {name.name: item for name in _names(node.target)} | {"loop": loop}
        if node.test is not None:
            self.kind(node.test, names)
        self.read(node.body, names)  # what it sets is gone in the next round

    def kind(self, node: nodes.Node, names: Names) -> Kind:
        """Return what an expression may hold."""
        match node:
            case nodes.Name(name=name):
                return names.get(name, Kind.CLEAN)
            case (
                nodes.Getattr(node=of, attr=str(name))
                | nodes.Getitem(node=of, arg=nodes.Const(value=str(name)))
            ):
                return attribute(self.kind(of, names), name)
            case nodes.Getitem():
                return self._item(node, names)
            case nodes.Call(node=nodes.Getattr(node=of, attr=name)) if (
                self.kind(of, names) is not Kind.CLEAN
            ):
                return self._method(node, self.kind(of, names), name, names)
            case nodes.Filter(node=nodes.Node() as of):
                return self._filter(node, self.kind(of, names), names)
            case nodes.Test(node=of, name=name) if name in TYPE_TESTS:
                self.kind(of, names)
                return Kind.CLEAN
            case nodes.Compare():
                return self._compare(node, names)
            case nodes.Add() | nodes.Concat():
                return self._row(node, names)
            case nodes.And() | nodes.Or():
                return join(self.kind(node.left, names), self.kind(node.right, names))
            case nodes.Not():
                self.kind(node.node, names)
                return Kind.CLEAN
            case nodes.CondExpr(test=test, expr1=yes, expr2=no):
                return self._choice(test, yes, no, names)
        self._each(node.iter_child_nodes(), names, {Kind.CLEAN})
        return Kind.CLEAN

    def _choice(
        self, test: nodes.Expr, yes: nodes.Expr, no: nodes.Expr | None, names: Names
    ) -> Kind:
        self.kind(test, names)
        answer = self.known(test, names)
        either = [node for node, taken in ((yes, True), (no, False)) if answer in (None, taken)]
        return reduce(join, (self.kind(n, names) if n else Kind.CLEAN for n in either))

    def _row(self, node: nodes.Node, names: Names) -> Kind:
        """Return the kind of texts that are put together."""
        parts = [self.kind(part, names) for part in node.iter_child_nodes()]
        if not set(parts) <= TEXTS:
            raise Looks("a message in a sum")
        return Kind.CLEAN if set(parts) == {Kind.CLEAN} else Kind.TEXT

    def _item(self, node: nodes.Getitem, names: Names) -> Kind:
        match node.node:
            case nodes.Call(
                node=nodes.Getattr(node=text, attr="split"),
                args=[nodes.Const(value=str(needle))],
                kwargs=[],
                dyn_args=None,
                dyn_kwargs=None,
            ) if needle and self.kind(text, names) in ONE_CONTENT and _ends(node.arg):
                self.needles.add(needle)  # without it, a content has one part: itself
                return self.kind(text, names)
        of = self.kind(node.node, names)
        self._each([node.arg], names, {Kind.CLEAN})
        if of is Kind.MESSAGES:
            return of if isinstance(node.arg, nodes.Slice) else Kind.MESSAGE
        if of is not Kind.CLEAN:
            raise Looks("a part of what was said")
        return of

    def _method(self, node: nodes.Call, of: Kind, name: str, names: Names) -> Kind:
        plain = not (node.kwargs or node.dyn_args or node.dyn_kwargs)
        match name, node.args:
            case "get", [nodes.Const(value=str(key)), *default] if of is Kind.MESSAGE and plain:
                self._each(default, names, {Kind.CLEAN})
                return attribute(of, key)
            case "strip" | "lstrip" | "rstrip", args if of in TEXTS and plain and _blanks(args):
                return of
            case "startswith" | "endswith", [nodes.Const(value=str(text))] if (
                of in ONE_CONTENT and plain and text
            ):
                self.needles.add(text)
                return Kind.CLEAN
        raise Looks(name)

    def _filter(self, node: nodes.Filter, of: Kind, names: Names) -> Kind:
        plain = not (node.kwargs or node.dyn_args or node.dyn_kwargs)
        match node.name, node.args:
            case "trim", args if of in TEXTS and plain and _blanks(args):
                return of
            case "string", [] if of in TEXTS and plain:
                return of
            case "tojson", args if of in TEXTS:
                self._each([*args, *node.kwargs], names, {Kind.CLEAN})
                return Kind.CLEAN if of is Kind.CLEAN else Kind.TEXT
            case (("length" | "count"), []) if of is Kind.MESSAGES:
                return Kind.CLEAN
            case (("first" | "last"), []) if of is Kind.MESSAGES:
                return Kind.MESSAGE
            case "list", [] if of is Kind.MESSAGES:
                return of
            case (("selectattr" | "rejectattr"), [nodes.Const(value="role"), *args]) if (
                of is Kind.MESSAGES and plain
            ):
                self._each(args, names, {Kind.CLEAN})
                return of
        self._each(node.iter_child_nodes(), names, {Kind.CLEAN})
        return Kind.CLEAN

    def _compare(self, node: nodes.Compare, names: Names) -> Kind:
        """Return CLEAN, after noting a text that a content is compared with or searched for."""
        match node.expr, node.ops:
            case nodes.Const(value=str(text)), [nodes.Operand(op="in" | "notin", expr=of)] if (
                text and self.kind(of, names) in ONE_CONTENT
            ):
                self.needles.add(text)
                return Kind.CLEAN
            case nodes.Const(), [nodes.Operand(op="in" | "notin", expr=of)] if (
                self.kind(of, names) is Kind.MESSAGE
            ):
                return Kind.CLEAN
            case of, [nodes.Operand(op="eq" | "ne", expr=nodes.Const(value=value))] if (
                self.kind(of, names) in ONE_CONTENT
            ):
                if isinstance(value, str) and value:
                    self.needles.add(value)
                return Kind.CLEAN
        self._each([node.expr, *(operand.expr for operand in node.ops)], names, {Kind.CLEAN})
        return Kind.CLEAN

    def known(self, test: nodes.Node, names: Names) -> bool | None:
        """Return the answer of a test where it is the same for all contents without needles."""
        match test:
            case nodes.Not(node=of):
                answer = self.known(of, names)
                return None if answer is None else not answer
            case nodes.And(left=left, right=right):
                return _all([self.known(left, names), self.known(right, names)])
            case nodes.Or(left=left, right=right):
                either = [self.known(side, names) for side in (left, right)]
                answer = _all([None if a is None else not a for a in either])
                return None if answer is None else not answer
            case nodes.Compare(expr=nodes.Const(value=str()), ops=[nodes.Operand(op=op, expr=of)]):
                if op in ("in", "notin") and self.kind(of, names) is Kind.SAID:
                    return op == "notin"
            case nodes.Test(node=of, name=name) if self.kind(of, names) is Kind.SAID:
                return TYPE_TESTS.get(name)
        return None


def _all(answers: list[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers else True


def _ends(index: nodes.Expr) -> bool:
    """Say whether an index is that of the first or the last part."""
    try:
        return index.as_const() in (0, -1)
    except nodes.Impossible:
        return False


def _blanks(args: list[nodes.Expr]) -> bool:
    """Say whether a strip with these arguments leaves a content as it is."""
    values = [arg.value if isinstance(arg, nodes.Const) else "?" for arg in args]
    return all(value is None or (isinstance(value, str) and value.isspace()) for value in values)


def _names(target: nodes.Node) -> list[nodes.Name]:
    return [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))
