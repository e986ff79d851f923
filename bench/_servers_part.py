"""Generation against two simulated servers: how near to the busier engine's bound it comes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _barrier_way import play_with_barriers
from _servers import Simulated, simulated_server
from _stage import Taken, generate
from _wired import texts_of, wired_tokenizer, write_policy, write_prompts, write_user

from pipeline.plans import plan_for
from pipeline.prompts import load_prompts

TURNS = 5
MAX_TOKENS = (1024, 512)
CONTEXT = 8192
# What real serving looks like, of models of these sizes in bfloat16 on H100s (3.35 TB/s and about
# 400 TFLOP/s in practice each): a step reads the weights once, 16 GB in 5 ms on one GPU, 141 GB in
# 11 ms on four, and kernels, sampling and communication add half of that again; each row adds the
# reading of its keys and values (128 KB an id for 8B, 320 KB for 70B, some 1,000 ids) and its share
# of the scheduler. An id costs 2 FLOP a parameter to read. A response to a math question has some
# 200 ids; a user gives a reason in a sentence or two, then asks.
POLICY_8B = {
    "slots": 256,
    "step_ms": 8.0,
    "row_ms": 0.08,
    "prefill_ids_per_s": 25_000.0,
    "cache_blocks": 25_000,
    "length_median": 200.0,
    "length_sigma": 0.6,
}
USER_70B = {
    "slots": 128,
    "step_ms": 18.0,
    "row_ms": 0.2,
    "prefill_ids_per_s": 11_000.0,
    "cache_blocks": 29_000,
    "length_median": 64.0,
    "length_sigma": 0.4,
}


@dataclass(frozen=True)
class World:
    """Models whose tokenizers and names the servers stand in for, and prompts."""

    work: Path
    policy: Path
    user: Path
    prompts: Path
    count: int
    opening_ids: str
    corpus: Path

    @property
    def models(self) -> tuple[Path, Path]:
        return self.policy, self.user


def make_world(work: Path, count: int) -> World:
    """Write tiny models and `count` prompts into a folder."""
    work.mkdir(parents=True, exist_ok=True)
    prompts = work / "prompts.jsonl"
    print(f"{work.name}: {write_prompts(prompts, count)}")
    texts = texts_of(prompts)
    tokenizer = wired_tokenizer(texts, CONTEXT)
    said = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
    # What is said is text: of ids drawn one by one, words would come out that nobody writes, which
    # take a tokenizer three times as long.
    copies = -(-4 * MAX_TOKENS[0] // len(said))
    np.save(work / "corpus.npy", np.tile(np.asarray(said), copies))
    opening = tokenizer("Question:", add_special_tokens=False).input_ids
    return World(
        work,
        write_policy(work / "policy", tokenizer),
        write_user(work / "user", tokenizer),
        prompts,
        count,
        ",".join(map(str, opening)),
        work / "corpus.npy",
    )


@dataclass(frozen=True)
class Seen:
    """What the servers of policy and user saw of one way."""

    policy: dict[str, Any]
    user: dict[str, Any]

    @property
    def both(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.policy, self.user

    @property
    def between_s(self) -> tuple[float, float]:
        """The moments of the first request at either server and of the last answer of either."""
        begun = [stats["first_s"] for stats in self.both if stats["first_s"]]
        return min(begun), max(stats["last_s"] for stats in self.both)

    @property
    def wall_s(self) -> float:
        begun, ended = self.between_s
        return ended - begun

    @property
    def bound_s(self) -> float:
        """Seconds in which the busier engine does the same with every slot busy all the time.

        The same includes reading again what its cache had lost: who overflows the cache raises this
        bound, so that the wall itself is to be looked at too.
        """
        return max(stats["busy_slot_s"] / stats["slots"] for stats in self.both)

    @property
    def work(self) -> list[tuple[int, int, int]]:
        """What was asked and said: the same for two ways that do the same."""
        names = ("requests", "prompt_ids", "response_ids")
        return [tuple(stats[name] for name in names) for stats in self.both]


@contextmanager
def two_servers(
    world: World, policy: dict[str, Any], user: dict[str, Any], **common: Any
) -> Iterator[tuple[Simulated, Simulated]]:
    """Serve both parties; what they say are pieces of the dialogues that the prompts are from."""
    ids = {"corpus": world.corpus, "max_model_len": CONTEXT}
    opening = {"opening_ids": world.opening_ids}
    with (
        simulated_server(str(world.policy), **ids, **(policy | common)) as one,
        simulated_server(str(world.user), **ids, **opening, **(user | common)) as other,
    ):
        yield one, other


def play_ours(
    world: World, servers: tuple[Simulated, Simulated], work: Path, **flags: Any
) -> Taken:
    """Run the stage against the servers."""
    policy, user = servers
    return generate(
        work,
        model=world.policy,
        user_model=world.user,
        dataset=world.prompts,
        num_data=world.count,
        num_turns=TURNS,
        maxlen=MAX_TOKENS[0],
        user_maxlen=MAX_TOKENS[1],
        engine="vllm",
        policy_url=policy.url,
        user_url=user.url,
        **flags,
    )


def compare(
    world: World, name: str, policy: dict[str, Any], user: dict[str, Any], in_flight: int
) -> tuple[float, float]:
    """Measure ours and the barriers; return our wall by the bound, and theirs by ours."""
    with two_servers(world, policy, user) as servers:
        taken = play_ours(world, servers, world.work / name, concurrency=in_flight)
        ours = Seen(servers[0].stats(), servers[1].stats())
    with two_servers(world, policy, user) as servers:
        prompts = load_prompts(str(world.prompts), "train", world.count, 0, False)
        openings = [(each, plan_for("refuel", 0, each.prompt_id, TURNS, 2)) for each in prompts]
        urls = servers[0].url, servers[1].url
        play_with_barriers(openings, world.models, urls, MAX_TOKENS, in_flight)
        theirs = Seen(servers[0].stats(), servers[1].stats())
    # The prefix cache differs, and what is cached; what was asked and said doesn't.
    assert ours.work == theirs.work, f"the ways differ: {ours.work}, {theirs.work}"
    _show(name, ours, theirs, taken)
    return ours.wall_s / ours.bound_s, theirs.wall_s / ours.wall_s


def _show(name: str, ours: Seen, theirs: Seen, taken: Taken) -> None:
    print(f"\n{name}: first request to last answer, real seconds\n")
    print("| way | wall s | policy busy | user busy | policy cached | user cached |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, seen in (("stages/generate.py", ours), ("turn barriers", theirs)):
        busy = [f"{stats['busy_slot_s'] / stats['slots'] / seen.wall_s:.0%}" for stats in seen.both]
        cached = [f"{stats['cached_ids'] / stats['prompt_ids']:.0%}" for stats in seen.both]
        print(f"| {way} | {seen.wall_s:.1f} | {' | '.join(busy + cached)} |")
    (turns, _, said), (replies, _, asked) = ours.work
    print(f"\n{turns} policy turns of {said} ids, {replies} replies of {asked} ids")
    print(
        f"bound {ours.bound_s:.1f} s; the stage with its start and its repo: {taken.wall_s:.1f} s, "
        f"{taken.cpu_s:.1f} s of processor, peak {taken.peak_rss_mb:.0f} MB"
    )


def measure_servers(work: Path, count: int, time_scale: float, in_flight: int) -> dict[str, float]:
    """Compare where both engines are about equally busy, and where the user is 3 times busier."""
    world = make_world(work, count)
    policy, user = ({**costs, "time_scale": time_scale} for costs in (POLICY_8B, USER_70B))
    bound, barrier = compare(world, "as busy", policy, user, in_flight)
    faster = policy | {"time_scale": 3 * time_scale}
    further = compare(world, "policy 3 times as fast", faster, user, in_flight)
    print(f"\npolicy 3 times as fast: {further[0]:.3f} of the bound, barriers {further[1]:.2f}")
    return {"wall_vs_bound": round(bound, 3), "wall_vs_barrier": round(barrier, 2)}
