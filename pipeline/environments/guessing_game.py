"""The guessing game: a secret number in a range; the user answers higher, lower or correct.

It is the embedded default: no network, no judge, a score that can be worked out by hand.
`info` = {"game": "guessing_game", "low": 1, "high": 32, "secret": 17}.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipeline.environments.base import Dialogue, End, Environment
from pipeline.records import Message
from pipeline.thoughts import spoken

# A list of 20 strings would be no clearer.
_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()  # noqa: SIM905
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: number for number, word in enumerate(_ONES)} | {
    word: 10 * number for number, word in enumerate(_TENS) if word
}
_NUMBER = re.compile(
    rf"(?<!\d)-?\d+|\b(?:{'|'.join(filter(None, _TENS))})(?:[- ](?:{'|'.join(_ONES[1:10])}))?\b"
    rf"|\b(?:{'|'.join(sorted(_ONES, key=len, reverse=True))})\b"
)
_MOST_DIGITS = 4000


def in_words(number: int) -> str:
    """Spell a number from 0 to 99."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def guess_of(text: str) -> int | None:
    """Return the last number in a message, in digits or words; None where there is none."""
    found = _NUMBER.findall(text.lower())
    if not found:
        return None
    if found[-1].lstrip("-").isdigit():
        # Python reads no int of thousands of digits; where a guess is so far off, it stays as far.
        return int(found[-1][:_MOST_DIGITS])
    return sum(_WORDS[word] for word in re.split("[- ]", found[-1]))


def possible(info: dict[str, Any], guesses: Iterable[int | None]) -> tuple[int, int]:
    """Return the interval (low, high), inclusive, that the answers to the guesses leave."""
    low, high, secret = info["low"], info["high"], info["secret"]
    for guess in guesses:
        if guess is None:
            continue
        if guess == secret:
            return secret, secret
        if guess < secret:
            low = max(low, guess + 1)
        else:
            high = min(high, guess - 1)
    return low, high


def score(info: dict[str, Any], messages: Sequence[str]) -> float:
    """Return how far the interval has shrunk, 0..1, in bits: 1 - log(size) / log(first size).

    Worked by hand: range 1..32, secret 17, guess 16 leaves 17..32: 1 - log 16 / log 32 = 0.2.
    """
    low, high = possible(info, map(guess_of, messages))
    return 1.0 - math.log(high - low + 1) / math.log(info["high"] - info["low"] + 1)


class GuessingGame:
    """Answers the policy's last guess."""

    async def reply(self, dialogue: Dialogue) -> list[Message] | End:
        """Answer higher, lower or correct; the game goes on after "correct" as it was asked to."""
        guess = guess_of(spoken(dialogue.messages[-1]))
        return [Message(role="user", content=answer(dialogue.info["secret"], guess))]


def answer(secret: int, guess: int | None) -> str:
    """Return what the user says to a guess."""
    if guess is None:
        return "say a number"
    if guess == secret:
        return "correct"
    return "higher" if guess < secret else "lower"


def opening(low: int, high: int) -> str:
    """Return the user's first message."""
    return f"guess my number from {low} to {high}"


def random_player(messages: Sequence[Message], draw: np.random.Generator) -> str:
    """Guess at random what is still possible: the consistent play that a warm start imitates.

    Reads only what a player sees: the opening and the answers. Half of the guesses are in words.
    """
    low, high = (int(n) for n in re.findall(r"\d+", messages[0].get("content") or "")[-2:])
    for said, reply in zip(messages[1::2], messages[2::2], strict=False):
        guess = guess_of(said.get("content") or "")
        if guess is None:
            continue
        if reply.get("content") == "higher":
            low = max(low, guess + 1)
        elif reply.get("content") == "lower":
            high = min(high, guess - 1)
        elif reply.get("content") == "correct":
            low = high = guess
    number = int(draw.integers(low, high + 1))
    return str(number) if draw.integers(2) else in_words(number)


def corpus() -> list[str]:
    """Return everything that is said in a game, for a tokenizer to learn from."""
    numbers = [said for n in range(100) for said in (str(n), in_words(n))]
    headers = ["user\n\n", "assistant\n\n", "system\n\n"]
    answers = [answer(1, guess) for guess in (None, 0, 1, 2)]
    return 4 * [*numbers, *headers, *answers, opening(1, 32)]


def build(config: object, user: object) -> Environment:
    """Make the environment; it needs neither settings nor a user model."""
    return GuessingGame()
