"""REFUEL's rules, each by hand, and all of them against the script's own order on random rows."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.compat import (
    MISSING_SCORE,
    SAME_RESPONSE,
    TOO_LONG,
    Side,
    refuel_order,
    refuel_reason,
    sampled_ids,
    side_of,
)
from pipeline.records import NO_SCORE, Message, Rollout, Turn
from play import messages_of, played


def side(said: str, reward: float = 0.5, ids: int = 9, **changes: Any) -> Side:
    values = {"rewards": [0.25, reward], "score_turn": 1, "said": answer(said), "ids": ids}
    return Side(**values | changes)


def answer(text: str) -> Message:
    return Message(role="assistant", content=text)


def test_a_pair_that_nothing_is_wrong_with() -> None:
    assert refuel_reason(side("a"), side("b"), 9) is None


@pytest.mark.parametrize("rewards", [[NO_SCORE, 0.5], [0.25, NO_SCORE], [0.25, 0.5, NO_SCORE]])
def test_a_missing_score_at_any_turn_drops_the_pair(rewards: list[float]) -> None:
    bad = side("b", rewards=rewards)
    assert refuel_reason(side("a"), bad, 9) == MISSING_SCORE
    assert refuel_reason(bad, side("a"), 9) == MISSING_SCORE


def test_a_score_that_nobody_asked_for_isnt_missing() -> None:
    assert refuel_reason(side("a", rewards=[None, 0.5]), side("b"), 9) is None


def test_the_same_text_drops_the_pair_whatever_its_ids() -> None:
    assert refuel_reason(side("a", ids=3), side("a", ids=4), 9) == SAME_RESPONSE
    spaced = side("a ")
    assert refuel_reason(side("a"), spaced, 9) is None, "texts are compared untrimmed"
    nulls = dataclasses.replace(
        side("b"), said=Message(role="assistant", content="a", reasoning_content=None)
    )
    assert refuel_reason(side("a"), nulls, 9) == SAME_RESPONSE


@pytest.mark.parametrize(("ids", "reason"), [((9, 9), None), ((10, 9), TOO_LONG)])
def test_the_limit_itself_is_allowed_on_both_sides(
    ids: tuple[int, int], reason: str | None
) -> None:
    assert refuel_reason(side("a", ids=ids[0]), side("b", ids=ids[1]), 9) == reason
    assert refuel_reason(side("a", ids=ids[1]), side("b", ids=ids[0]), 9) == reason


def test_the_first_rule_gives_the_reason() -> None:
    wrong = side("a", rewards=[NO_SCORE, 0.5], ids=99)
    assert refuel_reason(wrong, side("a", ids=99), 9) == MISSING_SCORE
    assert refuel_reason(side("a", ids=99), side("a", ids=99), 9) == SAME_RESPONSE
    assert refuel_reason(side("a", ids=99), side("b"), 9) == TOO_LONG


@pytest.mark.parametrize(
    ("rewards", "order"), [((2.0, 1.0), (0, 1)), ((1.0, 2.0), (1, 0)), ((1.0, 1.0), (1, 0))]
)
def test_of_equals_the_second_is_chosen(
    rewards: tuple[float, float], order: tuple[int, int]
) -> None:
    assert refuel_order(side("a", rewards[0]), side("b", rewards[1])) == order


def test_the_first_is_counted_whole_and_the_second_up_to_the_fork() -> None:
    # Ids by turn: 2 + 1, 2 + 2, 2 + 3.
    rollouts = [played([[1], [2, 3], [4, 5, 6]], branch_turn=1, sample=k) for k in range(2)]
    first, second = (side_of(rollout, sampled_ids) for rollout in rollouts)
    assert (first.ids, second.ids) == (12, 7)
    assert first.said == answer("[2, 3]")


def test_ids_of_a_rewritten_context_are_those_that_the_policy_saw() -> None:
    rollout = played([[1, 2, 3], [4]], keeps=[0, 2], branch_turn=1)
    assert sampled_ids(rollout, 0) == 5
    assert sampled_ids(rollout, 1) == 2 + 2 + 1


def test_no_end_of_turn_is_counted_for_a_cut_turn() -> None:
    cut = played([[1, 2]], branch_turn=0)
    cut.turns = [Turn(0, [7], [1, 2], None, "length")]
    assert sampled_ids(cut, 0) == 3


BOS, HEADER, END = 1, 2, 3
LIMIT = 40


def page(messages: list[Any]) -> list[int]:
    """Encode as Llama 3's template does: a header, trimmed text, an end of turn."""
    ids = [BOS]
    for message in messages:
        ids += [HEADER, *(ord(letter) for letter in message["content"].strip()), END]
    return ids


