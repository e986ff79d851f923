"""Compute a policy's log-probs of pairs once, for every run that starts from it.

accelerate launch --config_file accelerate_cfgs/multi_gpu.yaml stages/logprobs.py \
    --query_dataset org/pairs --cluster my_cluster --base_model meta-llama/Meta-Llama-3-8B-Instruct

Trainers do this by themselves; run it to have the numbers ready, on another machine for example.
"""

from dataclasses import dataclass

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError
from pipeline.start import LoadConfig, layout_of, load


@dataclass(frozen=True)
class Config(LoadConfig):
    """Keep a policy's old log-probs in {query_dataset}_{cluster}."""

    query_dataset: str = execution("")
    """Repo of pairs, written by tokenize_masks."""
    cluster: str = execution("")
    """Tag of the repo that is written: {query_dataset}_{cluster}."""
    temperature: float = 0.8
    """Temperature that the pairs were sampled at; log-probs are those of logits / temperature."""

    def __post_init__(self) -> None:
        names = ("base_model", "query_dataset", "cluster")
        problems = [f"--{name} is missing" for name in names if not getattr(self, name)]
        problems += self.load_problems()
        if self.temperature <= 0:
            problems.append(f"--temperature {self.temperature}: greater than 0")
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Load the policy, and compute or reuse the log-probs."""
    pairs = store.open_repo(config.query_dataset)
    fingerprint = store.fingerprint_model(config.base_model)
    from pipeline import cluster
    from pipeline.balance import Budget
    from pipeline.strategy import start, stop

    pairs.require(cluster.wanted())
    accelerator = start(config.precision, config.num_processes)
    policy, tokenizer = load(config, config.temperature, accelerator)
    key = cluster.key_of(
        tokenizer, config.temperature, config.precision, config.attn_implementation
    )
    place = cluster.cluster_place(
        config.query_dataset, config.cluster, pairs, key, (config.base_model, fingerprint)
    )
    policy = accelerator.prepare(policy)
    layout = layout_of(config, accelerator, policy)
    budget = Budget(config.tokens(accelerator), config.per_device_eval_batch_size, layout)
    scorer = cluster.Scorer(accelerator, policy, budget)
    repo = cluster.old_logprobs(scorer, place, pairs)
    accelerator.print(f"old log-probs of {config.query_dataset} are in {repo.name}")
    stop(accelerator)


if __name__ == "__main__":
    run(main, Config)
