import dataclasses

import numpy as np
import pytest

from pipeline.chat import Chat
from pipeline.errors import DataError
from pipeline.examples import (
    best_and_worst,
    check_pair,
    check_sequence,
    group_of,
    member_of,
    pair_of,
    prefix_length,
    sample_logprob,
    sequence_of,
    trained_turns,
)
from pipeline.records import PairExample, Rollout, Segment, Span, TrainingSequence
from play import messages_of, played
from templates import make_tokenizer


def drawn(sequence: TrainingSequence) -> str:
    """Draw ids with the trained ones in brackets."""
    return " ".join(
        f"[{i}]" if m else str(i) for i, m in zip(sequence.ids, sequence.mask, strict=True)
    )


def tokenized(rollout: Rollout, mask: str) -> TrainingSequence:
    return sequence_of(rollout, trained_turns(rollout, mask), None)


THREE = played([[1, 2], [3, 4], [5]])


def test_forked_trains_turn_h_after_its_context() -> None:
    sequence = tokenized(dataclasses.replace(THREE, branch_turn=1), "forked")
    assert drawn(sequence) == "10 20 1 2 11 21 [3] [4]"
    assert sequence.segments == [Segment(0, 8, 0)]
    assert sequence.spans == [Span(0, 2, 4), Span(1, 6, 8)]
    assert sequence.ids.dtype == np.int32
    assert sequence.mask.dtype == np.uint8


def test_last_trains_the_score_turn() -> None:
    rollout = dataclasses.replace(THREE, score_turn=1)
    assert drawn(tokenized(rollout, "last")) == "10 20 1 2 11 21 [3] [4]"


def test_all_of_a_dialogue_that_only_grows_is_one_segment() -> None:
    sequence = tokenized(THREE, "all")
    assert drawn(sequence) == "10 20 [1] [2] 11 21 [3] [4] 12 22 [5]"
    assert sequence.segments == [Segment(0, 11, 0)]
    assert sequence.spans == [Span(0, 2, 4), Span(1, 6, 8), Span(2, 10, 11)]


def test_a_rewritten_context_opens_a_segment() -> None:
    # Turn 1 keeps 2 ids of turn 0's context of 4; turn 2 appends to turn 1's context.
    rollout = played([[1, 2], [3, 4], [5]], keeps=[0, 2, 6])
    sequence = tokenized(rollout, "all")
    assert drawn(sequence) == "10 20 [1] [2] 11 21 [3] [4] 12 22 [5]"
    assert sequence.segments == [Segment(0, 4, 0), Segment(4, 7, 2)]
    check_sequence(sequence, "row")
    # What turn 2 saw: the first 2 ids, then everything since.
    flat = tokenized(rollout, "last")
    assert drawn(flat) == "10 20 11 21 3 4 12 22 [5]"
    assert flat.segments == [Segment(0, 9, 0)]
    assert flat.spans == [Span(1, 4, 6), Span(2, 8, 9)]
    check_sequence(flat, "row")


def test_each_segment_rebuilds_what_the_policy_saw() -> None:
    rollout = played([[1, 2], [3, 4], [5], [6]], keeps=[0, 3, 5, 2])
    assert rollout.turns is not None
    sequence = tokenized(rollout, "all")
    context: list[int] = []
    for segment, turn in zip(sequence.segments, rollout.turns, strict=True):
        ids = sequence.ids[segment.start : segment.start + segment.length].tolist()
        context = context[: segment.keep] + ids
        assert context[: -len(turn.response_ids)][-2:] == turn.prompt_ids
        assert segment.keep == turn.keep
    flat = sequence_of(rollout, [3], None)
    assert context == flat.ids.tolist()


def test_forked_needs_a_fork() -> None:
    with pytest.raises(DataError, match="--mask last or --mask all"):
        trained_turns(THREE, "forked")


def test_sample_logprobs_follow_the_mask() -> None:
    assert sample_logprob(THREE, [1]) is not None
    np.testing.assert_array_equal(sample_logprob(THREE, [1]), np.array([-2, -3], np.float32))
    np.testing.assert_array_equal(
        sample_logprob(THREE, [0, 1, 2]), np.array([0, -1, -2, -3, -4], np.float32)
    )
    assert THREE.turns is not None
    without = dataclasses.replace(
        THREE, turns=[THREE.turns[0], dataclasses.replace(THREE.turns[1], logprobs=None)]
    )
    assert sample_logprob(without, [0, 1]) is None
    assert sample_logprob(without, [0]) is not None


def forked_pair() -> PairExample:
    left = played([[1, 2], [3, 4], [5]], branch_turn=1, rewards=[0.0, 0.0, 0.25])
    right = played([[1, 2], [3, 9, 9], [6]], branch_turn=1, sample=1, rewards=[0.0, 0.0, 0.75])
    members = [member_of(r, [1], tokenized(r, "forked")) for r in (left, right)]
    return pair_of(right, members[1], members[0])


