"""What an expression of a chat template may hold of what was said: kinds, and how they combine."""

from enum import Enum, auto


class Looks(Exception):
    """The template may do something else for other contents."""


class Kind(Enum):
    """What an expression may hold; whether it is true never depends on contents."""

    CLEAN = auto()
    """Nothing of what was said."""
    SAID = auto()
    """The content of one message."""
    EITHER = auto()
    """CLEAN or SAID: which, the roles decide."""
    TEXT = auto()
    """Contents and other text in a row."""
    MESSAGE = auto()
    MESSAGES = auto()
    LOOP = auto()
    """The `loop` of a loop over messages."""
    MIXED = auto()
    """Several of these: of use only for whether it's true."""


TEXTS = {Kind.CLEAN, Kind.SAID, Kind.EITHER, Kind.TEXT}
ONE_CONTENT = {Kind.SAID, Kind.EITHER}
OF_STRINGS = {"defined": True, "string": True, "iterable": True, "sequence": True}
OF_OTHERS = ("undefined", "none", "mapping", "number", "boolean", "true", "false")
TYPE_TESTS = OF_STRINGS | dict.fromkeys(OF_OTHERS, False)
"""Test of a type -> its answer for any content."""
Names = dict[str, Kind]


def join(left: Kind, right: Kind) -> Kind:
    """Return the kind of what is one or the other."""
    if left is right:
        return left
    both = {left, right}
    if both <= {Kind.CLEAN, Kind.SAID, Kind.EITHER}:
        return Kind.EITHER
    return Kind.TEXT if both <= TEXTS else Kind.MIXED


def join_names(left: Names, right: Names) -> Names:
    """Return what each name may hold after one branch or the other."""
    every = left.keys() | right.keys()
    return {name: join(left.get(name, Kind.CLEAN), right.get(name, Kind.CLEAN)) for name in every}


def attribute(of: Kind, name: str) -> Kind:
    """Return the kind of a field; messages have a role and a content, and dicts have methods."""
    if of is Kind.MESSAGE and name not in dir(dict):
        return Kind.SAID if name == "content" else Kind.CLEAN
    if of is Kind.LOOP:
        return Kind.MESSAGE if name in ("previtem", "nextitem") else Kind.CLEAN
    if of is not Kind.CLEAN:
        raise Looks(name)
    return of
