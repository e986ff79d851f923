import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import store
from pipeline.errors import DataError
from pipeline.records import RANKED, ROLLOUTS, Rollout
from pipeline.rows import group_from_row, pair_from_row, rollout_row
from play import messages_of, played
from small_repos import Config as RepoConfig
from stages.tokenize_masks import Config, main
from templates import make_tokenizer


def write(path: Path, rollouts: Iterable[Rollout], schema: pa.Schema = RANKED) -> str:
    rows = [rollout_row(rollout) for rollout in rollouts]
    run = store.begin("rank", "ranked", RepoConfig(), str(path), seed=7)
    run.write({"train": pa.Table.from_pylist(rows, schema=schema)}, counts={})
    return str(path)


def refuel_rollouts(prompts: int) -> list[Rollout]:
    """Two rollouts of each prompt that part at turn 1; every fifth prompt is a tie."""
    return [
        played(
            [[1, 2], [3 + sample, p % 7], [5]],
            prompt_id=f"p{p:03d}",
            sample=sample,
            branch_turn=1,
            rewards=[0.0, 0.0, 0.5 if p % 5 == 0 else float(sample)],
        )
        for p in range(prompts)
        for sample in range(2)
    ]


def tokenize(source: str, target: Path, **options: Any) -> store.Repo:
    main(Config(input_repo=source, output_repo=str(target), **options))
    return store.open_repo(str(target))


def pairs_of(repo: store.Repo, split: str) -> list[Any]:
    return [pair_from_row(row) for row in repo.table(split).to_pylist()]


def test_pairs_are_written_with_every_drop_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "ranked", refuel_rollouts(40))
    repo = tokenize(source, tmp_path / "pairs", test_size=8)
    train, test = pairs_of(repo, "train"), pairs_of(repo, "test")
    assert (len(train), len(test)) == (24, 8)
    for pair in train + test:
        assert (pair.chosen.sample, pair.reject.sample) == (1, 0)
        last = int(pair.prompt_id[1:]) % 7
        assert pair.chosen.sequence.ids.tolist() == [10, 20, 1, 2, 11, 21, 4, last]
        assert pair.reject.sequence.ids.tolist() == [10, 20, 1, 2, 11, 21, 3, last]
        assert pair.chosen.sequence.mask.tolist() == [0] * 6 + [1, 1]
        assert pair.chosen.sample_logprob.tolist() == [-2.0, -3.0]
        assert (pair.branch_turn, pair.score_turn, pair.prefix_length) == (1, 2, 6)
    dropped = [json.loads(line) for line in (repo.path / "dropped.jsonl").open()]
    assert dropped[0] == {"prompt_id": "p000", "sample": 0, "reason": "tie"}
    assert len(dropped) == 16
    assert repo.manifest is not None
    assert repo.manifest["dropped"] == {"tie": 16}
    *lines, unchecked = capsys.readouterr().out.strip().splitlines()
    assert "nothing here tells its size" in unchecked
    assert dict(line.rsplit(None, 1) for line in lines) == {
        "rows read": "80",
        "pairs in train": "24",
        "pairs in test": "8",
        "dropped: tie": "16",
    }


def test_the_split_is_seeded_and_by_prompt(tmp_path: Path) -> None:
    source = write(tmp_path / "ranked", refuel_rollouts(40))

    def names(folder: str, **options: Any) -> list[set[str]]:
        repo = tokenize(source, tmp_path / folder, format="groups", mask="all", **options)
        splits = ("train", "test")
        return [set(repo.table(s, ["prompt_id"]).column(0).to_pylist()) for s in splits]

    train, test = names("a", test_size=0.25)
    assert len(test) == 10
    assert not train & test
    assert names("b", test_size=10) == [train, test]
    assert names("c", test_size=10, seed=1)[1] != test
    # However many are asked for, one prompt trains.
    assert [len(split) for split in names("d", test_size=500)] == [1, 39]


def test_without_a_test_split(tmp_path: Path) -> None:
    source = write(tmp_path / "ranked", refuel_rollouts(4))
    assert tokenize(source, tmp_path / "pairs", test_size=0).splits() == ["train"]


def test_the_same_input_gives_the_same_bytes_and_a_second_run_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "ranked", refuel_rollouts(40))
    first, second = (tokenize(source, tmp_path / name) for name in "ab")
    assert first.content_hash == second.content_hash
    capsys.readouterr()
    assert tokenize(source, tmp_path / "a").content_hash == first.content_hash
    assert "rows read" not in capsys.readouterr().out


