"""REFUEL's own rules for pairs, in its order: what `tokenize_masks --compat refuel` keeps.

    refuel_pairs(rollouts, rules)           -> (pairs, dropped), as selection.select_pairs
    side_of(rollout, last, count) -> Side   what the rules read of one rollout
    refuel_reason(first, second, most)      -> the first rule that drops the pair | None
    refuel_order(first, second)             -> places of (chosen, reject): (0, 1) or (1, 0)

`first` is the sample with the lower number, the dialogue that was played to the end; `second` parts
from it at policy turn h. The rules are those of REFUEL's setting_one/tokenize_mask.py
(https://github.com/ZhaolinGao/REFUEL), which drops a pair

1. where any reward of either dialogue is -99999, at turns that nothing reads too;
2. where both say the same at turn h, compared as text;
3. where the first dialogue, all its turns, or the second up to turn h has too many ids.

What is left is a pair whatever its rewards: the higher one at the score turn is chosen, of equals
the second, with a target of 0. Turn h trains, in the dialogue up to its end.

What can't be the same:

- Its dialogues go on to the last turn, and it scores every turn. For rules 1 and 3 to see what they
  saw there, play with `generate --full_dialogues` and score with `rank --turns all`.
- It encodes the dialogues' text anew, trimmed by the template. Sampled ids stay as they are here,
  and so do the counts of rule 3; text without ids is encoded as there, where a span can be proven.
- Its template ends every turn with an end-of-turn token, which trains, also where the turn was cut
  by the length limit. None is forged into sampled ids: a cut turn ends with its last sampled id.
- Its test split of 500 rows is drawn without a seed; `--test_size 500` is as large, and seeded.
- Rollouts that it can't have (failed, ended before turn h, alone) are dropped before its rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from pipeline import filters
from pipeline.errors import DataError, RowError
from pipeline.examples import Encoder, member_of, no_fork, pair_of, sequence_of
from pipeline.filters import policy_messages
from pipeline.records import NO_SCORE, Member, Message, PairExample, Rollout
from pipeline.selection import Dropped, Rules, drop, told_of

COMPATS = ("none", "refuel")

MISSING_SCORE = "no_score_at_some_turn"
SAME_RESPONSE = "same_response"
TOO_LONG = "too_long"

Count: TypeAlias = Callable[[Rollout, int], int]
"""(rollout, turn) -> ids of the dialogue through the end of that policy turn."""


Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Side:
    """What the rules read of a rollout: `said` at turn h; `ids` as rule 3 counts them.

    `rewards` are those of all turns, as rank wrote them.
    """

    rewards: Sequence[float | None]
    score_turn: int
    said: Message
    ids: int


def refuel_pairs(
    rollouts: Sequence[Rollout], rules: Rules
) -> tuple[list[PairExample], list[Dropped]]:
    """Pair the two rollouts of a prompt by REFUEL's rules. DataError for a larger group."""
    if len(rollouts) > 2:
        raise DataError(
            f"prompt {rollouts[0].prompt_id} has {len(rollouts)} rollouts: --compat refuel pairs "
            "two, which generate --plan refuel plays"
        )
    ordered = sorted(rollouts, key=lambda rollout: rollout.sample)
    lost = dict[int, tuple[str, str]]()
    sides = _read(ordered, lambda one: _sound_side(one, one is ordered[0], rules), lost)
    if len(sides) < 2:
        return [], _left_out(ordered, lost)
    if reason := refuel_reason(sides[0], sides[1], rules.max_length):
        return [], _both_out(ordered, reason)
    members = _read(ordered, lambda one: _member(one, rules), lost)
    if len(members) < 2:
        return [], _left_out(ordered, lost)
    better, worse = refuel_order(sides[0], sides[1])
    pair = pair_of(ordered[better], members[better], members[worse])
    if reason := filters.different_prefix(pair.chosen, pair.reject, pair.prefix_length):
        return [], _both_out(ordered, reason)
    return [pair], []


def _read(
    rollouts: Sequence[Rollout], read: Callable[[Rollout], Read], lost: dict[int, tuple[str, str]]
) -> list[Read]:
    """Read each rollout; those that can't be are `lost`, with the reason and its detail."""
    found = []
    for rollout in rollouts:
        try:
            found.append(read(rollout))
        except RowError as error:
            lost[rollout.sample] = error.reason, error.detail
    return found


