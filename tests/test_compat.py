"""REFUEL's rules, each by hand, and all of them against the script's own order on random rows."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import stages.tokenize_masks
from multiturn import published_repo, published_row
from pipeline import store
from pipeline.chat import Chat
from pipeline.compat import (
    COMPATS,
    MISSING_SCORE,
    SAME_RESPONSE,
    TOO_LONG,
    Side,
    refuel_order,
    refuel_pairs,
    refuel_reason,
    sampled_ids,
    side_of,
)
from pipeline.errors import DataError
from pipeline.examples import Encoder, check_pair
from pipeline.records import NO_SCORE, RANKED, Message, Rollout, Turn
from pipeline.rows import rollout_row
from pipeline.selection import Rules
from play import messages_of, played
from small_repos import Config as RepoConfig
from stages.tokenize_masks import Config, main
from templates import make_tokenizer


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


def test_ids_count_through_a_turn() -> None:
    # Ids by turn: 2 + 1, 2 + 2, 2 + 3.
    rollouts = [played([[1], [2, 3], [4, 5, 6]], branch_turn=1, sample=k) for k in range(2)]
    first, second = side_of(rollouts[0], 2, sampled_ids), side_of(rollouts[1], 1, sampled_ids)
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
        side_of(rollout, last, lambda r, turn: len(page(r.messages[: 2 * (turn + 1)])))
        for rollout, last in zip(rollouts, (4, row["h"]), strict=True)
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


# Whole pairs


def no_encoder() -> Encoder:
    raise AssertionError("rows with ids need no chat template")


RULES = Rules("forked", 100, no_encoder)


def fork(sample: int, last: Sequence[int], reward: float = 0.5, **changes: Any) -> Rollout:
    """Return a dialogue of three turns that parts at the second, scored there."""
    values = {"branch_turn": 1, "score_turn": 1, "rewards": [0.0, reward, 0.0], "sample": sample}
    return played([[1, 2], last, [8] * (3 - sample)], **(values | changes))


def reasons(dropped: Sequence[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(row["sample"], row["reason"]) for row in dropped]


def test_a_tie_is_kept_with_the_second_as_chosen() -> None:
    for order in ([0, 1], [1, 0]):
        both = [fork(0, [3]), fork(1, [4, 5])]
        (pair,), dropped = refuel_pairs([both[i] for i in order], RULES)
        check_pair(pair)
        assert dropped == []
        assert (pair.chosen.sample, pair.reject.sample) == (1, 0)
        assert pair.chosen.reward == pair.reject.reward
        # Ids end with the turn that trains; messages with the score turn.
        assert pair.chosen.sequence.ids.tolist() == [10, 20, 1, 2, 11, 21, 4, 5]
        assert pair.chosen.sequence.mask.tolist() == [0] * 6 + [1] * 2
        assert len(pair.chosen.messages) == 4


def test_the_higher_reward_at_the_score_turn_is_chosen() -> None:
    (pair,), _ = refuel_pairs([fork(0, [3], 0.75), fork(1, [4], 0.5)], RULES)
    assert (pair.chosen.sample, pair.chosen.reward, pair.reject.reward) == (0, 0.75, 0.5)


def test_a_cut_turn_gets_no_end_of_turn() -> None:
    cut = fork(1, [4, 5], 0.75)
    assert cut.turns is not None
    cut.turns[1].finish_reason = "length"
    (pair,), _ = refuel_pairs([fork(0, [3]), cut], RULES)
    assert pair.chosen.sequence.ids[pair.chosen.sequence.mask == 1].tolist() == [4, 5]


def test_a_score_that_misses_after_the_score_turn_drops_both() -> None:
    bad = fork(1, [4], rewards=[0.0, 0.5, NO_SCORE])
    pairs, dropped = refuel_pairs([fork(0, [3]), bad], RULES)
    assert (pairs, reasons(dropped)) == ([], [(0, MISSING_SCORE), (1, MISSING_SCORE)])


@pytest.mark.parametrize(("limit", "kept"), [(12, 1), (11, 0)])
def test_turns_after_the_fork_count_in_the_first_dialogue_only(limit: int, kept: int) -> None:
    """The first has 2 + 2, 2 + 1 and 2 + 3 ids; the second's 20 of its last turn don't count."""
    long = fork(1, [4])
    assert long.turns is not None
    long.turns[2].response_ids = [9] * 20
    long.turns[2].logprobs = None
    pairs, dropped = refuel_pairs(
        [fork(0, [3]), long], dataclasses.replace(RULES, max_length=limit)
    )
    assert len(pairs) == kept
    assert reasons(dropped) == ([] if kept else [(0, TOO_LONG), (1, TOO_LONG)])


def test_rollouts_that_the_script_cant_have() -> None:
    failed = fork(1, [4], status="failed", end_reason="server_lost")
    pairs, dropped = refuel_pairs([fork(0, [3]), failed], RULES)
    assert (pairs, reasons(dropped)) == ([], [(0, "missing_sibling"), (1, "failed")])
    assert [row["detail"] for row in dropped] == ["sample 1: failed", "server_lost"]
    assert reasons(refuel_pairs([fork(0, [3])], RULES)[1]) == [(0, "missing_sibling")]
    unasked = fork(1, [4], rewards=[0.0, None, 0.0])
    assert reasons(refuel_pairs([fork(0, [3]), unasked], RULES)[1]) == [
        (0, "missing_sibling"),
        (1, "no_reward"),
    ]
    other = fork(1, [4])
    assert other.turns is not None
    other.turns[0].response_ids = [1, 7]
    assert {row["reason"] for row in refuel_pairs([fork(0, [3]), other], RULES)[1]} == {
        "different_prefix"
    }


def test_groups_and_rollouts_without_a_fork_are_refused() -> None:
    with pytest.raises(DataError, match="has 3 rollouts"):
        refuel_pairs([fork(k, [k]) for k in range(3)], RULES)
    with pytest.raises(DataError, match="share only the prompt"):
        refuel_pairs([fork(k, [k], branch_turn=None) for k in range(2)], RULES)


def test_text_gives_the_scripts_ids_and_masks() -> None:
    """Templates trim, and end a turn whether or not the model did: from text as there."""
    tokenizer = make_tokenizer("llama3")
    chat = Chat(tokenizer, "2026-01-01")
    said = [["Yes.", "It is so. ", "Bye."], ["Yes.", " It may be.", "No."]]
    rollouts = [
        dataclasses.replace(fork(k, [k], 0.5 + k), turns=None, messages=messages_of(texts))
        for k, texts in enumerate(said)
    ]
    (pair,), dropped = refuel_pairs(rollouts, Rules("forked", 2048, lambda: chat))
    assert dropped == []
    for member, rollout in ((pair.chosen, rollouts[1]), (pair.reject, rollouts[0])):
        page, mask = masked(rollout.messages[:4], tokenizer)
        assert member.sequence.ids.tolist() == page
        assert member.sequence.mask.tolist() == mask
        assert page[-1] == tokenizer.eos_token_id
    whole = len(tokenizer.apply_chat_template(rollouts[0].messages, return_dict=False))
    for limit, kept in ((whole, 1), (whole - 1, 0)):
        assert len(refuel_pairs(rollouts, Rules("forked", limit, lambda: chat))[0]) == kept


# The stage


def masked(messages: list[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a dialogue, and its mask: what the template adds for the last answer."""
    page = tokenizer.apply_chat_template(messages, return_dict=False)
    start = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    return page, [0] * len(start) + [1] * (len(page) - len(start))


