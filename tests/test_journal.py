import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.journal import Journal, read_journal

RECORDS = [
    {"key": 1, "text": "ä\n{"},
    {"key": 2, "lone": "\ud800"},
    {"key": 3, "list": [0.1, None]},
]


def written(path, records=RECORDS):
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def test_records_come_back_in_order_while_the_journal_is_open(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for record in RECORDS:
        journal.append(record)
    journal.sync()
    assert list(journal.records()) == RECORDS


def test_a_journal_torn_at_any_byte_keeps_every_whole_record_and_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = written(path)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = RECORDS[: content[:length].count(b"\n")]
        assert list(read_journal(path)) == whole, length
        journal = Journal(path)
        journal.append({"key": 4})
        journal.close()
        assert list(read_journal(path)) == [*whole, {"key": 4}], length


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = written(path, [{"key": 1}, {"text": "x" * 200_000}])
    path.write_bytes(content[:-1])
    Journal(path).close()
    assert path.read_bytes() == b'{"key": 1}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = written(path)
    path.write_bytes(content[:3] + b"\0\0" + content[5:])
    with pytest.raises(DataError, match=r"journal\.jsonl, line 1 is damaged"):
        list(read_journal(path))


def test_numpy_values_are_written_as_numbers(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path, [{"ids": np.array([1, 2], dtype=np.int32), "reward": np.float64(0.1)}])
    assert list(read_journal(path)) == [{"ids": [1, 2], "reward": 0.1}]


def test_what_a_journal_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="can't hold set"):
        Journal(tmp_path / "journal.jsonl").append({"x": {1}})
