import json

import pytest

from pipeline import store
from pipeline.errors import DataError
from small_repos import Config, table, write_rollouts


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_with_what_differs(tmp_path, finished):
    out = tmp_path / "out"
    run = store.begin("generate", "rollouts", Config(), str(out), models={"policy": "a"}, seed=7)
    run.journal().append({"key": 1})
    if finished:
        run.write({"train": table(1)}, counts={})
    with pytest.raises(DataError) as caught:
        store.begin(
            "generate",
            "rollouts",
            Config(temperature=1.0),
            str(out),
            models={"policy": "b"},
            seed=8,
        )
    message = str(caught.value)
    assert "  config.temperature: 0.8 -> 1.0\n" in message
    assert '  models.policy: "a" -> "b"\n' in message
    assert "  seed: 7 -> 8\n" in message
    assert "config.seed" not in message
    assert f"Give another --output_repo, or start over after: rm -r {out}" in message
    again = store.begin("generate", "rollouts", Config(), str(out), models={"policy": "a"}, seed=7)
    assert again.finished is finished
    assert finished or list(again.journals()) == [{"key": 1}]


def test_an_input_with_other_rows_is_another_configuration(tmp_path):
    first = write_rollouts(tmp_path / "a", 3)
    moved = write_rollouts(tmp_path / "b", 3)
    other = write_rollouts(tmp_path / "c", 4)
    out = str(tmp_path / "out")
    store.begin("rank", "ranked", Config(), out, inputs=[first]).write(
        {"train": table(1)}, counts={}
    )
    assert store.begin("rank", "ranked", Config(), out, inputs=[moved]).finished
    with pytest.raises(DataError, match=f"inputs: .*{first.content_hash}.*{other.content_hash}"):
        store.begin("rank", "ranked", Config(), out, inputs=[other])


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path):
    out = tmp_path / "thesis"
    (out / "data").mkdir(parents=True)
    (out / "data" / "train-00000-of-00001.parquet").write_bytes(b"precious")
    (out / "chapter.tex").write_text("precious")
    before = {p: (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in out.rglob("*")}
    with pytest.raises(DataError, match=r"holds something else \(chapter\.tex, data\)"):
        store.begin("generate", "rollouts", Config(), str(out))
    assert before == {
        p: (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in out.rglob("*")
    }
    with pytest.raises(DataError, match="is a file"):
        store.begin("generate", "rollouts", Config(), str(out / "chapter.tex"))


def test_an_empty_folder_can_be_an_output(tmp_path):
    (tmp_path / "out").mkdir()
    assert write_rollouts(tmp_path / "out").num_rows() == 5


def test_the_date_is_pinned_at_the_first_start(tmp_path):
    out = tmp_path / "out"
    store.begin("generate", "rollouts", Config(), str(out))
    state = json.loads((out / ".turnwise" / "run.json").read_text())
    state |= {"date": "2024-02-29", "started": "2024-02-29T23:59:59+00:00"}
    (out / ".turnwise" / "run.json").write_text(json.dumps(state))
    run = store.begin("generate", "rollouts", Config(), str(out))
    assert run.date == "2024-02-29"
    assert run.write({"train": table(1)}, counts={}).manifest["date"] == "2024-02-29"
    assert store.begin("generate", "rollouts", Config(), str(out)).date == "2024-02-29"


def test_ranks_have_journals_of_their_own_and_rank_0_reads_all(tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    main = store.begin("rank", "ranked", Config(), out)
    main.journal("journal-00000").append({"key": 0})
    monkeypatch.setenv("RANK", "1")
    other = store.begin("rank", "ranked", Config(), out)
    other.journal("journal-00001").append({"key": 1})
    assert other.date == main.date
    monkeypatch.setenv("RANK", "0")
    assert list(main.journals()) == [{"key": 0}, {"key": 1}]


def test_an_output_cannot_have_a_revision():
    with pytest.raises(DataError, match="can't have a revision"):
        store.begin("generate", "rollouts", Config(), "org/name@v1")
