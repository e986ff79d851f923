"""Compare policies turn by turn: mean score and win-rate against a baseline, with 95% intervals.

python stages/evaluate.py --input_repo ./ranked_start ./ranked_new --output_repo ./evaluation
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError


@dataclass(frozen=True)
class Config:
    """Compare ranked rollouts of several policies on the same prompts.

    Each input is made by generate (--plan independent, one --seed and one dataset for all) and rank
    (--turns all).
    """

    input_repo: tuple[str, ...] = execution(())
    """Ranked rollouts, one repo for each policy, in the order of the table."""
    baseline_repo: str = execution("")
    """Ranked rollouts that the others are compared with; the first input when empty."""
    output_repo: str = execution("")
    """Where to write the table and its picture: ./folder, or org/name on the Hub."""
    public: bool = execution(False)
    """Make a Hub repo public; it is private otherwise."""
    names: tuple[str, ...] = ()
    """Names of the policies in the table; those of the repos when empty."""
    split: str = "train"
    """Split of each repo."""
    require_gain: bool = execution(False)
    """Exit 1 unless the last policy's final-turn score is above the first's by both intervals."""

    def __post_init__(self) -> None:
        problems = []
        if not self.input_repo:
            problems.append("--input_repo is missing: the output of rank")
        if not self.output_repo:
            problems.append("--output_repo is missing: ./folder, or org/name on the Hub")
        if self.names and len(self.names) != len(self.input_repo):
            problems.append(f"--names has {len(self.names)}, --input_repo {len(self.input_repo)}")
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Score each policy at each turn, write the table, print it."""
    repos = [store.open_repo(name) for name in config.input_repo]
    baseline = store.open_repo(config.baseline_repo) if config.baseline_repo else repos[0]
    output = store.begin(
        "evaluate",
        "evaluation",
        config,
        config.output_repo,
        inputs=[*repos, baseline],
        public=config.public,
    )
    rows = _rows(output) if output.finished else _compare(config, repos, baseline)
    if not output.finished:
        _write(output, rows)
    _print(rows)
    if config.require_gain and not _gained(rows):
        raise SystemExit("the last final-turn score is not above the first's by both intervals")


def _rows(output: store.Run) -> list[dict[str, Any]]:
    return output.repo().table("train").to_pylist()


def _compare(
    config: Config, repos: Sequence[store.Repo], baseline: store.Repo
) -> list[dict[str, Any]]:
    from pipeline.comparison import compare, scores_by_prompt

    tables = [_rewards(repo, config.split) for repo in [baseline, *repos]]
    num_turns = max(len(rewards or []) for table in tables for _, rewards in table)
    base, *policies = [scores_by_prompt(table, num_turns) for table in tables]
    names = config.names or tuple(repo.name for repo in repos)
    rows = []
    for name, repo, policy in zip(names, repos, policies, strict=True):
        turns = compare(policy, base, num_turns)
        if not turns:
            raise DataError(
                f"{repo.name} and {baseline.name} share no prompt: generate both with the same"
                " --dataset, --num_data and --seed"
            )
        for turn in turns:
            rows.append(
                {
                    "policy": name,
                    "turn": turn.turn,
                    "prompts": turn.score.prompts,
                    "score": turn.score.mean,
                    "score_half_width": turn.score.half_width,
                    "win_rate": turn.win_rate.mean,
                    "win_rate_half_width": turn.win_rate.half_width,
                }
            )
    return rows


def _rewards(repo: store.Repo, split: str) -> list[tuple[str, list[float | None] | None]]:
    repo.require(["prompt_id", "rewards"])
    table = repo.table(split, ["prompt_id", "rewards"])
    return list(zip(table["prompt_id"].to_pylist(), table["rewards"].to_pylist(), strict=True))


def _write(output: store.Run, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    from pipeline.pictures import score_by_turn

    picture = score_by_turn(rows)
    output.write(
        {"train": pa.Table.from_pylist(rows)},
        counts={"rows_out": len(rows)},
        pictures={"score_by_turn.png": picture},
    )
    print(f"picture: {output.path / 'pictures' / 'score_by_turn.png'}")


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    turns = sorted({row["turn"] for row in rows})
    for column, title in [("score", "Score at turn"), ("win_rate", "Win-rate at turn")]:
        heads = [str(turn + 1) for turn in turns]
        table = Table(
            "policy", *heads, title=f"{title} (95% interval)", box=SIMPLE, padding=(0, 1, 0, 0)
        )
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = {row["turn"]: row for row in rows if row["policy"] == policy}
            table.add_row(policy, *(_cell(mine[turn], column) for turn in turns))
        Console().print(table)


def _cell(row: dict[str, Any], column: str) -> str:
    mean, half_width = row[column], row[f"{column}_half_width"]
    if mean is None or math.isnan(mean):
        return "-"
    return f"{mean:.3f}±{half_width:.3f}"


def _gained(rows: list[dict[str, Any]]) -> bool:
    from pipeline.comparison import Estimate, gained

    final = max(row["turn"] for row in rows)
    ends = [row for row in rows if row["turn"] == final]
    first, last = (
        Estimate(row["score"], row["score_half_width"], row["prompts"])
        for row in (ends[0], ends[-1])
    )
    return gained(first, last)


if __name__ == "__main__":
    run(main, Config)
