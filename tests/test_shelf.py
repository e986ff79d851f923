"""Prompts on disk: order, duplicates, and what is noted of the journal."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.records import Prompt
from pipeline.shelf import Played, Shelf


def prompt(name: str, text: str = "") -> Prompt:
    return Prompt(name, [{"role": "user", "content": text or name}], {"k": [1]}, tools="[]")


@pytest.fixture(params=["memory", "file"])
def shelf(request, tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "prompts.db" if request.param == "file" else None)


def test_prompts_come_back_whole_and_in_the_order_of_pythons_strings(shelf: Shelf) -> None:
    names = ["b", "a", "é", "\ud800", "\U0001f600", "Z", "aa", ""]
    for name in names:
        assert shelf.add(prompt(name), f"content of {name}") is None
    assert list(shelf) == [prompt(name) for name in sorted(names)]
    assert list(shelf.ids()) == sorted(names)
    assert len(shelf) == len(names)


def test_duplicates_and_taken_ids_are_told_apart(shelf: Shelf) -> None:
    assert shelf.add(prompt("1"), "x") is None
    assert shelf.add(prompt("1"), "x") == "duplicate"
    assert shelf.add(prompt("2"), "x") == "duplicate"
    assert shelf.add(prompt("1"), "y") == "prompt_id_taken"
    assert list(shelf.ids()) == ["1"]


def test_ranks_rise_and_equals_are_in_key_order(shelf: Shelf) -> None:
    ranks = {"a": -2, "b": -5.5, "c": -2, "d": -5.5, "e": -1}
    for name in "cabde":
        shelf.add(prompt(name), name)
    ordered = [p.prompt_id for p in shelf.by_rank(ranks.__getitem__)]
    assert ordered == ["b", "d", "a", "c", "e"]


def test_a_prompt_may_be_noted_while_others_are_taken(shelf: Shelf) -> None:
    for name in "abc":
        shelf.add(prompt(name), name)
    seen = []
    for taken in shelf:
        shelf.note(taken.prompt_id, Played(0, len(seen), 1, False))
        seen.append(taken.prompt_id)
    assert seen == ["a", "b", "c"]


def test_a_later_note_replaces_an_earlier_one_and_tells_it(shelf: Shelf) -> None:
    first, other = Played(1, 100, 3, True), Played(0, 50, 2, False)
    assert shelf.note("p", first) is None
    assert shelf.note("p", other) is None
    assert shelf.note("a", Played(0, 7, 1, False)) is None
    assert shelf.note("p", Played(1, 200, 5, False)) == first
    assert shelf.played("p") == [other, Played(1, 200, 5, False)]
    assert list(shelf.places()) == [7, 50, 200]
    assert shelf.played("nobody") == []


def test_dropped_rows_are_in_the_order_of_the_source(shelf: Shelf) -> None:
    shelf.drop(5, "b")
    shelf.drop(2, "a")
    assert list(shelf.dropped()) == [{"row": 2, "reason": "a"}, {"row": 5, "reason": "b"}]


def test_an_old_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.db"
    before = Shelf(path)
    before.add(prompt("old"), "old")
    before.close()
    assert list(Shelf(path)) == []
    path.write_bytes(b"torn")
    assert list(Shelf(path)) == []


def test_memory_is_flat(tmp_path: Path) -> None:
    """200,000 prompts of 1 kB take a few MB, not their 200 MB."""
    code = """
import resource, sys
from pathlib import Path
from pipeline.records import Prompt
from pipeline.shelf import Played, Shelf
shelf = Shelf(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for n in range(200_000):
    shelf.add(Prompt(str(n), [{"role": "user", "content": str(n) * 150}]), str(n))
    shelf.note(str(n), Played(0, n, 1, False))
assert sum(1 for _ in shelf.by_rank(int)) == 200_000
assert sum(shelf.places()) == 200_000 * 199_999 // 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "prompts.db")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert int(done.stdout) < 64 * 1024  # kB
