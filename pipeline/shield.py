"""Keep special tokens that somebody typed from becoming special ids.

A user may write `<|eot_id|>`. Such a look-alike is hidden behind a private-use character while the
template renders; afterwards the template's genuine special tokens get sentinels of their own, and
the text is encoded in one pass by a copy of the tokenizer that knows only the sentinels.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PRIVATE_USE = range(0xE000, 0xF900)


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string inside nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key)
            yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested lists and dicts with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def unused_characters(text: str, count: int) -> list[str]:
    """Return private-use characters that don't occur in a text."""
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
    return [next(free) for _ in range(count)]


class Shield:
    """The special tokens of one tokenizer, and how to hide what only looks like one."""

    def __init__(self, backend: "Tokenizer", special: Sequence[str]) -> None:
        self._backend = backend
        self.special = sorted(special, key=len, reverse=True)  # the longest match wins
        alternatives = "|".join(map(re.escape, self.special)) or r"(?!)"
        self._genuine = re.compile(alternatives)
        # A lookahead, so that overlapping look-alikes are all found.
        self._starts = re.compile(f"(?={alternatives})(.)", re.DOTALL)
        self._copies: dict[tuple[str, str], Tokenizer] = {}

    def finds(self, value: Any) -> bool:
        """Say whether a dialogue or a list of tools holds text that looks like a special token."""
        return any(self._genuine.search(text) for text in strings_of(value))

    def cover(self, value: Any) -> "Cover":
        """Choose characters that hide every look-alike of a dialogue and clash with none of it."""
        text = "".join(strings_of(value))
        firsts = sorted({token[0] for token in self.special})
        start, end, *hidden = unused_characters(text, 2 + len(firsts))
        return Cover(self, start, end, dict(zip(firsts, hidden, strict=True)))

    @cached_property
    def plain(self) -> "Tokenizer":
        """The tokenizer without post-processor, for offsets that cover every character."""
        return _respelled(self._backend, {})

    def copy(self, start: str, end: str) -> "Tokenizer":
        """Return the tokenizer without post-processor, special token k spelled {start}k{end}.

        Without a post-processor offsets cover every character (byte-level ones trim spaces).
        """
        if (start, end) not in self._copies:
            self._copies[start, end] = _respelled(
                self._backend, {t: f"{start}{k}{end}" for k, t in enumerate(self.special)}
            )
        return self._copies[start, end]


class Cover:
    """One dialogue's choice of hiding characters and sentinels."""

    def __init__(self, shield: Shield, start: str, end: str, hidden: dict[str, str]) -> None:
        self._shield = shield
        self._edges = start, end
        self._hidden = hidden
        self._restored = str.maketrans({char: first for first, char in hidden.items()})
        self._index = {token: k for k, token in enumerate(shield.special)}

    def hide(self, value: Any) -> Any:
        """Replace the first character of every look-alike in a dialogue or a list of tools."""
        starts, hidden = self._shield._starts, self._hidden
        return map_strings(value, lambda text: starts.sub(lambda m: hidden[m[1]], text))

    def spell(self, rendered: str) -> str:
        """Give genuine special tokens their sentinels and look-alikes their own spelling back."""
        start, end = self._edges
        spelled = self._shield._genuine.sub(
            lambda match: f"{start}{self._index[match[0]]}{end}", rendered
        )
        return spelled.translate(self._restored)

    def encode(self, rendered: str) -> "Encoding":
        """Encode what the template rendered; offsets count the characters of `spell`."""
        tokenizer = self._shield.copy(*self._edges)
        return tokenizer.encode(self.spell(rendered), add_special_tokens=False)


def _respelled(backend: "Tokenizer", names: dict[str, str]) -> "Tokenizer":
    """Copy a tokenizer under other names of its special tokens; every id stays."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in model["vocab"].items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    copy = Tokenizer.from_str(json.dumps(state))
    for old, new in names.items():
        assert copy.token_to_id(new) == backend.token_to_id(old), old
    return copy
