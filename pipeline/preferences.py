"""What trainers on pairs share: flags, log-probs from before training, examples, differences."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import execution
from pipeline.start import Prepared, TrainConfig, usable

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.logprob_keys import Place
    from pipeline.losses import Loss
    from pipeline.microbatches import MicroBatch
    from pipeline.packing import Example
    from pipeline.repos import Repo
    from pipeline.sources import Source
    from pipeline.training import Trainer


@dataclass(frozen=True)
class Task:
    """The pairs and how their log-probs are taken."""

    query_dataset: str = execution("")
    """Repo of pairs, written by tokenize_masks, or a published REFUEL dataset."""
    cluster: str = execution("")
    """Keep log-probs from before training in {query_dataset}_{cluster}; empty: for this run."""
    total_length: int = 2048
    """Longest training row in ids; longer pairs are left out and counted."""
    temperature: float = 1.0
    """Log-probs are those of logits / temperature; give the one that the pairs were sampled at."""


@dataclass(frozen=True)
class PairConfig(TrainConfig):
    """The flags that trainers on pairs share."""

    task: Task = field(default_factory=Task)
    total_episodes: int = 60000
    """Pairs to train on in all; more than the repo holds means several epochs."""

    def pair_problems(self) -> list[str]:
        """Say what is wrong with the common flags."""
        problems = self.train_problems()
        if not self.task.query_dataset:
            problems.append("--task.query_dataset is missing")
        if self.task.temperature <= 0:
            problems.append(f"--task.temperature {self.task.temperature}: greater than 0")
        if self.task.total_length < 2:
            problems.append(f"--task.total_length {self.task.total_length}: at least 2")
        if self.total_episodes < 1:
            problems.append(f"--total_episodes {self.total_episodes}: at least 1")
        return problems


def place_of(config: PairConfig, pairs: "Source", output: Any) -> "Place":
    """Return where the log-probs of this run are kept: the cluster's repo, or the work folder."""
    from pipeline import logprob_keys

    if config.task.cluster:
        return logprob_keys.cluster_place(pairs, config.task.cluster)
    return logprob_keys.scratch_place(pairs, output.work)


def policy_logprobs(
    config: PairConfig, ready: Prepared, place: "Place", column: str, fingerprint: str
) -> "Repo":
    """Return the pairs with the log-probs that the policy gives before its first update."""
    from pipeline import cluster, logprob_keys
    from pipeline.logprob_rows import scorer_of

    temperature, turns = config.task.temperature, place.source.turns
    key = logprob_keys.key_of(ready.tokenizer, fingerprint, turns, temperature, config)
    asked = logprob_keys.Wanted(column, key, config.base_model)
    scorer = scorer_of(config, ready.accelerator, ready.policy, ready.layout)
    return cluster.fill(scorer, place, asked)


def splits_of(repo: "Repo", column: str, longest: int) -> dict[str, list["Example"]]:
    """Read the pairs of each split with their rewards and a column of log-probs."""
    from pipeline import columns
    from pipeline.logprob_rows import read_columns

    sides = columns.PAIR_SIDES
    added = [columns.of_side(side, name) for side in sides for name in (column, "reward")]
    names = [*read_columns(sides), *added]
    return {
        split: usable(columns.pairs(repo.batches(split, names), {column: column}), longest, "pair")
        for split in repo.splits()
    }


def trainer_of(
    config: TrainConfig,
    ready: Prepared,
    loss: Callable[["Tensor", "MicroBatch"], "Loss"],
) -> "Trainer":
    """Return a trainer in whose loss every pair weighs the same."""
    from pipeline.balance import Budget
    from pipeline.training import Trainer

    budget = Budget(config.tokens(ready.accelerator), layout=ready.layout)
    parts = (ready.accelerator, ready.policy, ready.optimizer)
    return Trainer(*parts, loss, lambda example: 1.0, budget, config.max_grad_norm, config.seed)


def differences(
    logps_N: "Tensor", batch: "MicroBatch", column: str
) -> tuple["Tensor", "Tensor", "Tensor", "Tensor"]:
    """Return Δ_chosen, Δ_reject, r_chosen and r_reject of each pair (axis E, float64).

    Δ = new − earlier log-prob, summed over the trained ids.
    """
    from pipeline.losses import member_sums

    rewards_M, delta_N = batch.rewards_M, logps_N.double() - batch.numbers_N[column]
    delta_M = member_sums(delta_N, batch.owners_N, len(rewards_M))
    chosen, reject = batch.members["chosen"], batch.members["reject"]
    return delta_M[chosen], delta_M[reject], rewards_M[chosen], rewards_M[reject]
