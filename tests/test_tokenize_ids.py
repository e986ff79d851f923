"""tokenize_masks from sampled ids: whatever the input looks like, the pairs are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import defects
from pipeline import store
from pipeline.bulk import Selection
from pipeline.errors import DataError
from pipeline.prompt_batches import whole_prompts
from pipeline.records import RANKED, Rollout
from pipeline.rows import rollout_row
from pipeline.sifting import select_any, select_records
from play import played
from small_repos import Config as RepoConfig
from small_repos import shard_hashes
from stages.tokenize_masks import Config, main

ROOT = Path(__file__).parent.parent


def ranked(prompts: Sequence[Sequence[Rollout]]) -> pa.Table:
    rows = [rollout_row(rollout) for rollout in chain.from_iterable(prompts)]
    return pa.Table.from_pylist(rows, schema=RANKED)


def write(path: Path, rows: pa.Table) -> str:
    run = store.begin("rank", "ranked", RepoConfig(), str(path), seed=7)
    run.write({"train": rows}, counts={})
    return str(path)


def foreign(path: Path, *shards: pa.Table) -> str:
    """Write parquet files without a manifest, as anybody's dataset has them."""
    (path / "data").mkdir(parents=True)
    for i, rows in enumerate(shards):
        pq.write_table(rows, path / "data" / f"train-{i:05d}-of-{len(shards):05d}.parquet")
    return str(path)


def tokenize(source: str, target: Path, **options: Any) -> store.Repo:
    main(Config(input_repo=source, output_repo=str(target), **options))
    return store.open_repo(str(target))


def outcome(repo: store.Repo) -> tuple[list[Any], list[Any], Any]:
    """Return the rows of both splits, and every dropped row."""
    dropped = [json.loads(line) for line in (repo.path / "dropped.jsonl").open()]
    rows = [repo.table(split).to_pylist() for split in repo.splits()]
    assert repo.manifest is not None
    return rows, dropped, repo.manifest["dropped"]


def hostile(count: int = 300) -> list[list[Rollout]]:
    return defects.prompts(11, count, True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any], Any]:
    folder = tmp_path_factory.mktemp("reference")
    ordered = [sorted(prompt, key=lambda r: r.sample) for prompt in hostile()]
    return outcome(tokenize(write(folder / "ranked", ranked(ordered)), folder / "pairs"))


def test_samples_in_any_order(tmp_path: Path, reference: Any) -> None:
    repo = tokenize(write(tmp_path / "ranked", ranked(hostile())), tmp_path / "pairs")
    assert outcome(repo) == reference


def test_rows_in_any_order(tmp_path: Path, reference: Any) -> None:
    rows = ranked(hostile())
    mixed = rows.take(pa.array(np.random.default_rng(5).permutation(rows.num_rows)))
    assert outcome(tokenize(write(tmp_path / "ranked", mixed), tmp_path / "pairs")) == reference


@pytest.mark.parametrize("size", [1, 3, 50])
def test_prompts_split_over_shards(tmp_path: Path, reference: Any, size: int) -> None:
    rows = ranked(hostile())
    shards = [rows.slice(i, size) for i in range(0, rows.num_rows, size)]
    assert outcome(tokenize(foreign(tmp_path / "in", *shards), tmp_path / "pairs")) == reference


def widened(kind: pa.DataType) -> pa.DataType:
    """Return a type as other libraries would have chosen it."""
    if pa.types.is_list(kind):
        return pa.large_list(widened(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, widened(field.type)) for field in kind])
    if pa.types.is_int32(kind):
        return pa.int64()
    return pa.large_string() if pa.types.is_string(kind) else kind


def test_a_foreign_repo_with_other_types_and_without_what_is_optional(
    tmp_path: Path, reference: Any
) -> None:
    rows = ranked(hostile())
    wide = rows.cast(pa.schema([(f.name, widened(f.type)) for f in rows.schema]))
    wide = wide.drop_columns(["tools", "info", "reward_parts", "reward_model"])
    wide = wide.append_column("extra", pa.array(range(rows.num_rows)))
    assert outcome(tokenize(foreign(tmp_path / "in", wide), tmp_path / "pairs")) == reference


