"""The training loop: micro-batches, backward, clip, step, metrics. No callbacks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import checkpoints
from pipeline.balance import Budget, plan_micro_batches, sizes_of
from pipeline.errors import DataError
from pipeline.losses import Loss
from pipeline.microbatches import MicroBatch, collate
from pipeline.packing import Example
from pipeline.schedule import lr_at, plan_updates
from pipeline.seeds import seed_for
from pipeline.tracking import Metrics


@dataclass(frozen=True, slots=True)
class Trainer:
    """What one optimizer step needs. `policy` is a prepared MaskedLogprobs.

    `weigh` gives the weight that `loss` will give an example: the sum over a whole step must be
    known before its first backward pass. `max_grad_norm` 0 doesn't clip. `seed`: of whatever a
    policy draws while it trains.
    """

    accelerator: Any
    policy: Any
    optimizer: Any
    loss: Callable[[Tensor, MicroBatch], Loss]
    weigh: Callable[[Example], float]
    budget: Budget
    max_grad_norm: float
    seed: int = 0


def fit(
    trainer: Trainer,
    ready: Any,
    splits: Mapping[str, Sequence[Example]],
    config: Any,
    total: int,
    output: Any,
) -> dict[str, float]:
    """Step, log, evaluate, save, until `total` examples have been seen; return the last metrics.

    Goes on from the newest checkpoint of `output`, so whatever needs the base policy comes before.
    `ready` is what `prepare` gave, `config` a trainer's, `output` the ModelRun; metrics.jsonl goes
    to its work folder.
    """
    train, test = splits["train"], splits.get("test", [])
    updates = plan_updates(len(train), config.examples_per_update, total, config.seed)
    done, last = checkpoints.resume(ready, config, output)
    log = Metrics(trainer.accelerator, output.work, config, done)

    def lr_of(update: int) -> float:
        return lr_at(update, len(updates), config.lr, config.warmup_ratio)

    if done == 0:
        last |= validate(trainer, test, config, log, 0)
    taken = train_steps(trainer, train, updates, lr_of, done)
    for update, metrics in enumerate(shown(taken, trainer, done, len(updates)), start=done + 1):
        log.log(update, metrics)
        last |= metrics
        if update % config.print_sample_output_freq == 0 or update == len(updates):
            last |= validate(trainer, test, config, log, update)
        if is_due(update, config.save_every_updates, len(updates)):
            checkpoints.save(ready, config, output, update, last)
    return last


def validate(
    trainer: Trainer, test: Sequence[Example], config: Any, log: Metrics, update: int
) -> dict[str, float]:
    """Log the loss on the test split, if there is one; return its metrics, named `val_...`."""
    if not test:
        return {}
    found = evaluate(trainer, test, config.per_device_eval_batch_size)
    named = {f"val_{name}": value for name, value in found.items()}
    log.log(update, named)
    return named


def shown(
    taken: Iterator[dict[str, float]], trainer: Trainer, done: int, updates: int
) -> Iterator[dict[str, float]]:
    """Yield each update's metrics, and show on rank 0 how far it is."""
    from tqdm import tqdm

    off = not trainer.accelerator.is_main_process
    with tqdm(taken, initial=done, total=updates, unit="update", disable=off) as bar:
        for metrics in bar:
            bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
            yield metrics


def is_due(update: int, every: int, updates: int) -> bool:
    """Say whether a checkpoint follows this update; after the last one comes the model itself."""
    return every > 0 and update % every == 0 and update < updates


def train_steps(
    trainer: Trainer,
    examples: Sequence[Example],
    updates: Sequence[Sequence[int] | np.ndarray],
    lr_of: Callable[[int], float],
    done: int = 0,
) -> Iterator[dict[str, float]]:
    """Take one optimizer step for each list of indices after the first `done`; yield its metrics.

    They are the same on all ranks. The loss is that of all examples of the step together, whatever
    the micro-batches and ranks. Nothing carries over from one update to the next but the weights
    and the optimizer's state.
    """
    seen = list(accumulate(map(len, updates)))
    for update in range(done + 1, len(updates) + 1):
        started = time.perf_counter()
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr_of(update)
        rank = trainer.accelerator.process_index
        torch.manual_seed(seed_for(trainer.seed, "update", rank, update, "policy"))
        trainer.policy.train()
        metrics = train_step(trainer, [examples[i] for i in updates[update - 1]], update)
        metrics["tokens_per_s"] = metrics.pop("tokens") / (time.perf_counter() - started)
        facts = {"lr": lr_of(update), "examples_seen": seen[update - 1]}
        yield metrics | facts | {"peak_memory_gb": peak_memory_gb()}


