"""What our own code costs: time of a turn with engines that cost nothing, memory by size of run."""

from pathlib import Path
from typing import Any

from _servers_part import POLICY_8B, USER_70B, Seen, make_world, play_ours, two_servers
from _stage import Taken, generate
from _wired import write_policy

from pipeline.environments.guessing_game import corpus
from pipeline.tiny import make_tokenizer

BENCH = Path(__file__).parent
GAME_TURNS = 3
LENGTHS = ("length_median", "length_sigma")


def measure_overhead(work: Path, games: tuple[int, int], dialogues: int) -> dict[str, float]:
    """Measure the scripted engine in two sizes, whose difference is free of start and end, and
    `dialogues` over HTTP.
    """
    small, large = scripted(work, games)
    print("\n| scripted engine, dialogues | policy turns | wall s | processor s | peak MB |")
    print("|---:|---:|---:|---:|---:|")
    for count, taken in zip(games, (small, large), strict=True):
        print(
            f"| {count} | {count * GAME_TURNS} | {taken.wall_s:.1f} | {taken.cpu_s:.1f} "
            f"| {taken.peak_rss_mb:.0f} |"
        )
    turns = GAME_TURNS * (games[1] - games[0])
    print(f"\nscripted: {1e3 * (large.wall_s - small.wall_s) / turns:.3f} ms of wall a policy turn")
    return {
        "overhead_ms_per_turn": round(over_http(work / "http", dialogues), 3),
        "peak_rss_mb_100k": round(large.peak_rss_mb),
    }


def scripted(work: Path, games: tuple[int, int]) -> list[Taken]:
    """Play guessing games with a script that says the same thing at once."""
    work.mkdir(parents=True, exist_ok=True)
    policy = write_policy(work / "policy", make_tokenizer(corpus(), 512, 512))
    flags: dict[str, Any] = {
        "model": policy,
        "engine": "scripted",
        "script": "_scripted:seven",
        "environment": "guessing_game",
        "dataset": "guessing_game",
        "plan": "independent",
        "group_size": 1,
        "num_turns": GAME_TURNS,
        "maxlen": 8,
    }
    env = {"PYTHONPATH": str(BENCH)}
    return [generate(work / f"games-{count}", env, num_data=count, **flags) for count in games]


def over_http(work: Path, count: int) -> float:
    """Return the stage's processor milliseconds of a policy turn with its share of replies.

    Lengths of contexts and answers are those of the other part; no latency at all. What counts is
    between the first request and the last answer.
    """
    world = make_world(work, count)
    policy, user = ({name: costs[name] for name in LENGTHS} for costs in (POLICY_8B, USER_70B))
    with two_servers(world, policy, user) as servers:
        taken = play_ours(world, servers, work, plan="independent", group_size=1)
        seen = Seen(servers[0].stats(), servers[1].stats())
    begun, ended = seen.between_s
    cpu_ms = 1e3 * taken.cpu_between(begun, ended)
    (turns, read, said), (replies, _, _) = seen.work
    print(
        f"over HTTP: {turns} policy turns (contexts of {read / turns:.0f} ids, answers of "
        f"{said / turns:.0f}) and {replies} replies in {ended - begun:.1f} s\n"
        f"processor: {cpu_ms / turns:.3f} ms a policy turn, {cpu_ms / (turns + replies):.3f} ms a "
        f"request; the stage's start and its repo: {taken.cpu_s - cpu_ms / 1e3:.1f} s"
    )
    return cpu_ms / turns
