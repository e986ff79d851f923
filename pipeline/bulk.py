"""Select from a batch of rollouts with ids at once: columns in, columns of pairs or groups out.

Gives the rows, and drops the rollouts, that selection.py gives prompt by prompt.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import bulk_filters as rules_of
from pipeline.advantages import ADVANTAGES
from pipeline.bulk_sequences import (
    Sequences,
    ids_of,
    logprobs_of,
    mask_of,
    messages_of,
    segments_of,
    sequences_of,
    spans_at,
    spans_of,
)
from pipeline.examples import common_prefix, no_fork
from pipeline.filters import MISSING_SIBLING, NOT_EXTREME
from pipeline.ragged import Bools, Ints, bounds_of, lists
from pipeline.records import GROUPS, PAIRS, IntArray, MaskArray
from pipeline.rollout_arrays import Rollouts
from pipeline.selection import Dropped, Rules, drop, told_of

_SIFTED, _ALONE, _PAIRED = range(3)  # the rounds in which rollouts are left out


@dataclass
class Left:
    """Rollouts left out of a batch so far, each with the round, the reason and a detail."""

    rollouts: Rollouts
    prompt_of: Ints
    entries: list[tuple[int, int, int, str, str]] = field(default_factory=list)

    def add(self, step: int, rows: Ints, reasons: Iterable[Any], details: Iterable[str]) -> None:
        """Leave out rollouts."""
        prompts = self.prompt_of[rows].tolist()
        for entry in zip(prompts, rows.tolist(), reasons, details, strict=True):
            self.entries.append((entry[0], step, *entry[1:]))

    def dropped(self) -> list[tuple[int, Dropped]]:
        """Return (number of the prompt, row of dropped.jsonl), prompt by prompt."""
        self.entries.sort(key=lambda entry: entry[:3])
        rows = pa.array([entry[2] for entry in self.entries], pa.int64())
        names, samples = (
            self.rollouts.batch.column(name).take(rows).to_pylist()
            for name in ("prompt_id", "sample")
        )
        return [
            (entry[0], drop(name, sample, entry[3], entry[4]))
            for entry, name, sample in zip(self.entries, names, samples, strict=True)
        ]


@dataclass(frozen=True)
class Selection:
    """What became of a batch: its rows, the number of each row's prompt, and what is left out."""

    rows: pa.RecordBatch
    prompts: Ints
    dropped: list[tuple[int, Dropped]]


def select(batch: pa.RecordBatch, kind: str, rules: Rules) -> Selection:
    """Return the pairs or groups of whole prompts, which `rollout_arrays.typed` made.

    Rollouts of a prompt follow one another, by sample; all have ids. Raises DataError where
    `forked` is asked for and there is no fork.
    """
    rollouts = Rollouts(batch)
    left = Left(rollouts, prompts_of(batch))
    compare = ADVANTAGES[rules.advantages]
    usable = _sift(rollouts, rules, kind == "pairs" or compare is not None, left)
    if kind == "pairs":
        return _pairs(usable, rules, left)
    advantages = None
    if compare is not None:
        usable = _together(usable, left)
        advantages = np.empty(len(usable.rows))
        starts = run_starts(left.prompt_of[usable.rows])
        for a, b in zip(starts, [*starts[1:], len(usable.rows)], strict=True):
            advantages[a:b] = compare(rollouts.reward[usable.rows[a:b]].tolist())
    return Selection(_group_rows(usable, advantages), left.prompt_of[usable.rows], left.dropped())


def prompts_of(batch: pa.RecordBatch) -> Ints:
    """Number the prompts of a batch: 0 for the rows of the first, 1 for the next, ..."""
    names = batch.column("prompt_id")
    changes = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(changes)])[: len(names)].astype(np.int64)


def run_starts(values: npt.NDArray[Any]) -> list[int]:
    """Return where each run of equal values begins."""
    return np.flatnonzero(np.diff(values, prepend=-1)).tolist()


