"""Encode texts that begin alike: what two of them share is encoded once, up to an added token.

A tokenizer finds added tokens first, and encodes what stands between them piece by piece. So a text
that is cut behind one gives the ids of its two parts, where the tokenizer looks at nothing else: a
byte-level one whose added tokens take no blanks with them (page_ids.token_widths).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

from tokenizers import Tokenizer

Ids: TypeAlias = list[int]
LEAST = 128
"""Characters that two texts must share to be worth a look."""


class SharedStarts:
    """Encodes texts of which neighbours may begin alike.

    `widths`: the bytes of each id; `keeps` says whether the normalizer leaves a text as it is.
    """

    def __init__(
        self, backend: Tokenizer, widths: Sequence[int], keeps: Callable[[str], bool]
    ) -> None:
        self._backend = backend
        self._widths = widths
        self._keeps = keeps
        added = backend.get_added_tokens_decoder()
        # Others are found after the normalizer, which may look beyond them.
        self._borders = {i for i, token in added.items() if not token.normalized}
        self._longest = max((len(token.content.encode()) for token in added.values()), default=0)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, as the tokenizer gives them for the whole of it."""
        leads = _leads(texts)
        firsts = [i for i, (lead, _) in enumerate(leads) if lead == i]
        found = dict(zip(firsts, self._plain([texts[i] for i in firsts]), strict=True))
        rests = list[tuple[int, Ids, str]]()
        for i, (lead, common) in enumerate(leads):
            if lead != i:
                rests.append((i, *self._cut(texts[lead], found[lead], texts[i], common)))
        ids = self._plain([text for _, _, text in rests])
        found |= {i: start + rest for (i, start, _), rest in zip(rests, ids, strict=True)}
        return [found[i] for i in range(len(texts))]

    def _plain(self, texts: list[str]) -> list[Ids]:
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _cut(self, lead: str, ids: Ids, text: str, common: int) -> tuple[Ids, str]:
        """Return the ids of what a text shares with its lead, and the rest of the text."""
        ends = list(accumulate(map(self._widths.__getitem__, ids)))
        # An id that the model gave, and an added token has as well, would be counted too wide.
        whole = ends and ends[-1] == _bytes(lead) and self._keeps(lead)
        # Behind a border, no added token of either text may reach across what they share.
        last = bisect_right(ends, _bytes(text[:common]) - self._longest) if whole else 0
        count = next((k for k in range(last, 0, -1) if ids[k - 1] in self._borders), 0)
        if not count:
            return [], text
        return ids[:count], text.encode()[ends[count - 1] :].decode()


def _leads(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return for each text which one leads it, maybe itself, and how many characters they share."""
    leads, lead = list[tuple[int, int]](), 0
    for i, text in enumerate(texts):
        common = _common(texts[lead], text) if i else 0
        if common < LEAST:
            lead = i
        leads.append((lead, common))
    return leads


def _common(left: str, right: str) -> int:
    """Count the characters with which two texts begin alike."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
