"""Train a policy with REFUEL on pairs.

accelerate launch --config_file accelerate_cfgs/ds_config2.yaml stages/refuel.py \
    --task.query_dataset org/pairs --task.cluster my_cluster --refuel.eta 1e3 --lr 3e-7 \
    --base_model meta-llama/Meta-Llama-3-8B-Instruct --output_dir ./models/it1
"""

from dataclasses import dataclass, field

from pipeline import preferences, store
from pipeline.config import run
from pipeline.errors import DataError
from pipeline.start import prepare

# The REFUEL authors document --rebel.eta; their own script knows --refuel.eta only.
ALIASES = {"--rebel.": "--refuel."}


@dataclass(frozen=True)
class Task(preferences.Task):
    """The pairs and how their log-probs are taken."""

    temperature: float = 0.8
    """Temperature that the pairs were sampled at; log-probs are those of logits / temperature."""


@dataclass(frozen=True)
class Refuel:
    """The loss."""

    eta: float = 1.0
    """Multiplies the reward difference that the log-ratio difference is regressed on."""


@dataclass(frozen=True)
class Config(preferences.PairConfig):
    """Regress the log-ratio of two rollouts on their relative reward (arXiv 2410.04612)."""

    task: Task = field(default_factory=Task)
    refuel: Refuel = field(default_factory=Refuel)
    lr: float = 3e-7
    """Peak learning rate."""

    def __post_init__(self) -> None:
        if problems := self.pair_problems():
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Load the pairs and their old log-probs, train, save the policy."""
    from pipeline.sources import open_pairs

    pairs = open_pairs(config.task.query_dataset)
    fingerprint = store.fingerprint_model(config.base_model)
    output = store.begin_model(
        "refuel",
        config,
        config.output_dir,
        inputs=[pairs.repo],
        models={"base_model": fingerprint},
        seed=config.seed,
    )
    if output.finished:
        return
    from pipeline.losses import refuel
    from pipeline.models import finish_policy
    from pipeline.training import fit

    ready = prepare(config, config.task.temperature)
    place = preferences.place_of(config, pairs, output)
    kept = preferences.policy_logprobs(config, ready, place, "old_logprob", fingerprint)
    splits = preferences.splits_of(kept, "old_logprob", ready.longest(config.task.total_length))
    trainer = preferences.trainer_of(
        config,
        ready,
        lambda logps_N, batch: refuel(
            *preferences.differences(logps_N, batch, "old_logprob"), config.refuel.eta
        ),
    )
    last = fit(trainer, ready, splits, config, config.total_episodes, output)
    finish_policy(ready, output, config.precision, last, {k: len(v) for k, v in splits.items()})


if __name__ == "__main__":
    run(main, Config, ALIASES)