def test_rollouts_in_another_order_give_the_same_pairs(tmp_path: Path) -> None:
    rollouts = refuel_rollouts(12)
    ordered = tokenize(write(tmp_path / "ranked", rollouts), tmp_path / "pairs")
    mixed = write(tmp_path / "mixed", rollouts[::2] + rollouts[1::2])
    assert tokenize(mixed, tmp_path / "other").content_hash == ordered.content_hash


def test_groups_with_advantages(tmp_path: Path) -> None:
    source = write(tmp_path / "ranked", refuel_rollouts(6))
    options = {"format": "groups", "mask": "all", "advantages": "centred", "test_size": 0}
    repo = tokenize(source, tmp_path / "groups", **options)
    examples = [group_from_row(row) for row in repo.table().to_pylist()]
    by_key = {(e.prompt_id, e.sample): e for e in examples}
    assert len(by_key) == 12
    np.testing.assert_array_equal(by_key["p001", 1].advantage, np.full(5, 0.5, np.float32))
    np.testing.assert_array_equal(by_key["p005", 1].advantage, np.zeros(5, np.float32))
    sequence = by_key["p001", 1].sequence
    assert sequence.ids[sequence.mask == 1].tolist() == [1, 2, 4, 1, 5]


def test_sft_reads_what_generate_wrote(tmp_path: Path) -> None:
    rollouts = [played([[1], [2]], prompt_id=f"p{i}", rewards=None) for i in range(3)]
    source = write(tmp_path / "rollouts", rollouts, ROLLOUTS)
    repo = tokenize(source, tmp_path / "groups", format="groups", mask="all", test_size=0)
    assert repo.table().column("reward").to_pylist() == [None] * 3
    assert repo.table().column("advantage").to_pylist() == [None] * 3


def test_text_needs_a_tokenizer_and_then_its_ids_are_in_the_vocabulary(tmp_path: Path) -> None:
    rollouts = [
        played(
            [[1]],
            prompt_id=f"p{i // 2}",
            sample=i % 2,
            turns=None,
            messages=messages_of([f"Answer {i}."]),
            rewards=[float(i)],
        )
        for i in range(4)
    ]
    source = write(tmp_path / "ranked", rollouts)
    with pytest.raises(DataError, match="--tokenizer MODEL"):
        tokenize(source, tmp_path / "pairs", mask="last")
    folder = tmp_path / "model"
    tokenizer = make_tokenizer("llama3")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    options: dict[str, Any] = {"mask": "last", "tokenizer": str(folder), "test_size": 0}
    repo = tokenize(source, tmp_path / "others", **options)
    said = [
        tokenizer.decode(pair.chosen.sequence.ids[pair.chosen.sequence.mask == 1].tolist())
        for pair in pairs_of(repo, "train")
    ]
    assert said == ["Answer 1.<|eot_id|>", "Answer 3.<|eot_id|>"]
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50}))
    with pytest.raises(DataError, match=r"prompt p0, samples 1 and 0 .*a vocabulary of 50"):
        tokenize(source, tmp_path / "more", **options)


def test_rewards_are_missing(tmp_path: Path) -> None:
    rollouts = [played([[1]], rewards=None)]
    source = write(tmp_path / "rollouts", rollouts, ROLLOUTS)
    with pytest.raises(DataError, match=r"'rewards' \(stages/rank.py writes it\)"):
        tokenize(source, tmp_path / "pairs", mask="last")


def test_nothing_is_left(tmp_path: Path) -> None:
    ties = [r for r in refuel_rollouts(6) if r.prompt_id in ("p000", "p005")]
    source = write(tmp_path / "ranked", ties)
    with pytest.raises(DataError, match="tie: 4"):
        tokenize(source, tmp_path / "pairs")


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    rollouts = refuel_rollouts(2)
    source = write(tmp_path / "ranked", [rollouts[0], *rollouts])
    with pytest.raises(DataError, match="prompt p000 has two rollouts of one sample"):
        tokenize(source, tmp_path / "pairs")


def test_every_problem_of_a_config_is_told_at_once() -> None:
    with pytest.raises(DataError) as caught:
        Config(format="triples", mask="some", max_length=1, test_size=1.5)
    for told in ("--input_repo", "--output_repo", "triples", "some", "--max_length", "--test_size"):
        assert told in str(caught.value)


def test_rows_with_ids_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    source = write(tmp_path / "ranked", refuel_rollouts(4))
    code = (
        "import sys; from stages.tokenize_masks import Config, main\n"
        f"main(Config(input_repo={source!r}, output_repo={str(tmp_path / 'pairs')!r}))\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
