"""Score all the turns of a dialogue from one forward pass of a causal reward model.

Axes: N dialogues of a batch, T ids, D hidden size, P scored prefixes, R positions that the head
reads of a prefix, K objectives. A causal model's hidden state at a position depends only on the
ids up to it, so the states that a prefix's own pass would give are read from the whole dialogue's.
Positions are counted, never found by looking for the pad id; padding is on the right.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import EngineError
from pipeline.records import Message, RewardPart, Rollout
from pipeline.rewards.base import (
    TOO_LONG,
    Scored,
    Settings,
    blank,
    policy_messages,
    require_finite,
)
from pipeline.rewards.encoding import Encoder

Backbone = Callable[[Tensor, Tensor | None], Tensor]
"""(ids_NT int64, mask_NT int64 or None) -> hidden_NTD, after the final norm."""


class Head(Protocol):
    """What turns hidden states into a score. `objectives` names the K parts (may be none)."""

    objectives: list[str]

    def places(self, ids: Sequence[int], length: int) -> list[int] | str:
        """Return the R positions to read for ids[:length], or the reason why it has no score."""
        ...

    def __call__(self, hidden_PRD: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores_P and objectives_PK, float32."""
        ...


@dataclass(slots=True)
class Reading:
    """One row of a batch: ids, and for each turn asked for, the positions that its score reads."""

    row: int
    ids: list[int]
    places: dict[int, list[int]]


