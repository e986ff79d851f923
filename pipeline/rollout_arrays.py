"""A batch of rollouts as flat arrays: one row a rollout, a turn, a message or an id.

Axes: N rollouts, T turns of all of them, M messages of all of them. Nothing is copied that Arrow
holds as numpy can read it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.ragged import Bools, Ints, bounds_of, list_lengths, numbers, owners
from pipeline.records import NO_SCORE, RANKED, IntArray

NEEDED = ("prompt_id", "sample", "messages", "turns", "score_turn")
"""Columns of rollouts without which nothing can be trained."""
USED = (
    *NEEDED,
    "branch_turn",
    "status",
    "end_reason",
    "tools",
    "rewards",
    "reward_errors",
)
"""Columns that selection reads; those that aren't needed may be absent."""

ROLES = pa.array(["assistant", "system", "user", "tool"])
_ASSISTANT = 0


def typed(batch: pa.RecordBatch, source: str) -> pa.RecordBatch:
    """Return what selection reads, in the types of records.RANKED; what is absent is null.

    Foreign repos hold int64, large lists and the like. DataError where a value would change.
    """
    present = set(batch.schema.names)
    columns = []
    for name in USED:
        kind = RANKED.field(name).type
        if name not in present:
            columns.append(pa.nulls(batch.num_rows, kind))
        elif batch.column(name).type.equals(kind):
            columns.append(batch.column(name))
        else:
            columns.append(cast(batch.column(name), kind, f"{source}, column {name!r}"))
    return pa.RecordBatch.from_arrays(columns, names=list(USED))


def cast(column: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
    """Return a column in another type. DataError, with its name, where a value would change."""
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(f"{name} holds {column.type}, which is no {kind}: {error}") from error


@dataclass(frozen=True)
class Turns:
    """The turns of N rollouts. `size_T` is the length of the context with the turn's own ids."""

    bounds: Ints
    keep_T: Ints
    prompts: Ints
    responses: Ints
    logprobs: Ints
    has_logprobs_T: Bools
    cut_T: Bools
    ids: IntArray
    """All prompt ids, then all response ids; `prompts` and `responses` bound each turn's."""
    logprob_values: npt.NDArray[np.float32]
    missing_T: Bools
    """Turns of which a part is null."""

    @cached_property
    def size_T(self) -> Ints:
        return self.keep_T + np.diff(self.prompts) + np.diff(self.responses)

    @cached_property
    def seen_T(self) -> Ints:
        """The length of the context before each turn: what the turn before it left."""
        seen = np.zeros(len(self.keep_T), dtype=np.int64)
        seen[1:] = self.size_T[:-1]
        seen[self.bounds[:-1][np.diff(self.bounds) > 0]] = 0
        return seen


def read_turns(column: pa.Array) -> Turns:
    """Return the turns of a batch's column; a rollout of text has none."""
    flat = column.flatten()
    parts = {name: pc.struct_field(flat, name) for name in flat.type.names}
    prompts, responses, logprobs = (
        bounds_of(list_lengths(parts[name])) for name in ("prompt_ids", "response_ids", "logprobs")
    )
    values = [parts[name].flatten() for name in ("prompt_ids", "response_ids")]
    # A null id would be a number below: none that the check of the vocabulary lets through.
    ids = np.concatenate([numbers(part, -1) for part in values])
    missing = [pc.is_null(parts[name]) for name in ("keep", "prompt_ids", "response_ids")]
    return Turns(
        bounds_of(list_lengths(column)),
        numbers(parts["keep"], -1).astype(np.int64),
        prompts,
        responses + prompts[-1],
        logprobs,
        _bools(pc.is_valid(parts["logprobs"])),
        _bools(pc.fill_null(pc.equal(parts["finish_reason"], "length"), False)),
        ids,
        numbers(parts["logprobs"].flatten(), np.nan),
        np.any([_bools(part) for part in missing], axis=0),
    )


@dataclass(frozen=True)
class Messages:
    """The messages of N rollouts; `policy` are the places of those that the policy said."""

    bounds: Ints
    flat: pa.Array
    role_M: npt.NDArray[Any]
    policy: Ints
    policy_bounds: Ints

    @property
    def assistant_M(self) -> Bools:
        return self.role_M == _ASSISTANT


def read_messages(column: pa.Array, turns: Ints, text: Bools) -> Messages:
    """Return the messages of a batch's column, for rollouts with so many turns or of text.

    The opening may hold assistant messages of a dataset; those of the policy are the last ones.
    """
    flat, bounds = column.flatten(), bounds_of(list_lengths(column))
    role_M = numbers(pc.index_in(pc.struct_field(flat, "role"), ROLES), -1)
    spoken = np.flatnonzero(role_M == _ASSISTANT)
    of = owners(bounds)[spoken]
    counts = np.bincount(of, minlength=len(turns))
    after = counts[of] - (np.arange(len(spoken)) - bounds_of(counts)[of])
    policy = (after <= turns[of]) | text[of]
    policy_bounds = bounds_of(np.bincount(of[policy], minlength=len(turns)))
    return Messages(bounds, flat, role_M, spoken[policy], policy_bounds)


class Rollouts:
    """N rollouts in arrays. Every field is per rollout unless its name has another axis."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        """Read a batch that `typed` made."""
        self.batch = batch
        self.turns = read_turns(batch.column("turns"))
        self.num_turns = np.diff(self.turns.bounds)
        self.text = _bools(pc.is_null(batch.column("turns")))
        self.messages = read_messages(batch.column("messages"), self.num_turns, self.text)
        self.num_spoken = np.diff(self.messages.policy_bounds)
        self.failed = _bools(pc.fill_null(pc.equal(batch.column("status"), "failed"), False))
        self.score_turn = numbers(batch.column("score_turn"), -1).astype(np.int64)
        self.has_fork = _bools(pc.is_valid(batch.column("branch_turn")))
        self.branch_turn = numbers(batch.column("branch_turn"), 0).astype(np.int64)
        self.reward = rewards_of(batch.column("rewards"), self.score_turn)

    def __len__(self) -> int:
        return self.batch.num_rows


def _bools(column: pa.Array) -> Bools:
    return column.to_numpy(zero_copy_only=False)


def rewards_of(column: pa.Array, score_turn: Ints) -> npt.NDArray[np.float64]:
    """Return the reward that trains: the score at the score turn, NaN where there is none."""
    bounds = bounds_of(list_lengths(column))
    held = (score_turn >= 0) & (score_turn < np.diff(bounds))
    values = numbers(column.flatten(), np.nan)
    rewards = np.full(len(score_turn), np.nan)
    rewards[held] = values[(bounds[:-1] + score_turn)[held]]
    rewards[(rewards == NO_SCORE) | ~np.isfinite(rewards)] = np.nan
    return rewards
