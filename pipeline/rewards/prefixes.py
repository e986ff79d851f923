"""Rollouts -> the prefixes to score, for reward models that are given each by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.records import Rollout
from pipeline.rewards.base import TOO_LONG, Scored, blank
from pipeline.rewards.encoding import Encoder


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a reward model reads for one score: the ids up to the end of a turn of rollout `row`."""

    row: int
    turn: int
    ids: list[int]


def prefixes(
    encoder: Encoder,
    rollouts: Sequence[Rollout],
    turns: Sequence[Sequence[int]],
    max_length: int,
    separate: bool,
) -> tuple[list[Scored], list[Prefix]]:
    """Return results that hold the reasons why turns have no score, and the prefixes of the others.

    Those of a rollout are neighbours, the shortest first. `separate`: each is encoded by itself,
    because the template writes earlier turns anew when a dialogue goes on.
    """
    results, jobs = [], []
    for row, (rollout, asked) in enumerate(zip(rollouts, turns, strict=True)):
        scored, scorable = blank(rollout, asked)
        results.append(scored)
        groups = [[turn] for turn in scorable] if separate else [scorable]
        jobs += [(row, group) for group in groups if group]
    found: list[Prefix] = []
    while jobs:
        encoded = encoder.encode_all([(rollouts[row], group) for row, group in jobs])
        again: list[tuple[int, list[int]]] = []
        for (row, group), one in zip(jobs, encoded, strict=True):
            if not isinstance(one, str):
                ids, lengths = one
                found += [Prefix(row, turn, ids[:length]) for turn, length in lengths.items()]
            elif len(group) == 1:
                results[row].errors[group[0]] = one
            else:
                # A later turn must not cost an earlier one its score.
                again += [(row, [turn]) for turn in group]
        jobs = again
    for prefix in found:
        if len(prefix.ids) > max_length:
            results[prefix.row].errors[prefix.turn] = TOO_LONG
    kept = [prefix for prefix in found if len(prefix.ids) <= max_length]
    return results, sorted(kept, key=lambda prefix: (prefix.row, prefix.turn))
