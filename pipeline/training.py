"""The training loop: micro-batches, backward, clip, step, metrics. No callbacks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.balance import Budget, plan_micro_batches, sizes_of
from pipeline.errors import DataError
from pipeline.losses import Loss
from pipeline.packing import Example, MicroBatch, collate
from pipeline.schedule import lr_at, plan_updates
from pipeline.tracking import Metrics


@dataclass(frozen=True, slots=True)
class Trainer:
    """What one optimizer step needs. `policy` is a prepared MaskedLogprobs.

    `weigh` gives the weight that `loss` will give an example: the sum over a whole step must be
    known before its first backward pass. `max_grad_norm` 0 doesn't clip.
    """

    accelerator: Any
    policy: Any
    optimizer: Any
    loss: Callable[[Tensor, MicroBatch], Loss]
    weigh: Callable[[Example], float]
    budget: Budget
    max_grad_norm: float


def fit(
    trainer: Trainer,
    splits: Mapping[str, Sequence[Example]],
    config: Any,
    total: int,
    batch_size: int,
    output: Any,
) -> dict[str, float]:
    """Evaluate, step, log, until `total` examples have been seen; return the last metrics.

    `config` is a trainer's (lr, warmup_ratio, seed and how often to evaluate on the test split);
    metrics.jsonl goes to the work folder of `output`.
    """
    from tqdm import tqdm

    accelerator, train, test = trainer.accelerator, splits["train"], splits.get("test")
    updates = plan_updates(len(train), batch_size, total, config.seed)
    log = Metrics(accelerator, output.work / "metrics.jsonl", "turnwise", config)
    last: dict[str, float] = {}

    def lr_of(update: int) -> float:
        return lr_at(update, len(updates), config.lr, config.warmup_ratio)

    def validate(update: int) -> None:
        if test:
            found = evaluate(trainer, test, config.per_device_eval_batch_size)
            last.update({f"val_{name}": value for name, value in found.items()})
            log.log(update, {f"val_{name}": value for name, value in found.items()})

    validate(0)
    steps = tqdm(
        train_steps(trainer, train, updates, lr_of),
        total=len(updates),
        unit="update",
        disable=not accelerator.is_main_process,
    )
    for update, metrics in enumerate(steps, start=1):
        log.log(update, metrics)
        last.update(metrics)
        steps.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
        if update % config.print_sample_output_freq == 0 or update == len(updates):
            validate(update)
    return last


def train_steps(
    trainer: Trainer,
    examples: Sequence[Example],
    updates: Sequence[Sequence[int] | np.ndarray],
    lr_of: Callable[[int], float],
) -> Iterator[dict[str, float]]:
    """Take one optimizer step for each list of indices and yield its metrics (same on all ranks).

    The loss is that of all examples of the step together, whatever the micro-batches and ranks.
    """
    for update, chosen in enumerate(updates, start=1):
        started = time.perf_counter()
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr_of(update)
        trainer.policy.train()
        metrics = train_step(trainer, [examples[i] for i in chosen])
        metrics["tokens_per_s"] = metrics.pop("tokens") / (time.perf_counter() - started)
        yield metrics | {"lr": lr_of(update), "peak_memory_gb": peak_memory_gb()}


def train_step(trainer: Trainer, examples: Sequence[Example]) -> dict[str, float]:
    """Backward over every micro-batch of one step, clip, step; return the step's metrics."""
    accelerator, world = trainer.accelerator, trainer.accelerator.num_processes
    weight = sum(trainer.weigh(example) for example in examples)
    batches = list(my_batches(accelerator, examples, trainer.budget))
    sums = Sums(accelerator)
    for k, (indices, counted) in enumerate(batches):
        held = [examples[i] for i in indices]
        batch = collate(held, trainer.budget.layout, accelerator.device, counted)
        with gradients_sync(accelerator, trainer.policy, last=k == len(batches) - 1):
            loss = forward(trainer, batch)
            # Every strategy averages gradients over ranks: times world makes the average a sum.
            accelerator.backward(loss.numerators.sum() * (world / weight))
        sums.add(loss, batch)
    norm = accelerator.clip_grad_norm_(
        trainer.policy.parameters(), trainer.max_grad_norm or math.inf
    )
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    metrics = sums.reduced()
    assert math.isclose(metrics.pop("weight"), weight), "weigh and loss disagree on the weights"
    return metrics | {"grad_norm": finite_norm(norm)}


