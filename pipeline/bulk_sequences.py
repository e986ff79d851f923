"""What rollouts train on, for a batch at once: pieces of their turns, gathered into ids and masks.

Gives what examples.py gives rollout by rollout. Axes: N rollouts, P pieces: the turns (up to the
last trained one) of which the sequence holds ids.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ragged import Bools, Ints, anywhere, bounds_of, lists, owners, ranges, sums
from pipeline.records import IntArray
from pipeline.rollout_arrays import Rollouts

_ENDLESS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Sequences:
    """The sequences of some rollouts, in pieces: prompt ids and response ids of a turn each."""

    rollouts: Rollouts
    rows: Ints
    flat: bool
    """Whether one turn trains, so that the sequence is its context and it: a single segment."""
    bounds: Ints
    turn_P: Ints
    """The turn's place among all turns."""
    index_P: Ints
    """The turn's number in its rollout."""
    prompt_P: Ints
    """How many of its prompt ids the sequence holds; a rewritten context may have lost some."""
    response_P: Ints
    trained_P: Bools

    @property
    def lengths(self) -> Ints:
        return sums(self.prompt_P + self.response_P, self.bounds)

    @property
    def trained(self) -> Ints:
        """How many ids train."""
        return sums(np.where(self.trained_P, self.response_P, 0), self.bounds)

    @property
    def start_P(self) -> Ints:
        """Where each piece begins in its sequence."""
        ends = np.cumsum(self.prompt_P + self.response_P)
        starts = ends - self.prompt_P - self.response_P
        firsts = np.concatenate([starts, [0]])[self.bounds[:-1]]
        return starts - np.repeat(firsts, np.diff(self.bounds))

    @property
    def span_P(self) -> Bools:
        """Which pieces hold their turn's answer whole, so that it is what was sampled."""
        whole = np.diff(self.rollouts.turns.responses)[self.turn_P] == self.response_P
        prompts = np.diff(self.rollouts.turns.prompts)[self.turn_P] == self.prompt_P
        return whole & prompts

    def take(self, places: npt.NDArray[np.int64]) -> "Sequences":
        """Return the sequences at these places, in this order."""
        counts = np.diff(self.bounds)[places]
        pieces = ranges(self.bounds[places], counts)
        return replace(
            self,
            rows=self.rows[places],
            bounds=bounds_of(counts),
            turn_P=self.turn_P[pieces],
            index_P=self.index_P[pieces],
            prompt_P=self.prompt_P[pieces],
            response_P=self.response_P[pieces],
            trained_P=self.trained_P[pieces],
        )


def sequences_of(rollouts: Rollouts, rows: Ints, mask: str) -> Sequences:
    """Return what these rollouts train on: `mask` as in examples.py. They must have ids."""
    last = (rollouts.branch_turn if mask == "forked" else rollouts.score_turn)[rows]
    bounds = bounds_of(last + 1)
    turn_P = ranges(rollouts.turns.bounds[:-1][rows], last + 1)
    index_P = ranges(np.zeros_like(last), last + 1)
    prompt_P = np.diff(rollouts.turns.prompts)[turn_P]
    response_P = np.diff(rollouts.turns.responses)[turn_P]
    flat = mask != "all"
    trained_P = index_P == np.repeat(last, last + 1) if flat else np.ones(len(turn_P), dtype=bool)
    if flat:
        left = _surviving(rollouts, turn_P, bounds)
        prompt_P, response_P = np.minimum(prompt_P, left), np.clip(left - prompt_P, 0, response_P)
    return Sequences(rollouts, rows, flat, bounds, turn_P, index_P, prompt_P, response_P, trained_P)


def _surviving(rollouts: Rollouts, turn_P: Ints, bounds: Ints) -> Ints:
    """Return how many of each turn's ids no later context of its rollout cut off."""
    turns = rollouts.turns
    keep_P, size_P = turns.keep_T[turn_P], turns.size_T[turn_P]
    left = size_P - keep_P
    broken = np.flatnonzero(anywhere(keep_P != turns.seen_T[turn_P], bounds))
    for row in broken.tolist():
        start, end = bounds[row], bounds[row + 1]
        later = np.append(keep_P[start + 1 : end], _ENDLESS)
        lowest = np.minimum.accumulate(later[::-1])[::-1]
        left[start:end] = np.clip(lowest - keep_P[start:end], 0, left[start:end])
    return left


