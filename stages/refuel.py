"""Train a policy with REFUEL on pairs.

accelerate launch --config_file accelerate_cfgs/ds_config2.yaml stages/refuel.py \
    --task.query_dataset org/pairs --task.cluster my_cluster --refuel.eta 1e3 --lr 3e-7 \
    --base_model meta-llama/Meta-Llama-3-8B-Instruct --output_dir ./models/it1
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError
from pipeline.start import TrainConfig, prepare, usable

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.losses import Loss
    from pipeline.packing import MicroBatch

# The REFUEL authors document --rebel.eta; their own script knows --refuel.eta only.
ALIASES = {"--rebel.": "--refuel."}


@dataclass(frozen=True)
class Task:
    """The pairs and how their log-probs are taken."""

    query_dataset: str = execution("")
    """Repo of pairs, written by tokenize_masks."""
    cluster: str = execution("")
    """Keep the policy's old log-probs in {query_dataset}_{cluster}; empty: for this run only."""
    total_length: int = 2048
    """Longest training row in ids; longer pairs are left out and counted."""
    temperature: float = 0.8
    """Temperature that the pairs were sampled at; log-probs are those of logits / temperature."""


@dataclass(frozen=True)
class Refuel:
    """The loss."""

    eta: float = 1.0
    """Multiplies the reward difference that the log-ratio difference is regressed on."""


@dataclass(frozen=True)
class Config(TrainConfig):
    """Regress the log-ratio of two rollouts on their relative reward (arXiv 2410.04612)."""

    task: Task = field(default_factory=Task)
    refuel: Refuel = field(default_factory=Refuel)
    lr: float = 3e-7
    """Peak learning rate."""
    total_episodes: int = 60000
    """Pairs to train on in all; more than the repo holds means several epochs."""

    def __post_init__(self) -> None:
        problems = self.train_problems()
        if not self.task.query_dataset:
            problems.append("--task.query_dataset is missing")
        if self.task.temperature <= 0:
            problems.append(f"--task.temperature {self.task.temperature}: greater than 0")
        if self.total_episodes < 1:
            problems.append(f"--total_episodes {self.total_episodes}: at least 1")
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Load the pairs and their old log-probs, train, save the policy."""
    pairs = store.open_repo(config.task.query_dataset)
    fingerprint = store.fingerprint_model(config.base_model)
    output = store.begin_model(
        "refuel",
        config,
        config.output_dir,
        inputs=[pairs],
        models={"base_model": fingerprint},
        seed=config.seed,
    )
    if output.finished:
        return
    from pipeline import cluster, columns
    from pipeline.balance import Budget
    from pipeline.models import finish_policy
    from pipeline.training import Trainer, fit

    pairs.require([*cluster.wanted(), "chosen_reward", "reject_reward"])
    ready = prepare(config, config.task.temperature)
    kept = old_logprobs(config, ready, pairs, fingerprint, output)
    names = [*cluster.wanted(), *cluster.old_columns(), "chosen_reward", "reject_reward"]
    longest = ready.longest(config.task.total_length)
    splits = {
        split: usable(columns.pairs(kept.batches(split, names), cluster.OLD), longest, "pair")
        for split in kept.splits()
    }
    trainer = Trainer(
        ready.accelerator,
        ready.policy,
        ready.optimizer,
        lambda logps_N, batch: pair_loss(logps_N, batch, config.refuel.eta),
        lambda example: 1.0,
        Budget(config.tokens(ready.accelerator), layout=ready.layout),
        config.max_grad_norm,
    )
    last = fit(trainer, splits, config, config.total_episodes, ready.batch_size(config), output)
    finish_policy(ready, output, config.precision, last, {k: len(v) for k, v in splits.items()})


def old_logprobs(
    config: Config, ready: Any, pairs: store.Repo, fingerprint: str, output: Any
) -> store.Repo:
    """Return the pairs with the log-probs that the policy gives before its first update."""
    from pipeline import cluster
    from pipeline.balance import Budget

    key = cluster.key_of(
        ready.tokenizer, config.task.temperature, config.precision, config.attn_implementation
    )
    model = (config.base_model, fingerprint)
    place = (
        cluster.cluster_place(config.task.query_dataset, config.task.cluster, pairs, key, model)
        if config.task.cluster
        else cluster.scratch_place(output.work, pairs, key, model)
    )
    tokens = config.tokens(ready.accelerator)
    budget = Budget(tokens, config.per_device_eval_batch_size, ready.layout)
    return cluster.old_logprobs(
        cluster.Scorer(ready.accelerator, ready.policy, budget), place, pairs
    )


def pair_loss(logps_N: "Tensor", batch: "MicroBatch", eta: float) -> "Loss":
    """Return the REFUEL loss of the pairs of a micro-batch."""
    from pipeline.losses import member_sums, refuel

    rewards_M, delta_N = batch.rewards_M, logps_N.double() - batch.numbers_N["old_logprob"]
    delta_M = member_sums(delta_N, batch.owners_N, len(rewards_M))
    chosen, reject = batch.members["chosen"], batch.members["reject"]
    return refuel(delta_M[chosen], delta_M[reject], rewards_M[chosen], rewards_M[reject], eta)


if __name__ == "__main__":
    run(main, Config, ALIASES)