def train_step(trainer: Trainer, examples: Sequence[Example], update: int) -> dict[str, float]:
    """Backward over every micro-batch of one step, clip, step; return the step's metrics.

    Raises DataError on every rank, before the step, if a loss isn't finite.
    """
    accelerator, world = trainer.accelerator, trainer.accelerator.num_processes
    weight = sum(trainer.weigh(example) for example in examples)
    batches = list(my_batches(accelerator, examples, trainer.budget))
    sums = Sums(accelerator, examples)
    metrics: dict[str, float] = {}
    for k, (indices, counted) in enumerate(batches):
        last = k == len(batches) - 1
        held = [examples[i] for i in indices]
        batch = collate(held, trainer.budget.layout, accelerator.device, counted)
        with gradients_sync(accelerator, trainer.policy, last):
            loss = forward(trainer, batch)
            sums.add(loss, batch, indices)
            if last:  # before its backward pass, because DeepSpeed steps inside
                metrics = sums.reduced(f"update {update}")
            # Every strategy averages gradients over ranks: times world makes the average a sum.
            accelerator.backward(loss.numerators.sum() * (world / weight))
    found = metrics.pop("weight")
    assert math.isclose(found, weight), "weigh and loss disagree on the weights"
    limit = trainer.max_grad_norm or math.inf
    norm = accelerator.clip_grad_norm_(trainer.policy.parameters(), limit)
    metrics["grad_norm"] = finite_norm(norm, update)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return metrics


def forward(trainer: Trainer, batch: MicroBatch) -> Loss:
    """Return the loss of a micro-batch, 0 for a filler."""
    loss = trainer.loss(trainer.policy(*batch.inputs), batch)
    if batch.counted:
        return loss
    return Loss(loss.numerators * 0, loss.weights * 0, loss.metrics)


def finite_norm(norm: Any, update: int) -> float:
    """Return the gradient norm as a float; raise where it isn't finite.

    DeepSpeed gives -1 for some that aren't, and has taken or skipped the step by then.
    """
    value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(value) or value < 0:
        raise DataError(
            f"update {update}: the gradient norm is {value}. Nothing was saved over. Lower --lr, "
            "or train in float32 (--dtype fp32)."
        )
    return value


@torch.no_grad()
def evaluate(
    trainer: Trainer, examples: Sequence[Example], max_examples: int = 0
) -> dict[str, float]:
    """Return the loss and its metrics over all examples, each counted once."""
    trainer.policy.eval()
    budget = replace(trainer.budget, examples=max_examples)
    sums = Sums(trainer.accelerator, examples)
    for indices, counted in my_batches(trainer.accelerator, examples, budget):
        held = [examples[i] for i in indices]
        batch = collate(held, budget.layout, trainer.accelerator.device, counted)
        sums.add(forward(trainer, batch), batch, indices)
    metrics = sums.reduced("evaluation")
    return {k: v for k, v in metrics.items() if k not in ("weight", "tokens", "padding_share")}


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
    """Reduce gradients over ranks in the last backward pass of a step only.

    FSDP2 reduces in each: until then a rank would hold the gradients of the whole model.
    """
    accelerator.sync_gradients = last  # DeepSpeed's wrapper steps in the backward pass that syncs
    if last or accelerator.is_fsdp2:
        yield
        return
    with accelerator.no_sync(policy):
        yield


class Sums:
    """Weighted sums of a step's loss and metrics, reduced over ranks once.

    `broken_E` marks the examples whose loss isn't finite.
    """

    def __init__(self, accelerator: Any, examples: Sequence[Example]) -> None:
        """Start at 0; `examples` are those of the whole step."""
        self.accelerator = accelerator
        self.examples = examples
        self.values: dict[str, Tensor] = {}
        self.broken_E = torch.zeros(len(examples), dtype=torch.float64, device=accelerator.device)

    def add(self, loss: Loss, batch: MicroBatch, indices: Sequence[int]) -> None:
        """Add one micro-batch, made of the step's examples at `indices`."""
        weights = loss.weights.detach().double()
        numerators = loss.numerators.detach().double()
        tokens = float(batch.tokens if batch.counted else 0)
        new = {"loss": numerators.sum(), "weight": weights.sum()}
        new["tokens"] = torch.tensor(tokens, dtype=torch.float64, device=weights.device)
        new["places"] = torch.full_like(new["tokens"], batch.ids_BT.numel())
        new |= {name: (value * weights).sum() for name, value in loss.metrics.items()}
        for name, value in new.items():
            self.values[name] = self.values[name] + value if name in self.values else value
        self.broken_E[list(indices)] = (~torch.isfinite(numerators)).double()

    def reduced(self, where: str) -> dict[str, float]:
        """Return the weighted means over all ranks, `padding_share`, and the sums of two values.

        Those are `weight` and `tokens`. Raises DataError, on every rank, naming the prompts whose
        loss isn't finite.
        """
        mine = torch.cat([torch.stack(list(self.values.values())), self.broken_E])
        totals = self.accelerator.reduce(mine, reduction="sum").tolist()
        refuse_broken(self.examples, totals[len(self.values) :], where)
        named = dict(zip(self.values, totals, strict=False))
        places = named.pop("places")
        kept = {name: named.pop(name) for name in ("weight", "tokens")}
        means = {name: value / kept["weight"] for name, value in named.items()}
        return means | kept | {"padding_share": 1 - kept["tokens"] / places}


def refuse_broken(examples: Sequence[Example], broken: Sequence[float], where: str) -> None:
    """Raise DataError naming the prompts of the examples that are marked."""
    pairs = zip(examples, broken, strict=True)
    if named := sorted({example.prompt_id for example, mark in pairs if mark}):
        raise DataError(
            f"{where}: the loss is not finite for the prompts {', '.join(named)}. No step was "
            "taken with it, nothing was saved over. Look at these rows, lower --lr, or train in "
            "float32 (--dtype fp32)."
        )


def peak_memory_gb() -> float:
    """Return the peak of allocated GPU memory, or of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
