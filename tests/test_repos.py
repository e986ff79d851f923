import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import repos, store
from pipeline.errors import DataError
from small_repos import Config, rollout, write_rollouts


@pytest.mark.parametrize("text", ["./x", "/data/x", "../x", "~/x", "."])
def test_paths_are_folders(text):
    name = repos.parse_repo(text)
    assert (name.hub_id, name.revision) == (None, None)
    assert name.path.parts[-1:] == repos.Path(text).expanduser().parts[-1:]


@pytest.mark.parametrize(
    ("text", "hub_id", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1", "org/name", "v1"),
        ("org/name@refs/convert/parquet", "org/name", "refs/convert/parquet"),
        ("hf://datasets/org/name@v1", "org/name", "v1"),
    ],
)
def test_bare_names_are_hub_repos(tmp_path, monkeypatch, text, hub_id, revision):
    monkeypatch.chdir(tmp_path)
    assert repos.parse_repo(text) == repos.RepoName(text, hub_id, None, revision)


def test_a_name_that_could_be_both_is_refused_with_both_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match=r"write \./runs/a .* hf://datasets/runs/a for the Hub"):
        repos.parse_repo("runs/a")
    assert repos.parse_repo("./runs/a").path == repos.Path("runs/a")
    assert repos.parse_repo("hf://datasets/runs/a").hub_id == "runs/a"


@pytest.mark.parametrize("text", ["x", "a/b/c", "", "a b/c"])
def test_a_name_that_is_neither_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"write \./"):
        repos.parse_repo(text)


def test_the_local_copy_of_a_hub_repo_moves_with_turnwise_home(monkeypatch):
    monkeypatch.setenv("TURNWISE_HOME", "/data/tw")
    assert str(repos.parse_repo("org/name").folder) == "/data/tw/repos/org--name"
    monkeypatch.delenv("TURNWISE_HOME")
    assert repos.local_copy("o/n") == repos.Path.home() / ".cache/turnwise/repos/o--n"


def test_rollouts_come_back_as_they_were_written(tmp_path):
    repo = write_rollouts(tmp_path / "out", 3)
    assert list(repos.read_rollouts(repo)) == [rollout(0), rollout(1), rollout(2)]
    assert (repo.splits(), repo.num_rows()) == (["train"], 3)


def test_batches_stream_the_asked_for_columns(tmp_path):
    repo = write_rollouts(tmp_path / "out", 10)
    found = list(repo.batches(columns=["prompt_id"], batch_rows=4))
    assert [batch.num_rows for batch in found] == [4, 4, 2]
    assert found[2].to_pydict() == {"prompt_id": ["p0008", "p0009"]}
    assert repo.table(columns=["sample"]).column("sample").to_pylist() == [0, 1] * 5


def test_a_missing_column_names_the_stage_that_writes_it(tmp_path):
    repo = write_rollouts(tmp_path / "out")
    repo.require(["prompt_id", "turns"])
    with pytest.raises(DataError, match=r"no column 'rewards' \(stages/rank\.py writes it\)"):
        repo.require(["turns", "rewards"])
    with pytest.raises(DataError, match=r"'rewards'.*run stages/rank\.py first"):
        repo.batches(columns=["rewards"])
    with pytest.raises(DataError, match=r"no column 'colour'$"):
        repo.table(columns=["colour"])


def test_a_missing_split_is_named_with_those_there_are(tmp_path):
    repo = write_rollouts(tmp_path / "out")
    with pytest.raises(DataError, match="no split 'test'; it has: train"):
        repo.num_rows("test")


def test_a_shard_changed_after_the_manifest_is_found(tmp_path):
    repo = write_rollouts(tmp_path / "out")
    (shard,) = repo.files["train"]
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"data/train-00000-of-00001\.parquet isn't the file"):
        store.open_repo(str(tmp_path / "out"))
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet is missing"):
        store.open_repo(str(tmp_path / "out"))


def test_an_unfinished_output_names_the_command_that_resumes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stages/generate.py", "--num_data", "3"])
    run = store.begin("generate", "rollouts", Config(), str(tmp_path / "out"))
    run.journal().close()
    with pytest.raises(DataError, match=r"resume it with: .*stages/generate\.py --num_data 3"):
        store.open_repo(str(tmp_path / "out"))


def test_somebody_elses_parquet_files_open_by_split(tmp_path):
    for path in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"n": [1]}), tmp_path / path)
    (tmp_path / "default" / "test").mkdir(parents=True)
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "default" / "test" / "0000.parquet")
    repo = store.open_repo(str(tmp_path))
    assert repo.manifest is None
    assert {split: repo.num_rows(split) for split in repo.splits()} == {"train": 2, "test": 2}
    with pytest.raises(DataError, match=r"'messages' \(stages/generate\.py writes it\)"):
        next(repos.read_rollouts(repo))


def test_a_folder_without_data_and_a_folder_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no parquet files"):
        store.open_repo(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        store.open_repo(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a file, no folder"):
        store.open_repo(str(tmp_path / "file"))


def test_the_same_rows_have_the_same_content_hash_wherever_they_lie(tmp_path):
    first = write_rollouts(tmp_path / "a")
    second = write_rollouts(tmp_path / "b")
    other = write_rollouts(tmp_path / "c", count=6)
    assert first.content_hash == second.content_hash != other.content_hash
