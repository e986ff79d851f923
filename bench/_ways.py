"""The seed's way and ours to train on the same pairs from the same folder; TRL's is in _trl_way.py.

A way takes one optimizer step on some of the pairs (`train`), with a clock around what counts. It
also gives log-probs summed over the trained ids of each response (`score`), by (pair, role).

Axes: B rows, T ids of a row, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from _clocks import Clock
from _workload import EOS
from torch import Tensor

from pipeline import losses, preferences, start
from pipeline.logprob_rows import logprobs, scorer_of
from pipeline.microbatches import MicroBatch
from pipeline.packing import Example, Strand
from pipeline.training import train_steps

# So small that what is measured doesn't depend on how far the weights have moved.
LR, ETA, BETA = 1e-7, 1.0, 0.1
Sums = dict[tuple[int, str], float]


@dataclass(frozen=True)
class Setup:
    """What all ways share: `batch_size` pairs an optimizer step, `row` ids a row of the seed."""

    folder: Path
    pairs: list[Example]
    batch_size: int
    row: int
    device: str
    dtype: str
    threads: int

    def autocast(self) -> AbstractContextManager[Any]:
        """Return bf16 autocast over float32 weights where bf16 was asked for."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)


class Way(Protocol):
    """A way to train; `model` is what the gradients belong to."""

    model: torch.nn.Module

    def train(self, chosen: Sequence[int], clock: Clock) -> None: ...

    def score(self, chosen: Sequence[int], clock: Clock) -> Sums: ...


class SeedWay:
    """REFUEL's setting-one script: rows of 2048 ids, and logits of the whole vocabulary everywhere.

    Written anew from what that script computes, and at its best: SDPA, no attention mask (rows
    padded on the right need none), no hidden states kept that nothing reads, logits freed as soon
    as may be. A micro-batch is one pair: [2, 2048] ids.
    """

    def __init__(self, setup: Setup) -> None:
        """Load the model in float32."""
        from transformers import AutoModelForCausalLM

        self.setup = setup
        model = AutoModelForCausalLM.from_pretrained(
            setup.folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model = model.to(setup.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-6
        )
        self.old: Sums = {}

    def train(self, chosen: Sequence[int], clock: Clock) -> None:
        """Take a step; with fewer pairs than a batch the update counts in proportion."""
        clock.start()
        for i in chosen:
            strands = self.setup.pairs[i].strands
            old_B = [self.old.get((i, role), 0.0) for role in strands]
            delta_B = self.logps(list(strands.values())) - torch.tensor(old_B).to(self.setup.device)
            gap = strands["chosen"].reward - strands["reject"].reward
            loss = (delta_B[0] - delta_B[1] - ETA * gap) ** 2
            (loss / self.setup.batch_size).backward()
        clock.stop()
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.stop(share=len(chosen) / self.setup.batch_size)

    @torch.no_grad()
    def score(self, chosen: Sequence[int], clock: Clock) -> Sums:
        """Compute log-probs at batch size one."""
        clock.start()
        for i in chosen:
            for role, strand in self.setup.pairs[i].strands.items():
                self.old[i, role] = self.logps([strand]).item()
        clock.stop()
        return {key: value for key, value in self.old.items() if key[0] in chosen}

    def logps(self, strands: Sequence[Strand]) -> Tensor:
        """Return the masked sums of log-probs of some rows: logps_B."""
        ids_BT = torch.full((len(strands), self.setup.row), EOS)
        mask_BT = torch.zeros(len(strands), self.setup.row)
        for b, strand in enumerate(strands):
            ids_BT[b, : len(strand.ids)] = torch.from_numpy(strand.ids)
            mask_BT[b, : len(strand.ids)] = torch.from_numpy(strand.mask)
        ids_BT, mask_BT = ids_BT.to(self.setup.device), mask_BT.to(self.setup.device)
        with self.setup.autocast():
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            logits_BTV /= 1.0 + 1e-7  # the temperature, as that script writes it
            logps_BTV = F.log_softmax(logits_BTV, dim=-1)
        del logits_BTV
        logps_BT = logps_BTV.gather(2, ids_BT[:, 1:, None]).squeeze(-1)
        return (logps_BT * mask_BT[:, 1:]).sum(-1)


class OurWay:
    """The trainer's own step at default settings, put together as the stages of pairs do it."""

    def __init__(self, setup: Setup, method: str) -> None:
        """Load the policy as a stage does; `method` is refuel or dpo."""
        task = preferences.Task(query_dataset="pairs")
        config = preferences.PairConfig(
            base_model=str(setup.folder), output_dir="policy", dtype=setup.dtype, task=task
        )
        ready = start.prepare(config, config.task.temperature)
        self.model = ready.policy
        self.pairs = [with_old(pair) for pair in setup.pairs]
        self.trainer = preferences.trainer_of(config, ready, LOSSES[method])
        self.scorer = scorer_of(config, ready.accelerator, ready.policy, ready.layout)

    def train(self, chosen: Sequence[int], clock: Clock) -> None:
        """Take a step."""
        clock.start()
        list(train_steps(self.trainer, self.pairs, [chosen], lambda update: LR))
        clock.stop()

    def score(self, chosen: Sequence[int], clock: Clock) -> Sums:
        """Compute log-probs as the stages do for a cluster tag."""
        clock.start()
        found = list(logprobs(self.scorer, [self.pairs[i] for i in chosen]))
        clock.stop()
        return {
            (chosen[k], role): float(values.sum(dtype="float64"))
            for k, logps in found
            for role, values in logps.items()
        }


def refuel_loss(logps_N: Tensor, batch: MicroBatch) -> losses.Loss:
    """Return REFUEL's loss as its stage does."""
    return losses.refuel(*preferences.differences(logps_N, batch, "old_logprob"), ETA)


def dpo_loss(logps_N: Tensor, batch: MicroBatch) -> losses.Loss:
    """Return DPO's loss as its stage does."""
    return losses.dpo(*preferences.differences(logps_N, batch, "old_logprob"), BETA)


LOSSES = {"refuel": refuel_loss, "dpo": dpo_loss}


def with_old(pair: Example) -> Example:
    """Return a pair with earlier log-probs of 0: which ones makes no difference to the time."""
    strands = {
        role: replace(strand, numbers={"old_logprob": np.zeros(strand.mask.sum(), np.float32)})
        for role, strand in pair.strands.items()
    }
    return replace(pair, strands=strands)
