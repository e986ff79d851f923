"""Generate dialogues of a policy with its environment, and write them as a rollouts repo.

python stages/generate.py --model POLICY --output_repo ./rollouts
"""

import asyncio
import importlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import store
from pipeline.config import execution, run
from pipeline.engines import ENGINES
from pipeline.environments import ENVIRONMENTS, NEEDS_USER_MODEL
from pipeline.errors import DataError
from pipeline.plans import PLANS, Plan, plan_for

if TYPE_CHECKING:
    from pipeline.engines.base import Engine
    from pipeline.prompts import Prompt, Prompts
    from pipeline.records import Rollout
    from pipeline.rollout import Table


@dataclass(frozen=True)
class Config:
    """Generate dialogues turn by turn and write a rollouts repo."""

    model: str = execution("meta-llama/Meta-Llama-3-8B-Instruct")
    """Policy: a folder or a Hub id."""
    user_model: str = execution("meta-llama/Meta-Llama-3.1-70B-Instruct")
    """User model of the simulated_user environment: a folder or a Hub id."""
    dataset: str = "openbmb/UltraInteract_pair"
    """Where prompts come from: a JSONL file, a dataset repo, or guessing_game[:HIGHEST]."""
    dataset_split: str = "train"
    """Split of the dataset."""
    num_data: int = 0
    """How many prompts to keep after duplicates are dropped; 0 keeps all."""
    num_turns: int = 5
    """Policy turns of a full dialogue (H)."""
    temperature: float = 0.8
    """Sampling temperature of the policy and of the user model; 0 is greedy."""
    maxlen: int = 1024
    """Most new ids of one turn, for the policy and for the user model."""
    top_p: float = 1.0
    """Nucleus sampling of the policy; below 1 the engine's log-probs are not kept."""
    top_k: int = 0
    """Top-k sampling of the policy; 0 is off, otherwise the engine's log-probs are not kept."""
    world_size: int = execution(1)
    """GPUs of each started vLLM server (tensor parallel)."""
    seed: int = 0
    """Run seed; every utterance's seed follows from it, the prompt, the sample and the turn."""
    output_dir: str = execution("")
    """Folder for server logs; it is also the output repo where --output_repo is not given."""
    output_repo: str = execution("")
    """Where to write: ./folder, or org/name on the Hub."""
    public: bool = execution(False)
    """Make a Hub repo public; it is private otherwise."""
    environment: str = "simulated_user"
    """Who answers the policy: simulated_user, fixed_user or guessing_game."""
    plan: str = "refuel"
    """Which rollouts a prompt gets: refuel, refuel_uniform, independent or fork_geometric."""
    group_size: int = 2
    """Rollouts of a prompt under independent and fork_geometric (G)."""
    full_dialogues: bool = False
    """Play every turn of each dialogue, also those after its score turn that nothing reads."""
    last_reply: bool = False
    """Play the reply after the score turn too, for rewards that read it."""
    engine: str = "hf"
    """What runs the policy: hf (in this process), vllm (servers) or scripted."""
    user_engine: str = ""
    """What runs the user model; the policy's engine when empty."""
    script: str = ""
    """What the scripted engine says: a known script or module:function."""
    policy_url: tuple[str, ...] = execution(())
    """Attach to these servers for the policy instead of starting one."""
    user_url: tuple[str, ...] = execution(())
    """Attach to these servers for the user model instead of starting one."""
    policy_gpus: str = execution("")
    """GPUs of a started policy server, such as 0,1; all that are visible when empty."""
    user_gpus: str = execution("")
    """GPUs of a started user-model server, such as 2,3; all that are visible when empty."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations: auto (as saved), float32 or bfloat16."""
    device: str = execution("auto")
    """Where the hf engine runs: auto, cpu, cuda or cuda:N."""
    max_model_len: int = 0
    """Longest context in ids; 0 takes the model's own."""
    concurrency: int = execution(512)
    """Prompts in play at the same time."""
    max_batch_tokens: int = execution(131072)
    """Ids in one batch of the hf engine, new ones included."""
    max_batch_rows: int = execution(512)
    """Requests in one batch of the hf engine."""
    server_args: tuple[str, ...] = execution(())
    """Further arguments of a started vLLM server, such as --gpu-memory-utilization=0.8."""
    trust_remote_code: bool = False
    """Run code that a model repo brings along."""

    def __post_init__(self) -> None:
        known: list[tuple[str, Iterable[str], str]] = [
            (self.plan, PLANS, "--plan"),
            (self.environment, ENVIRONMENTS, "--environment"),
            (self.engine, ENGINES, "--engine"),
            (self.user_engine or self.engine, ENGINES, "--user_engine"),
        ]
        problems = [
            f"{flag} {value}: known are {', '.join(names)}"
            for value, names, flag in known
            if value not in set(names)
        ]
        if not self.output_repo and not self.output_dir:
            problems.append("--output_repo is missing: ./folder, or org/name on the Hub")
        if "scripted" in (self.engine, self.user_engine) and not self.script:
            problems.append("--engine scripted needs --script")
        if (self.environment == "guessing_game") != self.dataset.startswith("guessing_game"):
            problems.append("--environment guessing_game and --dataset guessing_game go together")
        for name, least in [("num_turns", 1), ("maxlen", 1), ("group_size", 1), ("concurrency", 1)]:
            if getattr(self, name) < least:
                problems.append(f"--{name} {getattr(self, name)}: at least {least}")
        if self.num_data < 0 or self.temperature < 0:
            problems.append("--num_data and --temperature can't be negative")
        if problems:
            raise DataError("; ".join(problems))

    @property
    def repo(self) -> str:
        return self.output_repo or self.output_dir


