import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import shards
from pipeline.errors import DataError
from pipeline.records import ROLLOUTS
from small_repos import batches, shard_hashes, table


def write(folder, splits):
    return shards.write_shards(splits, folder, folder / ".turnwise")


def test_bytes_depend_on_the_rows_and_not_on_how_they_came(tmp_path):
    # 8 kB a row, so that a row group is longer than a page and the batches' borders could show.
    draws = np.random.default_rng(0)
    texts = pa.array([draws.bytes(4000).hex() for _ in range(1500)])
    whole = table(1500).append_column("text", texts)
    write(tmp_path / "whole", {"train": whole})
    for size in (1, 37, 512, 1500):
        write(tmp_path / f"by-{size}", {"train": batches(whole, size)})
        assert shard_hashes(tmp_path / f"by-{size}") == shard_hashes(tmp_path / "whole"), size


def test_shards_are_bounded_and_keep_rows_and_schema(tmp_path):
    count = shards.ROWS_PER_GROUP * shards.GROUPS_PER_SHARD + 3
    numbers = pa.table({"n": pa.array(range(count), pa.int32())})
    entries = write(tmp_path, {"train": numbers})
    assert [(e["path"], e["split"], e["rows"]) for e in entries] == [
        ("data/train-00000-of-00002.parquet", "train", count - 3),
        ("data/train-00001-of-00002.parquet", "train", 3),
    ]
    paths = [tmp_path / e["path"] for e in entries]
    assert pq.ParquetFile(paths[0]).metadata.num_row_groups == shards.GROUPS_PER_SHARD
    assert shards.read_table(paths, None).equals(numbers)
    read = [b.num_rows for b in shards.read_batches(paths, ["n"], 4096)]
    assert sum(read) == count == shards.count_rows(paths)
    assert max(read) <= 4096


def test_the_arrow_schema_survives(tmp_path):
    (entry,) = write(tmp_path, {"train": table(2)})
    assert shards.read_schema(tmp_path / entry["path"]).equals(ROLLOUTS)


def test_a_split_without_rows_is_not_written(tmp_path):
    entries = write(tmp_path, {"train": table(1), "test": table(0), "dev": iter(())})
    assert [e["split"] for e in entries] == ["train"]
    assert list(shard_hashes(tmp_path)) == ["train-00000-of-00001.parquet"]


def test_shards_left_by_a_killed_run_are_removed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00009.parquet").write_bytes(b"old")
    write(tmp_path, {"train": table(1)})
    assert list(shard_hashes(tmp_path)) == ["train-00000-of-00001.parquet"]


@pytest.mark.parametrize("name", ["../up", "a-b", "", "0"])
def test_a_split_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="a split can't be named"):
        write(tmp_path, {name: table(1)})
    assert list(tmp_path.rglob("*.parquet")) == []


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_text("no")
    with pytest.raises(DataError, match=r"train\.parquet is no parquet file"):
        shards.read_schema(path)