def _sift(rollouts: Rollouts, rules: Rules, needs_reward: bool, left: Left) -> Sequences:
    """Return the sequences of the rollouts that can train; leave out the others."""
    reasons = rules_of.first_reasons(rules_of.before(rollouts, needs_reward))
    sound = np.flatnonzero(reasons == None)  # noqa: E711 - elementwise
    if rules.mask == "forked" and len(bad := sound[~rollouts.has_fork[sound]]):
        raise no_fork(rollouts.batch.column("prompt_id")[int(bad[0])].as_py())
    sequences = sequences_of(rollouts, sound, rules.mask)
    marked = [
        ("empty_response", rules_of.empty_response(sequences)),
        ("too_long", rules_of.too_long(sequences, rules.max_length)),
    ]
    if rules.drop_truncated:
        marked.insert(0, ("truncated", rules_of.truncated(sequences)))
    reasons[sound] = later = rules_of.first_reasons(marked)
    lengths = dict(zip(sound.tolist(), sequences.lengths.tolist(), strict=True))
    out = np.flatnonzero(reasons != None)  # noqa: E711
    told = [_detail(rollouts, row, reasons[row], lengths) for row in out.tolist()]
    left.add(_SIFTED, out, reasons[out], told)
    return sequences.take(np.flatnonzero(later == None)) if len(out) else sequences  # noqa: E711


def _detail(rollouts: Rollouts, row: int, reason: str, lengths: dict[int, int]) -> str:
    if reason == "too_long":
        return f"{lengths[row]} ids"
    if reason in ("failed", "ended_before_fork"):
        return rollouts.batch.column("end_reason")[row].as_py() or ""
    if reason == "no_reward":
        errors = rollouts.batch.column("reward_errors")[row].as_py() or []
        turn = int(rollouts.score_turn[row])
        return (errors[turn] if turn < len(errors) else None) or ""
    return ""


def _together(usable: Sequences, left: Left) -> Sequences:
    """Keep what has a usable sibling."""
    prompts = left.prompt_of[usable.rows]
    alone = np.bincount(prompts, minlength=1)[prompts] < 2
    if not alone.any():
        return usable
    lost: dict[int, list[tuple[int, str]]] = defaultdict(list)
    samples = left.rollouts.batch.column("sample")
    for prompt, _, row, reason, _ in left.entries:
        lost[prompt].append((samples[row].as_py(), reason))
    told = [told_of(lost[prompt]) for prompt in prompts[alone].tolist()]
    left.add(_ALONE, usable.rows[alone], [MISSING_SIBLING] * len(told), told)
    return usable.take(np.flatnonzero(~alone))


@dataclass(frozen=True)
class _Side:
    """One member of every pair, with its ids and masks."""

    sequences: Sequences
    bounds: Ints
    ids: IntArray
    mask: MaskArray

    @property
    def rows(self) -> Ints:
        return self.sequences.rows


def _side(sequences: Sequences) -> _Side:
    return _Side(sequences, bounds_of(sequences.lengths), ids_of(sequences), mask_of(sequences))


def _pairs(usable: Sequences, rules: Rules, left: Left) -> Selection:
    """Pair the best rollout of each prompt with the worst."""
    usable = _together(usable, left)
    best, worst = _best_and_worst(usable, left.prompt_of)
    between = np.ones(len(usable.rows), dtype=bool)
    between[best] = between[worst] = False
    others = usable.rows[between]
    left.add(_ALONE, others, [NOT_EXTREME] * len(others), [""] * len(others))
    chosen, reject = (_side(usable.take(places)) for places in (best, worst))
    prefix = _prefix_lengths(chosen, reject)
    reasons = rules_of.first_reasons(_pair_marks(chosen, reject, prefix, rules))
    kept = np.flatnonzero(reasons == None)  # noqa: E711 - elementwise
    if len(kept) < len(best):
        out = np.flatnonzero(reasons != None)  # noqa: E711
        for side in (chosen, reject):
            left.add(_PAIRED, side.rows[out], reasons[out], [""] * len(out))
        chosen, reject = (_side(side.sequences.take(kept)) for side in (chosen, reject))
    rows = _pair_rows(chosen, reject, prefix[kept])
    return Selection(rows, left.prompt_of[chosen.rows], left.dropped())