def seeds_way(row: dict[str, Any]) -> tuple[str, list[int], list[int]] | str:
    """Say which trajectory REFUEL's script chooses, and what trains; or the rule that drops it."""
    one, two, at = row["trajectory"], row["second"], row["h"]
    if -99999 in row["first_reward"] or -99999 in row["second_reward"]:
        return "rule 1"
    if one[2 * at + 1]["content"] == two[2 * at + 1]["content"]:
        return "rule 2"
    if len(page(one)) > LIMIT or len(page(two[: (at + 1) * 2])) > LIMIT:
        return "rule 3"
    better = row["first_reward"][row["len"]] > row["second_reward"][row["len"]]
    ids = [page(text[: (at + 1) * 2]) for text in (one, two)]
    return ("first", *ids) if better else ("second", ids[1], ids[0])


def our_way(row: dict[str, Any]) -> tuple[str, list[int], list[int]] | str:
    rollouts = [
        Rollout("p", k, row[text], None, row["h"], row["len"], "complete", "", rewards=row[name])
        for k, (text, name) in enumerate(
            [("trajectory", "first_reward"), ("second", "second_reward")]
        )
    ]
    first, second = (
        side_of(rollout, lambda r, turn: len(page(r.messages[: 2 * (turn + 1)])))
        for rollout in rollouts
    )
    names = {MISSING_SCORE: "rule 1", SAME_RESPONSE: "rule 2", TOO_LONG: "rule 3"}
    if reason := refuel_reason(first, second, LIMIT):
        return names[reason]
    chosen, reject = refuel_order(first, second)
    ids = [page(rollout.messages[: 2 * (row["h"] + 1)]) for rollout in rollouts]
    return ("second" if chosen else "first"), ids[chosen], ids[reject]


def random_row(rng: np.random.Generator) -> dict[str, Any]:
    scored = int(rng.integers(5))
    at = int(rng.integers(scored + 1))
    texts = [["abcdefg"[: rng.integers(1, 5)] for _ in range(5)] for _ in range(2)]
    texts[1][:at] = texts[0][:at]
    said = [messages_of(text) for text in texts]
    for message in [*said[0], *said[1]]:
        if message["role"] == "user":
            message["content"] = "?"
    rewards = [rng.choice([0.0, 1.0, 2.0, NO_SCORE], 5, p=[0.4, 0.3, 0.28, 0.02]) for _ in range(2)]
    return {
        "trajectory": said[0],
        "second": said[1],
        "first_reward": rewards[0].tolist(),
        "second_reward": rewards[1].tolist(),
        "len": scored,
        "h": at,
    }


def test_the_same_rows_as_the_seed_with_the_same_reasons() -> None:
    rng = np.random.default_rng(0)
    rows = [random_row(rng) for _ in range(400)]
    outcomes = [seeds_way(row) for row in rows]
    assert [our_way(row) for row in rows] == outcomes
    found = Counter(one if isinstance(one, str) else one[0] for one in outcomes)
    assert set(found) == {"rule 1", "rule 2", "rule 3", "first", "second"}
    assert min(found.values()) > 20, found
