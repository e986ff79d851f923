"""Train a policy with DPO on pairs, over the policy's ids of all turns.

accelerate launch --config_file accelerate_cfgs/ds_config2.yaml stages/dpo.py \
    --task.query_dataset org/pairs --task.cluster my_cluster --dpo.beta 0.1 --lr 5e-7 \
    --base_model meta-llama/Meta-Llama-3-8B-Instruct --output_dir ./models/it1
"""

from dataclasses import dataclass, field
from typing import Literal

from pipeline import preferences, store
from pipeline.config import execution, run
from pipeline.errors import DataError


@dataclass(frozen=True)
class Dpo:
    """The loss."""

    beta: float = 0.1
    """Multiplies the log-ratio difference; the larger, the nearer the policy stays to the ref."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be the wrong way round."""
    reward_margin: bool = False
    """Take the reward difference off beta times the log-ratio difference."""


@dataclass(frozen=True)
class Config(preferences.PairConfig):
    """Raise the chosen rollout's log-ratio over the rejected one's (arXiv 2305.18290)."""

    dpo: Dpo = field(default_factory=Dpo)
    turns: Literal["all", "forked"] = "all"
    """Which policy turns train: all up to the score turn, or the one at which the pair parts."""
    ref_model: str = execution("")
    """The reference, a model folder or a Hub id; empty: the base model."""
    lr: float = 5e-7
    """Peak learning rate."""

    def __post_init__(self) -> None:
        problems = self.pair_problems()
        if self.dpo.beta <= 0:
            problems.append(f"--dpo.beta {self.dpo.beta}: greater than 0")
        if not 0 <= self.dpo.label_smoothing < 0.5:
            problems.append(
                f"--dpo.label_smoothing {self.dpo.label_smoothing}: from 0 to below 0.5"
            )
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Load the pairs and their reference log-probs, train, save the policy."""
    from pipeline.sources import open_pairs

    pairs = open_pairs(config.task.query_dataset, config.turns)
    ref_model = config.ref_model or config.base_model
    named = {"base_model": config.base_model, "ref_model": ref_model}
    models = {role: store.fingerprint_model(name) for role, name in named.items()}
    output = store.begin_model(
        "dpo", config, config.output_dir, inputs=[pairs.repo], models=models, seed=config.seed
    )
    if output.finished:
        return
    from pipeline.losses import dpo
    from pipeline.models import finish_policy
    from pipeline.reference import COLUMN, prepare_with_reference
    from pipeline.training import fit

    place = preferences.place_of(config, pairs, output)
    ready, kept = prepare_with_reference(config, ref_model, models, place)
    splits = preferences.splits_of(kept, COLUMN, ready.longest(config.task.total_length))
    settings = (config.dpo.beta, config.dpo.label_smoothing, config.dpo.reward_margin)
    trainer = preferences.trainer_of(
        config,
        ready,
        lambda logps_N, batch: dpo(*preferences.differences(logps_N, batch, COLUMN), *settings),
    )
    last = fit(trainer, ready, splits, config, config.total_episodes, output)
    finish_policy(ready, output, config.precision, last, {k: len(v) for k, v in splits.items()})


if __name__ == "__main__":
    run(main, Config)