def _best_and_worst(usable: Sequences, prompt_of: Ints) -> tuple[Ints, Ints]:
    """Return where each prompt's highest and lowest rewards are, as examples.best_and_worst."""
    starts = np.array(run_starts(prompt_of[usable.rows]), dtype=np.int64)
    if not len(starts):
        return starts, starts
    rewards = usable.rollouts.reward[usable.rows]
    counts = np.diff(starts, append=len(rewards))
    best, worst = (
        _first(rewards == np.repeat(extreme.reduceat(rewards, starts), counts), starts)
        for extreme in (np.maximum, np.minimum)
    )
    same = best == worst
    return np.where(same, starts, best), np.where(same, starts + 1, worst)


def _first(marks: Bools, starts: Ints) -> Ints:
    """Return the first marked place from each start on."""
    return np.minimum.reduceat(np.where(marks, np.arange(len(marks)), len(marks)), starts)


def _prefix_lengths(chosen: _Side, reject: _Side) -> Ints:
    """Return the length of the context that both saw at the fork, as examples.prefix_length."""
    fork = chosen.sequences.rollouts.branch_turn[chosen.rows]
    starts = [spans_at(side.sequences, fork) for side in (chosen, reject)]
    prefix = np.maximum(*starts)
    for i in np.flatnonzero(np.minimum(*starts) < 0).tolist():
        cuts = [slice(side.bounds[i], side.bounds[i + 1]) for side in (chosen, reject)]
        prefix[i] = min(
            common_prefix(chosen.ids[cuts[0]], reject.ids[cuts[1]]),
            int(chosen.mask[cuts[0]].argmax()),
            int(reject.mask[cuts[1]].argmax()),
        )
    return prefix


def _pair_marks(chosen: _Side, reject: _Side, prefix: Ints, rules: Rules) -> list[rules_of.Marked]:
    """Return the filters of pairs, in their order."""
    marked = [
        ("different_prefix", _differ(chosen, reject, prefix)),
        ("same_response", rules_of.same_response(chosen.sequences, reject.sequences)),
    ]
    if not rules.keep_ties:
        marked.append(("tie", rules_of.tie(chosen.sequences, reject.sequences)))
    return marked


def _differ(chosen: _Side, reject: _Side, prefix: Ints) -> Bools:
    ours, theirs = ((side.ids, side.mask) for side in (chosen, reject))
    return rules_of.unlike(ours, chosen.bounds, theirs, reject.bounds, prefix)


def _pair_rows(chosen: _Side, reject: _Side, prefix: Ints) -> pa.RecordBatch:
    batch = chosen.sequences.rollouts.batch
    rows = pa.array(chosen.rows)
    columns = {
        **{name: batch.column(name).take(rows) for name in ("prompt_id", "branch_turn")},
        "score_turn": batch.column("score_turn").take(rows),
        "prefix_length": pa.array(prefix, pa.int32()),
    }
    for name, side in (("chosen", chosen), ("reject", reject)):
        columns[name] = messages_of(side.sequences)
        columns |= {f"{name}_{k}": column for k, column in _member_columns(side).items()}
    return pa.RecordBatch.from_arrays([columns[name] for name in PAIRS.names], schema=PAIRS)


def _member_columns(side: _Side) -> dict[str, pa.Array]:
    rollouts, rows = side.sequences.rollouts, pa.array(side.rows)
    reward = rollouts.reward[side.rows]
    return {
        "sample": rollouts.batch.column("sample").take(rows),
        "token": lists(side.bounds, side.ids),
        "mask": lists(side.bounds, side.mask),
        "segments": segments_of(side.sequences),
        "spans": spans_of(side.sequences),
        "reward": pa.array(reward, mask=np.isnan(reward)),
        "sample_logprob": logprobs_of(side.sequences),
    }


def _group_rows(usable: Sequences, advantages: npt.NDArray[np.float64] | None) -> pa.RecordBatch:
    columns = _member_columns(_side(usable))
    columns["prompt_id"] = usable.rollouts.batch.column("prompt_id").take(pa.array(usable.rows))
    if advantages is None:
        columns["advantage"] = pa.nulls(len(usable.rows), GROUPS.field("advantage").type)
    else:
        repeated = np.repeat(advantages.astype(np.float32), usable.trained)
        columns["advantage"] = lists(bounds_of(usable.trained), repeated)
    return pa.RecordBatch.from_arrays([columns[name] for name in GROUPS.names], schema=GROUPS)