def test_a_refuel_pair() -> None:
    pair = forked_pair()
    assert drawn(pair.chosen.sequence) == "10 20 1 2 11 21 [3] [9] [9]"
    assert drawn(pair.reject.sequence) == "10 20 1 2 11 21 [3] [4]"
    # The fork, not the first id that differs.
    assert pair.prefix_length == 6
    assert (pair.chosen.reward, pair.reject.reward) == (0.75, 0.25)
    assert (pair.chosen.sample, pair.reject.sample) == (1, 0)
    # Messages go on to the score turn.
    assert [m["content"] for m in pair.chosen.messages][1::2] == ["[1, 2]", "[3, 9, 9]", "[6]"]
    check_pair(pair, vocabulary=23)


def test_messages_end_with_the_score_turn() -> None:
    rollout = dataclasses.replace(THREE, score_turn=1)
    member = member_of(rollout, [1], tokenized(rollout, "last"))
    assert member.messages == rollout.messages[:4]
    assert member.reward == 1.0


def test_the_prefix_of_independent_rollouts_is_the_prompt() -> None:
    left, right = tokenized(THREE, "all"), tokenized(played([[1, 2], [8]]), "all")
    assert prefix_length(left, right, 0) == 2


def test_the_prefix_where_a_rewritten_context_dropped_the_fork() -> None:
    left = tokenized(played([[1, 2], [3]], keeps=[0, 1]), "last")
    right = tokenized(played([[1, 2], [4, 5]], keeps=[0, 1]), "last")
    assert drawn(left) == "10 11 21 [3]"
    assert prefix_length(left, right, 0) == 3


def test_best_and_worst() -> None:
    assert best_and_worst([0.5, 2.0, -1.0, 2.0]) == (1, 2)
    assert best_and_worst([0.0, 0.0]) == (0, 1)


def test_an_advantage_is_repeated_for_each_trained_id() -> None:
    example = group_of(THREE, [0, 1, 2], tokenized(THREE, "all"), -0.5)
    np.testing.assert_array_equal(example.advantage, np.full(5, -0.5, np.float32))
    assert example.reward == 2.0
    assert group_of(THREE, [0], tokenized(THREE, "all"), None).advantage is None


def test_text_is_encoded_with_spans_and_one_bos() -> None:
    chat = Chat(make_tokenizer("llama3"), "2024-12-24")
    rollout = dataclasses.replace(
        THREE, turns=None, messages=messages_of(["Hello there.", "Forty-two.", "Bye."])
    )
    sequence = sequence_of(rollout, [1], chat)
    check_sequence(sequence, "row", len(chat.tokenizer))
    said = sequence.ids[sequence.mask == 1]
    assert chat.tokenizer.decode(said.tolist()) == "Forty-two.<|eot_id|>"
    assert (sequence.ids == chat.tokenizer.bos_token_id).sum() == 1
    assert sequence.mask[-1] == 1
    both = sequence_of(rollout, [0, 1], chat)
    assert chat.tokenizer.decode(both.ids[both.mask == 1].tolist()) == (
        "Hello there.<|eot_id|>Forty-two.<|eot_id|>"
    )


def broken(**changes: object) -> TrainingSequence:
    return dataclasses.replace(tokenized(THREE, "all"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "sequence"),
    [
        ("no id trains", broken(mask=np.zeros(11, np.uint8))),
        ("12 entries for 11 ids", broken(mask=np.ones(12, np.uint8))),
        ("the first id trains", broken(mask=np.ones(11, np.uint8))),
        ("id 4 trains but was not sampled", broken(mask=np.eye(11, dtype=np.uint8)[4])),
        ("cover 10 of 11", broken(segments=[Segment(0, 10, 0)])),
        ("doesn't follow", broken(segments=[Segment(0, 4, 0), Segment(5, 6, 4)])),
        ("keeps 5 of 4", broken(segments=[Segment(0, 4, 0), Segment(4, 7, 5)])),
        ("turn 1, 3 to 8, is misplaced", broken(spans=[Span(0, 2, 4), Span(1, 3, 8)])),
        ("ids from 1 to 22", broken()),
    ],
)
def test_a_broken_row_is_named(problem: str, sequence: TrainingSequence) -> None:
    with pytest.raises(DataError, match=f"prompt p, sample 0: .*{problem}"):
        check_sequence(sequence, "prompt p, sample 0", vocabulary=22)


def test_a_pair_that_shares_no_prefix_is_named() -> None:
    pair = forked_pair()
    with pytest.raises(DataError, match="samples 1 and 0: their first 8 ids are not the same"):
        check_pair(dataclasses.replace(pair, prefix_length=8))


def test_logprobs_of_another_length_are_named() -> None:
    pair = forked_pair()
    pair.chosen.sample_logprob = np.zeros(1, np.float32)
    with pytest.raises(DataError, match=r"chosen_sample_logprob\): 1 numbers"):
        check_pair(pair)