def _sound_side(rollout: Rollout, whole: bool, rules: Rules) -> Side:
    """Read a rollout. Raises RowError for what the script can't have, or text without spans."""
    if reason := filters.rollout_reason(rollout, needs_reward=False):
        ended = reason in ("failed", "ended_before_fork")
        raise RowError(reason, rollout.end_reason if ended else "")
    if rollout.branch_turn is None:
        raise no_fork(rollout.prompt_id)
    last = len(policy_messages(rollout)) - 1 if whole else rollout.branch_turn
    return side_of(rollout, last, sampled_ids if rollout.turns else counting(rules.encoder()))


def counting(encoder: Encoder) -> Count:
    """Count the ids of text by its chat template."""

    def count(rollout: Rollout, turn: int) -> int:
        end = policy_messages(rollout)[turn] + 1
        return len(encoder.encode_dialogue(rollout.messages[:end], rollout.tools)[0])

    return count


def _member(rollout: Rollout, rules: Rules) -> Member:
    """Encode what trains. Raises RowError where nothing does, or there is no score for it."""
    assert rollout.branch_turn is not None, "rows without a fork were refused"
    if reason := filters.no_reward(rollout):
        raise RowError(reason)
    trained = [rollout.branch_turn]
    encoder = rules.encoder() if rollout.turns is None else None
    sequence = sequence_of(rollout, trained, encoder)
    if reason := filters.empty_response(sequence):
        raise RowError(reason)
    return member_of(rollout, trained, sequence)


def _left_out(rollouts: Sequence[Rollout], lost: dict[int, tuple[str, str]]) -> list[Dropped]:
    """Give each rollout its reason; one without is alone."""
    alone = filters.MISSING_SIBLING, told_of((k, reason) for k, (reason, _) in lost.items())
    return [
        drop(rollout.prompt_id, rollout.sample, *lost.get(rollout.sample, alone))
        for rollout in rollouts
    ]


def _both_out(rollouts: Sequence[Rollout], reason: str) -> list[Dropped]:
    return [drop(rollout.prompt_id, rollout.sample, reason) for rollout in rollouts]


def side_of(rollout: Rollout, last: int, count: Count) -> Side:
    """Read a rollout with a fork; its ids count through policy turn `last`."""
    fork = rollout.branch_turn
    assert fork is not None, "REFUEL's pairs part at a turn"
    said = rollout.messages[policy_messages(rollout)[fork]]
    return Side(rollout.rewards or [], rollout.score_turn, said, count(rollout, last))


def sampled_ids(rollout: Rollout, turn: int) -> int:
    """Count what the policy saw and said at a turn: the ids that were sampled, none forged."""
    assert rollout.turns is not None, "text has no sampled ids"
    length = 0
    for one in rollout.turns[: turn + 1]:
        length = one.keep + len(one.prompt_ids) + len(one.response_ids)
    return length


def refuel_reason(first: Side, second: Side, max_length: int) -> str | None:
    """Return the first of the rules that drops a pair."""
    return (
        missing_score(first, second)
        or same_answer(first, second)
        or too_long(first, second, max_length)
    )


def missing_score(first: Side, second: Side) -> str | None:
    """Name a pair with a score that was asked for and isn't there, at whichever turn."""
    found = any(reward == NO_SCORE for side in (first, second) for reward in side.rewards)
    return MISSING_SCORE if found else None


def same_answer(first: Side, second: Side) -> str | None:
    """Name a pair that says the same where it parts; ids may differ where the text doesn't."""
    return SAME_RESPONSE if _spoken(first.said) == _spoken(second.said) else None


def _spoken(message: Message) -> dict[str, object]:
    # An absent field, a null and an empty text are the same to a template.
    return {name: value for name, value in message.items() if value}


def too_long(first: Side, second: Side, max_length: int) -> str | None:
    """Name a pair of which a dialogue has more ids than the limit, as Side counts them."""
    return TOO_LONG if max(first.ids, second.ids) > max_length else None


def refuel_order(first: Side, second: Side) -> tuple[int, int]:
    """Return the places of chosen and reject; of equals the second is chosen."""
    left, right = (side.rewards[side.score_turn] for side in (first, second))
    assert left is not None and right is not None, "both have a score where it trains"
    return (0, 1) if left > right else (1, 0)
