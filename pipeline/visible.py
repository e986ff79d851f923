"""Text that strangers wrote, made safe to print: nothing in it moves a cursor or hides a word.

Terminals obey control characters (ANSI escapes: ECMA-48), and bidirectional overrides show text in
another order than it is in (https://trojansource.codes, https://www.unicode.org/reports/tr9/).
"""

import re
import unicodedata

# Marks of our own, and what bracket them: a text that has them gets them escaped.
TRAINED = ("⟦", "⟧")
SPECIAL = ("⦗", "⦘")
NEWLINE = "↵"
TAB = "⇥"

# Controls, formats, surrogates, private and unassigned characters, line and paragraph separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_KEPT = {"\n": f"{NEWLINE}\n", "\t": f"{TAB}\t", "\x7f": "␡"}
_PLAIN = re.compile(r"[ -~]*")


def visible(text: str) -> str:
    """Show what would act on a terminal: ␛ for an escape, ⟨202e⟩ for U+202E, ↵ before a newline."""
    return text if _PLAIN.fullmatch(text) else "".join(map(_shown, text))


def in_line(text: str) -> str:
    """Show a text on one line: an id, a reason, a name."""
    return visible(text).replace("\n", "").replace("\t", "")


def _shown(letter: str) -> str:
    if letter in _KEPT:
        return _KEPT[letter]
    if letter < " ":
        return chr(0x2400 + ord(letter))  # Unicode's pictures of the controls, in their order
    if letter in (*TRAINED, *SPECIAL) or unicodedata.category(letter) in _UNSEEN:
        return f"⟨{ord(letter):04x}⟩"
    return letter