def main(config: Config) -> None:
    """Play what is missing of each prompt's rollouts, then write them in key order."""
    from pipeline.prompts import load_prompts, source_of

    output = store.begin(
        "generate",
        "rollouts",
        config,
        config.repo,
        inputs=source_of(config.dataset),
        models=_fingerprints(config),
        seed=config.seed,
        public=config.public,
    )
    if output.finished:
        return
    prompts = load_prompts(
        config.dataset,
        config.dataset_split,
        config.num_data,
        config.seed,
        keep_user_turns=config.environment == "fixed_user",
    )
    plans = {
        prompt.prompt_id: plan_for(
            config.plan, config.seed, prompt.prompt_id, config.num_turns, config.group_size
        )
        for prompt in prompts.prompts
    }
    with closing(output.journal()) as journal:
        done = _finished(journal)
        asyncio.run(_play(config, output, prompts.prompts, plans, done, journal))
    _write(output, prompts)


def _fingerprints(config: Config) -> dict[str, str]:
    models = {"model": config.model}
    if config.environment in NEEDS_USER_MODEL:
        models["user_model"] = config.user_model
    return {name: store.fingerprint_model(model) for name, model in models.items()}


def _finished(journal: store.Journal) -> dict[str, list["Rollout"]]:
    """Return what an earlier run finished, by prompt."""
    from pipeline.rows import rollout_from_row

    done: dict[str, list[Rollout]] = {}
    for row in journal.records():
        done.setdefault(row["prompt_id"], []).append(rollout_from_row(row))
    return done


async def _play(
    config: Config,
    output: store.Run,
    prompts: list["Prompt"],
    plans: dict[str, Plan],
    done: dict[str, list["Rollout"]],
    journal: store.Journal,
) -> None:
    from tqdm import tqdm

    from pipeline.rollout import play_all
    from pipeline.rows import rollout_row

    total = sum(plan.samples for plan in plans.values())
    with tqdm(total=total, initial=sum(map(len, done.values())), unit="rollout") as bar:

        def finished(rollout: "Rollout") -> None:
            journal.append(rollout_row(rollout))
            bar.update()

        jobs = [(p, plans[p.prompt_id], done.get(p.prompt_id, [])) for p in prompts]
        missing = [job for job in jobs if not _is_whole(job[1], job[2])]
        if not missing:
            return
        async with AsyncExitStack() as opened:
            table = _open_table(config, output, finished, opened)
            await play_all(missing, table, config.concurrency)