def ids_of(sequences: Sequences) -> IntArray:
    """Return the ids of the sequences, one after the other."""
    turns = sequences.rollouts.turns
    starts = _interleaved(
        turns.prompts[:-1][sequences.turn_P], turns.responses[:-1][sequences.turn_P]
    )
    lengths = _interleaved(sequences.prompt_P, sequences.response_P)
    return turns.ids[ranges(starts, lengths)]


def mask_of(sequences: Sequences) -> npt.NDArray[np.uint8]:
    """Return the masks, one after the other."""
    trains = sequences.trained_P.astype(np.uint8)
    lengths = _interleaved(sequences.prompt_P, sequences.response_P)
    return np.repeat(_interleaved(np.zeros_like(trains), trains), lengths)


def _interleaved(left: npt.NDArray[np.generic], right: npt.NDArray[np.generic]) -> Ints:
    return np.stack([left, right], axis=1).reshape(-1)


def trained_ids(sequences: Sequences) -> IntArray:
    """Return the ids that train, one sequence after the other."""
    turns, trains = sequences.rollouts.turns, sequences.trained_P
    starts = turns.responses[:-1][sequences.turn_P[trains]]
    return turns.ids[ranges(starts, sequences.response_P[trains])]


def spans_of(sequences: Sequences) -> pa.Array:
    """Return the spans column."""
    held = sequences.span_P
    start = (sequences.start_P + sequences.prompt_P)[held]
    values = pa.StructArray.from_arrays(
        [
            pa.array(part, pa.int32())
            for part in (sequences.index_P[held], start, start + sequences.response_P[held])
        ],
        names=["turn", "start", "end"],
    )
    return lists(bounds_of(sums(held, sequences.bounds)), values)


def segments_of(sequences: Sequences) -> pa.Array:
    """Return the segments column: a segment for each context that isn't the last one continued."""
    size, bounds = sequences.lengths, sequences.bounds
    if sequences.flat:
        start, length, keep = np.zeros_like(size), size, np.zeros_like(size)
        counts = np.ones_like(size)
    else:
        turns = sequences.rollouts.turns
        kept = turns.keep_T[sequences.turn_P]
        opens = (sequences.index_P == 0) | (kept != turns.seen_T[sequences.turn_P])
        start, keep = sequences.start_P[opens], kept[opens]
        counts = sums(opens, bounds)
        ends = np.append(start[1:], 0)
        ends[np.cumsum(counts) - 1] = size
        length = ends - start
    values = pa.StructArray.from_arrays(
        [pa.array(part, pa.int32()) for part in (start, length, keep)],
        names=["start", "length", "keep"],
    )
    return lists(bounds_of(counts), values)


def logprobs_of(sequences: Sequences) -> pa.Array:
    """Return the engine's log-prob of each trained id; null where a trained turn has none."""
    turns, trains = sequences.rollouts.turns, sequences.trained_P
    lacks = anywhere(trains & ~turns.has_logprobs_T[sequences.turn_P], sequences.bounds)
    wanted = trains & ~np.repeat(lacks, np.diff(sequences.bounds))
    counts = np.where(wanted, sequences.response_P, 0)
    starts = turns.logprobs[:-1][sequences.turn_P[wanted]]
    values = turns.logprob_values[ranges(starts, counts[wanted])]
    return lists(bounds_of(sums(counts, sequences.bounds)), values, lacks)


def messages_of(sequences: Sequences) -> pa.Array:
    """Return the messages of each rollout up to its score turn."""
    rollouts, rows = sequences.rollouts, sequences.rows
    said = rollouts.messages
    starts = said.bounds[:-1][rows]
    ends = said.policy[said.policy_bounds[:-1][rows] + rollouts.score_turn[rows]] + 1
    return lists(bounds_of(ends - starts), said.flat.take(pa.array(ranges(starts, ends - starts))))


def spans_at(sequences: Sequences, turn: Ints) -> Ints:
    """Return where the span of one turn of each sequence begins; -1 where it isn't held."""
    wanted = sequences.span_P & (sequences.index_P == np.repeat(turn, np.diff(sequences.bounds)))
    found = np.full(len(sequences.rows), -1, dtype=np.int64)
    found[owners(sequences.bounds)[wanted]] = (sequences.start_P + sequences.prompt_P)[wanted]
    return found