def forward(trainer: Trainer, batch: MicroBatch) -> Loss:
    """Return the loss of a micro-batch, 0 for a filler; stop where it isn't finite."""
    logps_N = trainer.policy(*batch.inputs)
    loss = trainer.loss(logps_N, batch)
    finite = torch.isfinite(loss.numerators)
    if not bool(finite.all()):
        named = [p for p, good in zip(batch.prompt_ids, finite.tolist(), strict=True) if not good]
        raise DataError(
            f"the loss is not finite for the prompts {', '.join(sorted(set(named)))}. Nothing was "
            "saved. Look at these rows, lower --lr, or train in float32 (--dtype fp32)."
        )
    if batch.counted:
        return loss
    return Loss(loss.numerators * 0, loss.weights * 0, loss.metrics)


def finite_norm(norm: Any) -> float:
    """Return the gradient norm as a float; raise where it isn't finite."""
    value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(value):
        raise DataError(
            f"the gradient norm is {value}. Nothing was saved. Lower --lr, or train in float32."
        )
    return value


@torch.no_grad()
def evaluate(
    trainer: Trainer, examples: Sequence[Example], max_examples: int = 0
) -> dict[str, float]:
    """Return the loss and its metrics over all examples, each counted once."""
    trainer.policy.eval()
    budget = replace(trainer.budget, examples=max_examples)
    sums = Sums(trainer.accelerator)
    for indices, counted in my_batches(trainer.accelerator, examples, budget):
        held = [examples[i] for i in indices]
        batch = collate(held, budget.layout, trainer.accelerator.device, counted)
        sums.add(forward(trainer, batch), batch)
    metrics = sums.reduced()
    return {k: v for k, v in metrics.items() if k not in ("weight", "tokens")}


def my_batches(
    accelerator: Any, examples: Sequence[Example], budget: Budget
) -> Iterator[tuple[list[int], bool]]:
    """Yield this rank's micro-batches of indices; a filler is the smallest example, not counted."""
    sizes = sizes_of(examples, budget.layout)
    smallest = min(range(len(sizes)), key=lambda i: sizes[i][1])
    plan = plan_micro_batches(sizes, budget, accelerator.num_processes)
    for indices in plan[accelerator.process_index]:
        yield (indices, True) if indices else ([smallest], False)


@contextmanager
def gradients_sync(accelerator: Any, policy: Any, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the last backward pass of a step only."""
    accelerator.sync_gradients = last  # DeepSpeed's wrapper steps in the backward pass that syncs
    if last:
        yield
        return
    with accelerator.no_sync(policy):
        yield


class Sums:
    """Weighted sums of a step's loss and metrics, reduced over ranks once."""

    def __init__(self, accelerator: Any) -> None:
        """Start at 0."""
        self.accelerator = accelerator
        self.values: dict[str, Tensor] = {}

    def add(self, loss: Loss, batch: MicroBatch) -> None:
        """Add one micro-batch."""
        weights = loss.weights.detach().double()
        tokens = batch.tokens if batch.counted else 0
        new = {"loss": loss.numerators.detach().double().sum(), "weight": weights.sum()}
        new["tokens"] = torch.tensor(tokens, dtype=torch.float64, device=weights.device)
        new |= {name: (value * weights).sum() for name, value in loss.metrics.items()}
        for name, value in new.items():
            self.values[name] = self.values[name] + value if name in self.values else value

    def reduced(self) -> dict[str, float]:
        """Return the weighted means over all ranks, and the sums of `weight` and `tokens`."""
        sums = self.accelerator.reduce(torch.stack(list(self.values.values())), reduction="sum")
        named = dict(zip(self.values, sums.tolist(), strict=True))
        kept = {name: named.pop(name) for name in ("weight", "tokens")}
        return {name: value / kept["weight"] for name, value in named.items()} | kept


def peak_memory_gb() -> float:
    """Return the peak of allocated GPU memory, or of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
