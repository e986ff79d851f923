import dataclasses
from collections.abc import Sequence

import pytest

from pipeline.chat import Chat
from pipeline.examples import Encoder
from pipeline.records import NO_SCORE, Rollout
from pipeline.selection import Rules, select_group, select_pairs
from play import messages_of, played
from templates import make_tokenizer


def no_encoder() -> Encoder:
    raise AssertionError("rows with ids need no chat template")


FORKED = Rules("forked", 100, no_encoder)
ALL = Rules("all", 100, no_encoder, advantages="normalised")


def fork(sample: int, response: Sequence[int], reward: float, **changes: object) -> Rollout:
    rollout = played([[1, 2], response], branch_turn=1, sample=sample, rewards=[0.0, reward])
    return dataclasses.replace(rollout, **changes)  # type: ignore[arg-type]


def reasons(dropped: Sequence[dict[str, object]]) -> list[tuple[object, object]]:
    return [(row["sample"], row["reason"]) for row in dropped]


def test_the_higher_reward_is_chosen_whatever_the_order() -> None:
    for rollouts in (
        [fork(0, [3], 0.5), fork(1, [4], 0.75)],
        [fork(1, [4], 0.75), fork(0, [3], 0.5)],
    ):
        pairs, dropped = select_pairs(rollouts, FORKED)
        assert dropped == []
        assert [(p.chosen.sample, p.reject.sample) for p in pairs] == [(1, 0)]


def test_a_tie_and_equal_responses_drop_both() -> None:
    pairs, dropped = select_pairs([fork(0, [3], 0.5), fork(1, [4], 0.5)], FORKED)
    assert (pairs, reasons(dropped)) == ([], [(0, "tie"), (1, "tie")])
    pairs, dropped = select_pairs([fork(0, [3], 0.5), fork(1, [3], 0.75)], FORKED)
    assert (pairs, reasons(dropped)) == ([], [(0, "same_response"), (1, "same_response")])


def test_members_that_part_before_the_fork_are_no_pair() -> None:
    other = played([[1, 9], [4]], branch_turn=1, sample=1, rewards=[0.0, 1.0])
    pairs, dropped = select_pairs([fork(0, [3], 0.5), other], FORKED)
    assert (pairs, reasons(dropped)) == ([], [(0, "different_prefix"), (1, "different_prefix")])


def test_the_survivor_says_what_happened_to_its_sibling() -> None:
    pairs, dropped = select_pairs([fork(0, [3], 0.5), fork(1, [4], NO_SCORE)], FORKED)
    assert pairs == []
    assert reasons(dropped) == [(1, "no_reward"), (0, "missing_sibling")]
    assert dropped[1]["detail"] == "sample 1: no_reward"


def test_the_reason_for_a_missing_score_is_kept() -> None:
    rollout = fork(0, [3], NO_SCORE, reward_errors=[None, "too_long"])
    _, dropped = select_pairs([rollout], FORKED)
    assert dropped == [{"prompt_id": "p", "sample": 0, "reason": "no_reward", "detail": "too_long"}]


def test_a_rollout_that_ended_before_the_fork() -> None:
    early = fork(0, [3], 0.5, branch_turn=2, status="ended_early", end_reason="no_question")
    _, dropped = select_pairs([early], FORKED)
    assert dropped[0]["reason"] == "ended_before_fork"
    assert dropped[0]["detail"] == "no_question"


def test_too_long_counts_what_is_trained_and_not_what_comes_later() -> None:
    # Ids up to the fork: 2 + 2 + 2 + 3; the turn after it doesn't count.
    long = played([[1, 2], [3, 4, 5], [6] * 50], branch_turn=1, rewards=[0.0, 0.0, 1.0])
    short = played([[1, 2], [4]], branch_turn=1, sample=1, rewards=[0.0, 0.0])
    pairs, _ = select_pairs([long, short], dataclasses.replace(FORKED, max_length=9))
    assert len(pairs[0].chosen.sequence.ids) == 9
    pairs, dropped = select_pairs([long, short], dataclasses.replace(FORKED, max_length=8))
    assert (pairs, reasons(dropped)) == ([], [(0, "too_long"), (1, "missing_sibling")])


def test_truncated_is_kept_unless_asked() -> None:
    cut = fork(0, [3], 0.5)
    assert cut.turns is not None
    cut.turns[1].finish_reason = "length"
    assert len(select_pairs([cut, fork(1, [4], 0.75)], FORKED)[0]) == 1
    rules = dataclasses.replace(FORKED, drop_truncated=True)
    _, dropped = select_pairs([cut, fork(1, [4], 0.75)], rules)
    assert reasons(dropped) == [(0, "truncated"), (1, "missing_sibling")]


def test_dpo_takes_the_best_against_the_worst() -> None:
    rollouts = [
        played([[i + 1]], sample=i, rewards=[reward])
        for i, reward in enumerate([0.5, 2.0, 1.0, -1.0])
    ]
    pairs, dropped = select_pairs(rollouts, dataclasses.replace(FORKED, mask="last"))
    assert [(p.chosen.sample, p.reject.sample) for p in pairs] == [(1, 3)]
    assert reasons(dropped) == [(0, "neither_best_nor_worst"), (2, "neither_best_nor_worst")]


def test_a_group_has_advantages_over_its_usable_rollouts() -> None:
    rollouts = [
        played([[1], [2]], sample=i, rewards=[0.0, reward])
        for i, reward in enumerate([1.0, 2.0, 3.0, NO_SCORE])
    ]
    group, dropped = select_group(rollouts, ALL)
    assert reasons(dropped) == [(3, "no_reward")]
    expected = [-1 / 1.0001, 0.0, 1 / 1.0001]
    for example, advantage in zip(group, expected, strict=True):
        assert example.advantage is not None
        assert example.advantage.tolist() == pytest.approx([advantage] * 2, rel=1e-6)


def test_a_group_of_one_has_no_advantage() -> None:
    group, dropped = select_group([played([[1]])], ALL)
    assert (group, reasons(dropped)) == ([], [(0, "missing_sibling")])


def test_sft_needs_neither_rewards_nor_siblings() -> None:
    rollout = played([[1], [2]], rewards=None)
    group, dropped = select_group([rollout], dataclasses.replace(ALL, advantages="none"))
    assert dropped == []
    assert (group[0].reward, group[0].advantage) == (None, None)


def test_text_is_encoded_and_a_bad_span_is_a_reason() -> None:
    chat = Chat(make_tokenizer("plain"), "2024-12-24")
    rules = Rules("all", 500, lambda: chat)
    said = [["Yes.", "No."], ["the", "No."]]
    rollouts = [
        dataclasses.replace(
            played([[1], [2]], sample=i, branch_turn=None), turns=None, messages=messages_of(texts)
        )
        for i, texts in enumerate(said)
    ]
    group, dropped = select_group(rollouts, rules)
    assert reasons(dropped) == [(1, "span_unproven")]
    ids = group[0].sequence.ids[group[0].sequence.mask == 1]
    assert chat.tokenizer.decode(ids.tolist()) == "Yes.No."
