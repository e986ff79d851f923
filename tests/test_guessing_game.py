"""The guessing game: guesses in words and digits, answers, and the score by hand."""

import asyncio
import math

import numpy as np
import pytest

from pipeline.environments import guessing_game as game
from pipeline.environments.base import Dialogue
from pipeline.records import Message

INFO = {"game": "guessing_game", "low": 1, "high": 32, "secret": 17}


@pytest.mark.parametrize("number", range(100))
def test_words_and_digits_read_back(number):
    assert game.guess_of(game.in_words(number)) == number
    assert game.guess_of(f"is it {number}?") == number


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("", None),
        ("no idea", None),
        ("Twenty-One", 21),
        ("twenty one", 21),
        ("not 3 but 14", 14),
        ("nineteen", 19),
        ("ninety", 90),
        ("someone", None),
        ("between 10-20", 20),
        ("-5", -5),
    ],
)
def test_the_last_number_counts(text, guess):
    assert game.guess_of(text) == guess


def test_score_by_hand():
    # 1..32: 16 is too low, 17..32 are left (4 of 5 bits); 24 is too high, 17..23 are left.
    assert game.score(INFO, ["16"]) == pytest.approx(1 / 5)
    assert game.score(INFO, ["16", "24"]) == pytest.approx(1 - math.log2(7) / 5)
    assert game.score(INFO, ["16", "24", "seventeen", "3"]) == 1.0


def test_an_illegible_or_useless_guess_leaves_the_interval():
    assert game.score(INFO, ["hm"]) == 0.0
    assert game.score(INFO, ["16", "2", "hm"]) == pytest.approx(1 / 5)
    assert game.score(INFO, ["99"]) == 0.0


@pytest.mark.parametrize(
    ("said", "reply"),
    [("16", "higher"), ("twenty", "lower"), ("17", "correct"), ("?", "say a number")],
)
def test_the_user_answers(said, reply):
    dialogue = Dialogue(0, "p", 0, [Message(role="assistant", content=said)], info=INFO)
    answered = asyncio.run(game.GuessingGame().reply(dialogue))
    assert answered == [{"role": "user", "content": reply}]


def test_the_random_player_is_consistent():
    """It never guesses what the answers have excluded, and it covers the whole range."""
    firsts = set()
    for seed in range(400):
        draw = np.random.default_rng(seed)
        messages = [Message(role="user", content=game.opening(1, 32))]
        low, high = 1, 32
        for turn in range(5):
            text = game.random_player(messages, draw)
            guess = game.guess_of(text)
            assert guess is not None and low <= guess <= high
            if turn == 0:
                firsts.add(guess)
            reply = game.answer(INFO["secret"], guess)
            low, high = game.possible(INFO | {"low": low, "high": high}, [guess])
            messages += [
                Message(role="assistant", content=text),
                Message(role="user", content=reply),
            ]
    assert firsts == set(range(1, 33))