def seeds_pairs(rollouts: Sequence[Rollout], tokenizer: Any) -> dict[str, Any]:
    """Make the script's pairs of text: by prompt, ids and masks of chosen and reject."""
    found = {}
    for one, two in zip(rollouts[::2], rollouts[1::2], strict=True):
        at, last = one.branch_turn or 0, one.score_turn
        pages = [
            tokenizer.apply_chat_template(messages, return_dict=False)
            for messages in (one.messages, two.messages[: 2 * at + 2])
        ]
        rewards = [one.rewards or [], two.rewards or []]
        if (
            any(NO_SCORE in scores for scores in rewards)
            or one.messages[2 * at + 1] == two.messages[2 * at + 1]
            or max(map(len, pages)) > LIMIT_OF_PAGES
        ):
            continue
        sides = [one, two] if (rewards[0][last] or 0) > (rewards[1][last] or 0) else [two, one]
        found[one.prompt_id] = [masked(side.messages[: 2 * at + 2], tokenizer) for side in sides]
    return found


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_stage_writes_the_scripts_rows(tmp_path: Path, num_proc: int) -> None:
    """From text every id and mask is the script's; ties, gaps and long tails are among them."""
    tokenizer = make_tokenizer("llama3")
    tokenizer.save_pretrained(tmp_path / "policy")
    rng = np.random.default_rng(1)
    rollouts = []
    for p in range(40):
        at, scored = int(rng.integers(2)), 2
        texts = [[" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(4)] for _ in "ab"]
        texts[1][:at] = texts[0][:at]
        if p % 8 == 0:
            texts[1][at] = texts[0][at]
        for k in range(2):
            rewards = rng.choice([0.0, 1.0, NO_SCORE], 4, p=[0.5, 0.45, 0.05]).tolist()
            rollouts.append(
                played(
                    [[1]] * 4,
                    prompt_id=f"p{p:02d}",
                    sample=k,
                    branch_turn=at,
                    score_turn=scored,
                    rewards=rewards,
                )
            )
            rollouts[-1].messages, rollouts[-1].turns = messages_of(texts[k]), None
    run = store.begin("rank", "ranked", RepoConfig(), str(tmp_path / "ranked"), seed=7)
    rows = pa.Table.from_pylist([rollout_row(one) for one in rollouts], schema=RANKED)
    run.write({"train": rows}, counts={})
    main(
        Config(
            input_repo=str(tmp_path / "ranked"),
            output_repo=str(tmp_path / "pairs"),
            tokenizer=str(tmp_path / "policy"),
            compat="refuel",
            ties="keep",
            max_length=LIMIT_OF_PAGES,
            test_size=3,
            num_proc=num_proc,
        )
    )
    repo = store.open_repo(str(tmp_path / "pairs"))
    assert repo.num_rows("test") == 3
    ours = {
        row["prompt_id"]: [(row[f"{side}_token"], row[f"{side}_mask"]) for side in SIDES]
        for split in ("train", "test")
        for row in repo.table(split).to_pylist()
    }
    expected = seeds_pairs(rollouts, tokenizer)
    assert ours == expected
    assert repo.manifest is not None
    told = repo.manifest["dropped"]
    assert set(told) == {MISSING_SCORE, SAME_RESPONSE, TOO_LONG}
    assert sum(told.values()) == 2 * (40 - len(expected))
    ties = [row["chosen_reward"] == row["reject_reward"] for row in repo.table("train").to_pylist()]
    assert any(ties)


def test_the_stage_needs_no_template_for_ids(tmp_path: Path) -> None:
    rollouts = [fork(0, [3]), fork(1, [4, 5])]
    run = store.begin("rank", "ranked", RepoConfig(), str(tmp_path / "ranked"), seed=7)
    rows = pa.Table.from_pylist([rollout_row(one) for one in rollouts], schema=RANKED)
    run.write({"train": rows}, counts={})
    config = Config(
        input_repo=str(tmp_path / "ranked"),
        output_repo=str(tmp_path / "pairs"),
        compat="refuel",
        ties="keep",
    )
    main(config)
    (row,) = store.open_repo(str(tmp_path / "pairs")).table("train").to_pylist()
    assert (row["chosen_sample"], row["chosen_token"]) == (1, [10, 20, 1, 2, 11, 21, 4, 5])
    assert row["chosen_mask"] == [0] * 6 + [1] * 2


LIMIT_OF_PAGES = 124
WORDS = ["yes", "no", "the answer", "it is", "forty-two", "lower"]
SIDES = ("chosen", "reject")


def test_flags_that_dont_go_with_it() -> None:
    with pytest.raises(DataError, match="goes with --mask forked --ties keep"):
        Config(input_repo="./a", output_repo="./b", compat="refuel", mask="all")
    with pytest.raises(DataError, match="known are none, refuel"):
        Config(input_repo="./a", output_repo="./b", compat="trl")


def test_published_pairs_are_pairs_already(tmp_path: Path) -> None:
    source = published_repo(tmp_path / "pub", [published_row([5, 6], [7, 8, 9])])
    with pytest.raises(DataError, match="leave out --compat"):
        main(
            Config(
                input_repo=source, output_repo=str(tmp_path / "out"), compat="refuel", ties="keep"
            )
        )


def test_the_names_are_those_of_the_stage() -> None:
    assert stages.tokenize_masks.COMPATS == COMPATS