class OnePass:
    """A reward model over a causal backbone.

    `separate`: every prefix gets its own pass, because the start-up probe found that this model's
    template or backbone doesn't give a prefix the same ids or scores within the whole dialogue;
    `note` says which.
    """

    reads_reply = False
    parallel = 2  # one chunk is encoded while the device reads another

    def __init__(
        self,
        name: str,
        fingerprint: str,
        encoder: Encoder,
        backbone: Backbone,
        head: Head,
        settings: Settings,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.separate = False
        self.note: str | None = None
        self._encoder = encoder
        self._backbone = backbone
        self._head = head
        self._settings = settings
        self._device = threading.Lock()

    def score(self, rollouts: Sequence[Rollout], turns: Sequence[Sequence[int]]) -> list[Scored]:
        """Score the asked turns: encode, sort by length, pack to the token budget, read."""
        results: list[Scored] = []
        readings: list[Reading] = []
        for row, (rollout, asked) in enumerate(zip(rollouts, turns, strict=True)):
            scored, scorable = blank(rollout, asked)
            if self._settings.keep_objectives:
                scored.parts = self._blank_parts(len(scored.rewards))
            results.append(scored)
            readings += self._readings(row, rollout, scorable, scored)
        with self._device:
            for batch in batches(readings, self._settings.max_tokens_per_batch):
                self._score_batch(batch, rollouts, results)
        return results

    def probe(self, tolerance: float) -> None:
        """Check on probe dialogues that one pass gives what a pass for each prefix gives.

        `tolerance` is relative to the largest score (at least 1). Where they differ, separate
        passes are used from here on, and the reason is printed.
        """
        reason = self._encoder.breaks_prefix(PROBES) or self._scores_differ(tolerance)
        if reason:
            self.separate = True
            self.note = f"{self.name}: a pass for each prefix, because {reason}"
            print(self.note, file=sys.stderr, flush=True)

    def _scores_differ(self, tolerance: float) -> str | None:
        asked = [range(len(policy_messages(rollout))) for rollout in PROBES]
        together = _flat(self.score(PROBES, asked))
        self.separate = True
        apart = _flat([self.score([p], [turns])[0] for p, turns in zip(PROBES, asked, strict=True)])
        self.separate = False
        worst = max((abs(a - b) for a, b in zip(together, apart, strict=True)), default=0.0)
        if worst <= tolerance * max(1.0, *map(abs, apart)):
            return None
        return f"its scores in one pass differ by up to {worst:.2g} from those of separate passes"

    def _readings(
        self, row: int, rollout: Rollout, scorable: list[int], scored: Scored
    ) -> Iterator[Reading]:
        """Yield the batch rows that a rollout needs; put reasons into `scored`."""
        groups = [[turn] for turn in scorable] if self.separate else [scorable]
        for group in filter(None, groups):
            encoded = self._encoder.encode(rollout, group)
            if not isinstance(encoded, str):
                yield from self._reading(row, *encoded, scored)
            elif len(group) == 1:
                scored.errors[group[0]] = encoded
            else:
                # A later turn must not cost an earlier one its score.
                for turn in group:
                    yield from self._readings(row, rollout, [turn], scored)

    def _reading(
        self, row: int, ids: list[int], lengths: dict[int, int], scored: Scored
    ) -> Iterator[Reading]:
        """Yield one batch row, cut after the last prefix that has a score."""
        found: dict[int, list[int]] = {}
        for turn, length in lengths.items():
            places = self._places(ids, length)
            if isinstance(places, str):
                scored.errors[turn] = places
            else:
                found[turn] = places
        if found:
            yield Reading(row, ids[: 1 + max(map(max, found.values()))], found)

    def _places(self, ids: Sequence[int], length: int) -> list[int] | str:
        if length > self._settings.max_length:
            return TOO_LONG
        return self._head.places(ids, length)

    def _score_batch(
        self, batch: list[Reading], rollouts: Sequence[Rollout], results: list[Scored]
    ) -> None:
        scores, objectives = self._read(batch)
        at = 0
        for reading in batch:
            for turn in reading.places:
                rollout, scored = rollouts[reading.row], results[reading.row]
                scored.rewards[turn] = require_finite(scores[at], self.name, rollout, turn)
                for part, value in zip(scored.parts, objectives[at], strict=False):
                    part.values[turn] = value
                at += 1

    def _read(self, batch: list[Reading]) -> tuple[list[float], list[list[float]]]:
        """Run one batch; when memory runs out, halve it, down to one dialogue."""
        try:
            scores_P, objectives_PK = self._forward(batch)
            return scores_P.tolist(), objectives_PK.tolist()
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EngineError(
                    f"{self.name}: out of memory on one dialogue of {len(batch[0].ids)} ids; free"
                    " the device, or score fewer ids with --max_length, then run the same command"
                    " again"
                ) from error
        # Outside the handler, where the failed batch's tensors are no longer held by the traceback.
        torch.cuda.empty_cache()
        half = len(batch) // 2
        first, second = self._read(batch[:half]), self._read(batch[half:])
        return first[0] + second[0], first[1] + second[1]

    @torch.inference_mode()
    def _forward(self, batch: list[Reading]) -> tuple[Tensor, Tensor]:
        width = max(len(reading.ids) for reading in batch)
        ids_NT = torch.zeros(len(batch), width, dtype=torch.int64)
        mask_NT = torch.zeros_like(ids_NT)
        for n, reading in enumerate(batch):
            ids_NT[n, : len(reading.ids)] = torch.tensor(reading.ids)
            mask_NT[n, : len(reading.ids)] = 1
        rows_P = torch.tensor([n for n, reading in enumerate(batch) for _ in reading.places])
        places_PR = torch.tensor([p for reading in batch for p in reading.places.values()])
        # Padding on the right is never seen by what is left of it, and without a mask attention
        # takes its fast causal path. The probe has compared; where it fell back, a mask is given.
        hidden_NTD = self._backbone(ids_NT, mask_NT if self.separate else None)
        read_PRD = hidden_NTD[
            rows_P[:, None].to(hidden_NTD.device), places_PR.to(hidden_NTD.device)
        ]
        return self._head(read_PRD.float())

    def _blank_parts(self, turns: int) -> list[RewardPart]:
        nothing: list[Any] = [None] * turns
        return [RewardPart(name, "objective", list(nothing)) for name in self._head.objectives]


def _flat(results: list[Scored]) -> list[float]:
    """Return every score; a probe has none only where the template refuses it both ways."""
    return [reward for scored in results for reward in scored.rewards if reward is not None]


def _probe(*said: str) -> Rollout:
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(said)]
    return Rollout("probe", 0, messages, None, None, len(said) // 2 - 1, "complete", "")


PROBES = [
    _probe("Hi.", "Hello.", "What is 2 + 2?", "4", "Thanks!", "You're welcome."),
    _probe("Name a colour.", "<think>\nRed?\n</think>\n\nRed.", "Another?", " Blue\n\n- sky \n"),
    _probe("Why?\n", "Because 1 < 2,\tand 2 < 3. " * 12, "Ok", "é ü 漢字 🙂", "Go on", "No."),
]
"""Dialogues of several lengths, with what templates are known to trim, strip and rewrite."""


def batches(readings: Sequence[Reading], max_tokens: int) -> Iterator[list[Reading]]:
    """Pack readings, longest first, into batches of at most `max_tokens` padded ids.

    Longest first: a batch that doesn't fit in memory shows itself at once. A reading longer than
    the budget is a batch of its own.
    """
    batch: list[Reading] = []
    for reading in sorted(readings, key=lambda reading: -len(reading.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(reading)
    if batch:
        yield batch
