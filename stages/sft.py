"""Train a policy on the masked ids of a groups repo, by maximum likelihood: a warm start.

python stages/sft.py --dataset ./play --base_model ./tiny --output_dir ./models/it0 --lr 1e-3
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError
from pipeline.start import TrainConfig, prepare, usable

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.losses import Loss
    from pipeline.microbatches import MicroBatch

COLUMNS = ("prompt_id", "token", "mask", "segments")


@dataclass(frozen=True)
class Config(TrainConfig):
    """Minimise the mean negative log-likelihood of each update's masked ids."""

    dataset: str = execution("")
    """Repo of groups (one row a rollout), written by tokenize_masks."""
    lr: float = 1e-5
    """Peak learning rate."""
    per_device_train_batch_size: int = execution(8)
    """Rollouts a process contributes to one accumulation step."""
    gradient_accumulation_steps: int = execution(1)
    """Accumulation steps of an update: it takes processes x batch size x this many rollouts."""
    num_epochs: float = 1.0
    """Passes over the train split."""
    total_episodes: int = 0
    """Rollouts to train on in all, in place of --num_epochs; 0 goes by epochs."""
    total_length: int = 2048
    """Longest training row in ids; longer rollouts are left out and counted."""

    def __post_init__(self) -> None:
        problems = self.train_problems()
        if not self.dataset:
            problems.append("--dataset is missing")
        if self.total_episodes < 0 or (self.total_episodes == 0 and self.num_epochs <= 0):
            problems.append("give --total_episodes or --num_epochs a number greater than 0")
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Load the rollouts, train, save the policy."""
    rollouts = store.open_repo(config.dataset)
    output = store.begin_model(
        "sft",
        config,
        config.output_dir,
        inputs=[rollouts],
        models={"base_model": store.fingerprint_model(config.base_model)},
        seed=config.seed,
    )
    if output.finished:
        return
    from pipeline import columns
    from pipeline.balance import Budget
    from pipeline.models import finish_policy
    from pipeline.training import Trainer, fit

    rollouts.require(COLUMNS)
    ready = prepare(config, temperature=1.0)
    longest = ready.longest(config.total_length)
    splits = {
        split: usable(columns.rollouts(rollouts.batches(split, COLUMNS), {}), longest, "rollout")
        for split in rollouts.splits()
    }
    trainer = Trainer(
        ready.accelerator,
        ready.policy,
        ready.optimizer,
        nll,
        lambda example: example.trained,
        Budget(config.tokens(ready.accelerator), layout=ready.layout),
        config.max_grad_norm,
        config.seed,
    )
    total = config.total_episodes or round(config.num_epochs * len(splits["train"]))
    last = fit(trainer, ready, splits, config, total, output)
    finish_policy(ready, output, config.precision, last, {k: len(v) for k, v in splits.items()})


def nll(logps_N: "Tensor", batch: "MicroBatch") -> "Loss":
    """Return the negative log-likelihood of the rollouts of a micro-batch."""
    from pipeline.losses import token_nll

    return token_nll(logps_N, batch.owners_N, len(batch.rewards_M))


if __name__ == "__main__":
    run(main, Config)