def test_an_id_that_is_no_int32_is_an_error(tmp_path: Path) -> None:
    rows = ranked([[played([[1]], rewards=[1.0])]])
    wide = rows.cast(pa.schema([(f.name, widened(f.type)) for f in rows.schema])).to_pylist()
    wide[0]["turns"][0]["response_ids"] = [2**40]
    schema = pa.schema([(f.name, widened(f.type)) for f in rows.schema])
    source = foreign(tmp_path / "in", pa.Table.from_pylist(wide, schema=schema))
    with pytest.raises(DataError, match=r"column 'turns' holds .*not in range"):
        tokenize(source, tmp_path / "pairs", mask="last")


@pytest.mark.parametrize(
    ("column", "told"), [("score_turn", "no column 'score_turn'"), ("sample", "no column 'sample'")]
)
def test_a_needed_column_is_missing(tmp_path: Path, column: str, told: str) -> None:
    rows = ranked([[played([[1]], rewards=[1.0])]]).drop_columns([column])
    with pytest.raises(DataError, match=told):
        tokenize(foreign(tmp_path / "in", rows), tmp_path / "pairs")


@pytest.mark.parametrize("column", ["prompt_id", "sample"])
def test_a_key_is_null(tmp_path: Path, column: str) -> None:
    rows = ranked([[played([[1]])]])
    kind = rows.schema.field(column).type
    at = rows.schema.get_field_index(column)
    rows = rows.set_column(at, column, pa.nulls(1, kind))
    with pytest.raises(DataError, match=f"no {column}"):
        tokenize(foreign(tmp_path / "in", rows), tmp_path / "pairs")


def test_text_between_ids_keeps_its_place(tmp_path: Path) -> None:
    """Prompts of text go another way; they come back in their order, with their drops."""
    prompts = defects.prompts(12, 200, True)
    for prompt in prompts[::3]:
        for rollout in prompt:
            rollout.turns, rollout.status = None, "failed"
    source = store.open_repo(write(tmp_path / "ranked", ranked(prompts)))
    rules: Any = _rules()
    together, alone = list[Selection](), list[Selection]()
    for batch in whole_prompts(source, "train", True):
        together.append(select_any(batch, "pairs", rules))
        alone.append(select_records(batch, "pairs", rules))
    assert sum(found.rows.num_rows for found in together) > 20
    for left, right in zip(together, alone, strict=True):
        assert left.rows.equals(right.rows)
        assert left.prompts.tolist() == right.prompts.tolist()
        assert left.dropped == right.dropped


def _rules() -> Any:
    from pipeline.selection import Rules

    def no_encoder() -> Any:
        raise AssertionError("failed rollouts aren't encoded")

    return Rules("forked", 100, no_encoder)


def test_ties_are_kept_when_asked(tmp_path: Path) -> None:
    two = [played([[1 + s]], sample=s, branch_turn=0, rewards=[0.5]) for s in range(2)]
    source = write(tmp_path / "ranked", ranked([two]))
    with pytest.raises(DataError, match="tie: 2"):
        tokenize(source, tmp_path / "none")
    row = tokenize(source, tmp_path / "kept", ties="keep").table().to_pylist()[0]
    assert (row["chosen_sample"], row["reject_sample"]) == (0, 1)


def test_one_prompt_of_64_samples(tmp_path: Path) -> None:
    rewards = np.random.default_rng(0).permutation(64).astype(float)
    many = [played([[s]], sample=s, rewards=[rewards[s]]) for s in range(64)]
    source = write(tmp_path / "ranked", ranked([many]))
    repo = tokenize(source, tmp_path / "pairs", mask="last")
    row = repo.table().to_pylist()[0]
    found = (row["chosen_sample"], row["reject_sample"])
    assert found == (rewards.argmax(), rewards.argmin())
    assert repo.manifest is not None
    assert repo.manifest["dropped"] == {"neither_best_nor_worst": 62}