def _is_whole(plan: Plan, done: list["Rollout"]) -> bool:
    """Whether nothing of a prompt is left to play; one that ended before its fork is alone."""
    reached = all(len(rollout.turns or []) > (plan.branch_turn or 0) for rollout in done)
    return len(done) == plan.samples or (bool(done) and not reached)


def _open_table(
    config: Config, output: store.Run, finished: Any, opened: AsyncExitStack
) -> "Table":
    """Load policy and user model, which `opened` closes, and sit them down at a table."""
    from pipeline.chat import load_chat
    from pipeline.engines.base import Sampling
    from pipeline.engines.rounds import Rounds
    from pipeline.environments.simulated_user import User
    from pipeline.rollout import Table, TemplateContext

    rounds = Rounds()
    chat = load_chat(config.model, output.date, config.trust_remote_code)
    policy = _open_engine(config, output, "policy", chat.tokenizer, rounds)
    opened.push_async_callback(policy.close)
    user = None
    if config.environment in NEEDS_USER_MODEL:
        user_chat = load_chat(config.user_model, output.date, config.trust_remote_code)
        asking = _open_engine(config, output, "user", user_chat.tokenizer, rounds)
        opened.push_async_callback(asking.close)
        user = User(asking, user_chat, Sampling(config.temperature, config.maxlen))
    return Table(
        run_seed=config.seed,
        engine=policy,
        chat=chat,
        sampling=Sampling(config.temperature, config.maxlen, config.top_p, config.top_k),
        context=TemplateContext(chat),
        environment=_build(ENVIRONMENTS[config.environment])(config, user),
        rounds=rounds,
        finished=finished,
        least_turns=config.num_turns if config.full_dialogues else 0,
        play_last_reply=config.last_reply,
    )


def _open_engine(
    config: Config, output: store.Run, party: str, tokenizer: Any, rounds: Any
) -> "Engine":
    from pipeline.engines.base import EngineOptions

    is_user = party == "user"
    logs = Path(config.output_dir) if config.output_dir else output.work
    options = EngineOptions(
        rounds=rounds,
        dtype=config.dtype,
        device=config.device,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_rows=config.max_batch_rows,
        urls=config.user_url if is_user else config.policy_url,
        gpus=config.user_gpus if is_user else config.policy_gpus,
        tensor_parallel=config.world_size,
        max_model_len=config.max_model_len,
        log_dir=logs,
        script=config.script,
        trust_remote_code=config.trust_remote_code,
        extra_args=config.server_args,
    )
    engine = (config.user_engine or config.engine) if is_user else config.engine
    model = config.user_model if is_user else config.model
    return _build(ENGINES[engine])(model, tokenizer, options)


def _build(dotted: str) -> Any:
    module, _, function = dotted.partition(":")
    return getattr(importlib.import_module(module), function)


def _write(output: store.Run, prompts: "Prompts") -> None:
    """Write the journal's rollouts in key order, with the counts people ask for."""
    import pyarrow as pa

    from pipeline.records import ROLLOUTS

    with closing(output.journal()) as journal:
        rows = sorted(journal.records(), key=lambda row: (row["prompt_id"], row["sample"]))
    counts = _counts(rows)
    batches = (
        pa.RecordBatch.from_pylist(rows[start : start + 1024], schema=ROLLOUTS)
        for start in range(0, len(rows), 1024)
    )
    output.write(
        {"train": batches},
        dropped=prompts.dropped,
        counts={"rows_in": prompts.rows, "rows_out": len(rows), **counts},
    )
    print(", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print(f"{len(rows)} rollouts of {len(prompts.prompts)} prompts are in {output.name.text}")


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count rollouts by status and by how they ended, turns by how they stopped, ids, retries."""
    counts = Counter(f"status_{row['status']}" for row in rows)
    counts += Counter(f"end_{row['end_reason']}" for row in rows)
    turns = [turn for row in rows for turn in row["turns"]]
    counts += Counter(f"finish_{turn['finish_reason']}" for turn in turns)
    counts["response_ids"] = sum(len(turn["response_ids"]) for turn in turns)
    retries = (json.loads(row["info"]).get("user_retries", {}) for row in rows)
    counts["user_retries"] = sum(sum(by_turn.values()) for by_turn in retries)
    return counts


if __name__ == "__main__":
    run(main, Config)
