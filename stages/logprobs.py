"""Compute the log-probs of a policy, a reference or both once, for every run that needs them.

accelerate launch --config_file accelerate_cfgs/multi_gpu.yaml stages/logprobs.py \
    --query_dataset org/pairs --cluster my_cluster --base_model meta-llama/Meta-Llama-3-8B-Instruct

Trainers do this by themselves; run it to have the numbers ready, on another machine for example.
"""

from dataclasses import dataclass, replace
from typing import Literal

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError
from pipeline.start import LoadConfig


@dataclass(frozen=True)
class Config(LoadConfig):
    """Keep old and reference log-probs of pairs or groups in {query_dataset}_{cluster}."""

    ref_model: str = execution("")
    """The reference, a model folder or a Hub id: its log-probs are written as ref_logprob."""
    query_dataset: str = execution("")
    """Repo of pairs or groups, written by tokenize_masks, or a published REFUEL dataset."""
    cluster: str = execution("")
    """Tag of the repo that is written: {query_dataset}_{cluster}."""
    temperature: float = 0.8
    """Temperature that the rows were sampled at; log-probs are those of logits / temperature."""
    turns: Literal["mask", "all", "forked"] = "mask"
    """Of pairs, which policy turns train: those of the repo's mask, all, or the forked one."""

    def __post_init__(self) -> None:
        names = ("query_dataset", "cluster")
        problems = [f"--{name} is missing" for name in names if not getattr(self, name)]
        if not (self.base_model or self.ref_model):
            problems.append("--base_model (old log-probs) and --ref_model: one at least is missing")
        problems += self.load_problems()
        if self.temperature <= 0:
            problems.append(f"--temperature {self.temperature}: greater than 0")
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Load one model after the other, and compute or reuse its log-probs."""
    from pipeline import logprob_keys
    from pipeline.reference import fill_from_disk, refuse_two_models
    from pipeline.sources import open_source
    from pipeline.strategy import start, stop

    source = open_source(config.query_dataset, config.turns)
    named = {column: getattr(config, flag) for column, flag in logprob_keys.MODELS.items()}
    named = {column: name for column, name in named.items() if name}
    fingerprints = {column: store.fingerprint_model(name) for column, name in named.items()}
    accelerator = start(config.precision, config.num_processes)
    if len(named) > 1:
        refuse_two_models(accelerator)
    place = logprob_keys.cluster_place(source, config.cluster)
    for column, name in named.items():
        model = replace(config, base_model=name)
        asked = (column, fingerprints[column])
        fill_from_disk(model, config.temperature, accelerator, place, *asked)
        what = logprob_keys.NAMES[column]
        accelerator.print(f"{what} of {config.query_dataset} are in {place.folder}")
    stop(accelerator)


if __name__ == "__main__":
    run(main, Config)