def test_a_row_of_a_million_ids(tmp_path: Path) -> None:
    long = [
        played([[1] * 400_000, [2] * (600_000 + s)], sample=s, rewards=[0.0, float(s)])
        for s in range(2)
    ]
    source = write(tmp_path / "ranked", ranked([long]))
    repo = tokenize(source, tmp_path / "pairs", mask="all", max_length=2_000_000)
    (ids,) = repo.table().column("chosen_token").to_pylist()
    assert len(ids) == 1_000_005
    with pytest.raises(DataError, match="too_long: 2"):
        tokenize(source, tmp_path / "none", mask="all")


def test_no_rows_at_all(tmp_path: Path) -> None:
    source = foreign(tmp_path / "in", RANKED.empty_table())
    with pytest.raises(DataError, match="no row left to write"):
        tokenize(source, tmp_path / "pairs")


def stage(source: str, target: Path, before: str = "") -> list[str]:
    code = (
        f"{before}\nfrom stages.tokenize_masks import Config, main\n"
        f"main(Config(input_repo={source!r}, output_repo={str(target)!r}))"
    )
    return [sys.executable, "-c", code]


def started(target: Path) -> bool:
    return (target / ".turnwise" / "selected.arrow").exists()


def written(target: Path) -> bool:
    return any((target / "data").glob("*.parquet"))


@pytest.mark.parametrize("reached", [started, written])
def test_a_killed_run_is_run_again(
    tmp_path: Path, reference: Any, reached: Callable[[Path], bool]
) -> None:
    source, target = write(tmp_path / "ranked", ranked(hostile())), tmp_path / "pairs"
    # fsync is where a kill can be seen to fall between two steps.
    slow = "import os, time; sync = os.fsync; os.fsync = lambda f: (time.sleep(0.3), sync(f))"
    process = subprocess.Popen(stage(source, target, slow), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not reached(target):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (target / "turnwise.json").exists()
    (target / ".turnwise" / "selected.arrow").write_bytes(b"half a batch")
    with (target / ".turnwise" / "dropped.jsonl").open("ab") as file:
        file.write(b'{"prompt_id": "torn')
    again = tokenize(source, target)
    assert outcome(again) == reference
    assert not (target / ".turnwise").exists()
    whole = tokenize(source, tmp_path / "whole")
    assert shard_hashes(target) == shard_hashes(whole.path)


def test_a_full_disk_is_told_and_leaves_no_repo(tmp_path: Path) -> None:
    source, target = write(tmp_path / "ranked", ranked(hostile())), tmp_path / "pairs"
    # A limit on the size of a file: writing beyond it fails as a full disk does.
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "import sys\n"
        f"sys.argv[1:] = ['--input_repo', {source!r}, '--output_repo', {str(target)!r}]\n"
        "from pipeline.config import run; from stages.tokenize_masks import Config, main\n"
        "run(main, Config)"
    )
    command = [sys.executable, "-c", limit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith("error: no room is left to write ([Errno 27]")
    assert told.endswith("make some, then run the command again")
    assert not (target / "turnwise.json").exists()
    assert tokenize(source, target).num_rows() > 20


GENERATOR = ROOT / "tests" / "many_rollouts.py"


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """Peak memory of 60,000 rollouts is that of 20,000, but for the names of their prompts."""
    peaks = []
    for rollouts in (20_000, 60_000):
        source = tmp_path / str(rollouts)
        subprocess.run([sys.executable, GENERATOR, source, str(rollouts)], check=True, cwd=ROOT)
        command = stage(str(source), tmp_path / f"pairs-{rollouts}")
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(used.ru_maxrss / 1024)
    print(f"peak RSS: {peaks} MB")
    assert peaks[1] < peaks[0] + 100
    assert peaks[1] < 1000
