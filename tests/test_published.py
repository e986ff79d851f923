import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store
from pipeline.errors import DataError, RowError
from pipeline.examples import check_pair
from pipeline.published import pair_from_published
from pipeline.records import Segment, Span
from pipeline.rows import pair_from_row
from pipeline.sources import open_pairs
from pipeline.text_rows import fork_of, prompt_id_of, rollouts_of_text, text_rollouts
from stages.tokenize_masks import Config, main
from templates import make_tokenizer
from tests import multiturn

SIDES = ("chosen", "reject")


def slowly(row: dict[str, Any]) -> dict[str, Any]:
    """Read one row by one, in lists: what the arrays must equal."""
    texts = [[{k: v for k, v in m.items() if v is not None} for m in row[s]] for s in SIDES]
    fork = fork_of(*texts)
    found: dict[str, Any] = {
        "prompt_id": prompt_id_of(texts[0]),
        "branch_turn": fork,
        "score_turn": sum(m["role"] == "assistant" for m in texts[0]) - 1,
    }
    for side in SIDES:
        padded = list(row[f"{side}_token"])
        while padded and padded[-1] == multiturn.PAD:
            padded.pop()
        mask = list(row[f"{side}_mask"])[: len(padded)]
        starts = [i for i, bit in enumerate(mask) if bit and not (i and mask[i - 1])]
        ends = [i + 1 for i, bit in enumerate(mask) if bit and not any(mask[i + 1 : i + 2])]
        first = (fork or 0) if len(starts) == 1 else 0
        found[f"{side}_token"], found[f"{side}_mask"] = padded, mask
        found[f"{side}_segments"] = [{"start": 0, "length": len(padded), "keep": 0}]
        found[f"{side}_spans"] = [
            {"turn": first + k, "start": start, "end": end}
            for k, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        found[f"{side}_reward"] = row[f"{side}_reward"]
    ids = [list(zip(found[f"{side}_token"], found[f"{side}_mask"], strict=True)) for side in SIDES]
    pairs = enumerate(zip(*ids, strict=False))
    found["prefix_length"] = next((i for i, (a, b) in pairs if a != b), min(map(len, ids)))
    return found


def why_not(pair: dict[str, Any], max_length: int) -> str | None:
    trained = [
        [i for i, bit in zip(pair[f"{s}_token"], pair[f"{s}_mask"], strict=True) if bit]
        for s in SIDES
    ]
    rewards = [pair[f"{side}_reward"] for side in SIDES]
    if any(reward is None or math.isnan(reward) for reward in rewards):
        return "no_reward"
    if not all(trained):
        return "empty_response"
    if max(len(pair[f"{side}_token"]) for side in SIDES) > max_length:
        return "too_long"
    if trained[0] == trained[1]:
        return "same_response"
    return "tie" if rewards[0] == rewards[1] else None


def a_row(draw: random.Random) -> dict[str, Any]:
    """Return a row with any of the defects, of any lengths, padded or full."""
    row: dict[str, Any] = {}
    shared = draw.choices([5, 6, multiturn.PAD], [5, 5, 1], k=draw.randint(0, 6))
    for side in SIDES:
        ids = [*shared, *draw.choices([5, 6, 7], k=draw.randint(0, 5))]
        mask = draw.choices([0, 1], k=len(ids)) if draw.random() < 0.9 else [0] * len(ids)
        mask[:1] = [0] * len(ids[:1])  # nothing precedes it
        blanks = draw.choice([0, 3, 20])
        row[f"{side}_token"] = ids + [multiturn.PAD] * blanks
        row[f"{side}_mask"] = mask + [0] * blanks
        row[f"{side}_reward"] = draw.choice([0.5, 0.25, 0.75, 1.5, None, float("nan")])
        said = [{"role": r, "content": f"{r} {i}"} for i in (0, 1) for r in ("user", "assistant")]
        said[draw.randrange(4)]["content"] = draw.choice(["user 0", "x", "y"])
        row[side] = said[: draw.choice([1, 2, 4])]
    return row


def test_arrays_read_what_lists_do(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [a_row(draw) for _ in range(1500)]
    repo = tokenize(tmp_path, rows, max_length=8)
    pairs, dropped, seen = [], [], Counter[str]()
    for row in rows:
        pair = slowly(row)
        first = 2 * seen[pair["prompt_id"]]
        seen[pair["prompt_id"]] += 1
        if reason := why_not(pair, 8):
            samples = [first, first + 1]
            dropped.append({"prompt_id": pair["prompt_id"], "samples": samples, "reason": reason})
        else:
            pairs.append(pair | {"chosen_sample": first, "reject_sample": first + 1})
    assert [json.loads(line) for line in (repo.path / "dropped.jsonl").open()] == dropped
    read = repo.table()
    assert read.num_rows == len(pairs) > 100
    for name in pairs[0]:
        assert read.column(name).to_pylist() == [pair[name] for pair in pairs], name


def test_a_mask_that_is_too_short_is_named(tmp_path: Path) -> None:
    row = published_row([4, 5], [6])
    row["reject_mask"] = row["reject_mask"][:2]
    with pytest.raises(DataError, match="row 0 of a batch: reject_mask has 2 entries for 4 ids"):
        tokenize(tmp_path, [row])


def published_row(chosen: list[int], reject: list[int]) -> dict[str, Any]:
    return multiturn.published_row(chosen, reject, width=12)


def test_a_published_pair_loses_its_padding() -> None:
    pair = pair_from_published(published_row([4, 5, 9], [4, 6]))
    assert pair.chosen.sequence.ids.tolist() == [1, 2, 3, 4, 5, 9]
    assert pair.chosen.sequence.mask.tolist() == [0, 0, 0, 1, 1, 1]
    assert pair.reject.sequence.ids.tolist() == [1, 2, 3, 4, 6]
    assert pair.chosen.sequence.segments == [Segment(0, 6, 0)]
    assert pair.chosen.sequence.spans == [Span(1, 3, 6)]
    # The longest common prefix: both answers begin with id 4.
    assert (pair.branch_turn, pair.score_turn, pair.prefix_length) == (1, 2, 4)
    assert (pair.chosen.reward, pair.reject.reward) == (0.5, 0.25)
    assert pair.chosen.sample_logprob is None
    check_pair(pair)


def tokenize(folder: Path, rows: list[dict[str, Any]], **options: Any) -> store.Repo:
    source = folder / "source"
    source.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), source / "train.parquet")
    target = str(folder / "pairs")
    main(Config(input_repo=str(source), output_repo=target, test_size=0, **options))
    return store.open_repo(target)


def test_tokenize_masks_reads_published_pairs(tmp_path: Path) -> None:
    tie = published_row([7], [8]) | {"chosen_reward": 0.25}
    rows = [published_row([4, 5], [6]), published_row([5], [6]), tie, published_row([5], [5])]
    rows.append(published_row([5, 5, 5, 5, 5, 5], [6]))
    repo = tokenize(tmp_path, rows, max_length=8)
    pairs = [pair_from_row(row) for row in repo.table().to_pylist()]
    assert [p.chosen.sequence.ids.tolist() for p in pairs] == [[1, 2, 3, 4, 5], [1, 2, 3, 5]]
    # One prompt, so keys are told apart by their samples.
    assert [(p.chosen.sample, p.reject.sample) for p in pairs] == [(0, 1), (2, 3)]
    assert len({p.prompt_id for p in pairs}) == 1
    assert repo.manifest is not None
    assert repo.manifest["dropped"] == {"same_response": 1, "tie": 1, "too_long": 1}


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_training_reads_a_published_dataset_as_pairs_of_ours(tmp_path: Path, kind: Any) -> None:
    # Rows of 2048 ids as they lie on the Hub: a train split only, and sums that belong to a model.
    rows = [
        multiturn.published_row([4, 5, 9], [4, 6]),
        multiturn.published_row([7], [8]) | {"chosen_reward": 0.25},
        multiturn.published_row([5], [6]),
        multiturn.published_row([5], []),
    ]
    folder = tmp_path / "published"
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    for side in ("chosen", "reject"):
        for name in (f"{side}_token", f"{side}_mask"):
            at, column = table.schema.get_field_index(name), table.column(name)
            table = table.set_column(at, name, column.cast(kind(pa.int64())))
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=2)
    source, dropped = open_pairs(str(folder)), []

    read = [row for batch in source.batches("train", dropped=dropped) for row in batch.to_pylist()]

    pairs = [pair_from_row(row) for row in read]
    assert source.splits() == ["train"]
    assert [p.chosen.sequence.ids.tolist() for p in pairs] == [[1, 2, 3, 4, 5, 9], [1, 2, 3, 5]]
    assert [p.reject.sequence.mask.tolist() for p in pairs] == [[0, 0, 0, 1, 1], [0, 0, 0, 1]]
    assert [(p.chosen.sample, p.reject.sample) for p in pairs] == [(0, 1), (4, 5)]
    assert [(p.branch_turn, p.score_turn) for p in pairs] == [(1, 2)] * 2
    assert [(row["split"], row["reason"]) for row in dropped] == [
        ("train", "tie"),
        ("train", "empty_response"),
    ]
    # What training reads of it, without what it doesn't.
    (batch,) = source.batches("train", ["prompt_id", "chosen_reward"])
    assert batch.schema.names == ["prompt_id", "chosen_reward"]
    assert batch.column("chosen_reward").to_pylist() == [0.5, 0.5]


def test_a_published_pair_that_trains_its_first_id_is_named(tmp_path: Path) -> None:
    row = multiturn.published_row([4], [5])
    row["reject_mask"][0] = 1
    name = multiturn.published_repo(tmp_path / "published", [row])

    with pytest.raises(DataError, match=r"samples 0 and 1 \(reject\): the first id trains"):
        list(open_pairs(name).batches("train"))


def test_masks_of_several_blocks_are_the_turns_of_the_policy(tmp_path: Path) -> None:
    # The layout of DPO pairs over whole dialogues: an answer of one id, a question, an answer.
    row = multiturn.published_row([4, 5, 6], [7, 8, 9])
    for side in ("chosen", "reject"):
        row[side] = row[side][:4]
        row[f"{side}_mask"][:6] = [0, 1, 0, 0, 1, 1]
    name = multiturn.published_repo(tmp_path / "published", [row])

    (batch,) = open_pairs(name, "all").batches("train")
    (pair,) = map(pair_from_row, batch.to_pylist())
    assert pair.chosen.sequence.spans == [Span(0, 1, 2), Span(1, 4, 6)]
    assert pair.chosen.sequence.mask.tolist() == [0, 1, 0, 0, 1, 1]
    (batch,) = open_pairs(name, "forked").batches("train")
    (pair,) = map(pair_from_row, batch.to_pylist())
    assert pair.reject.sequence.mask.tolist() == [0, 0, 0, 0, 1, 1]


def test_published_pairs_hold_their_forked_turn_only(tmp_path: Path) -> None:
    name = multiturn.published_repo(tmp_path / "published", [multiturn.published_row([4], [5])])

    assert open_pairs(name, "forked").turns == "mask"
    with pytest.raises(DataError, match="one trained turn each: use --turns forked"):
        open_pairs(name, "all")


def test_published_pairs_are_no_groups(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--format pairs"):
        tokenize(tmp_path, [published_row([4], [5])], format="groups")


HH = {
    "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: More?\n\nAssistant: The answer.",
    "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: More?\n\nAssistant: No.",
}


def test_a_pair_of_texts_parts_at_its_last_answer() -> None:
    chosen, rejected = rollouts_of_text(HH)
    assert chosen.branch_turn == rejected.branch_turn == 1
    assert chosen.rewards == [None, 1.0]
    assert rejected.rewards == [None, 0.0]
    assert chosen.prompt_id == rejected.prompt_id
    assert chosen.turns is None
    scored = rollouts_of_text(HH | {"score_chosen": 7, "score_rejected": 3.5})
    assert [rollout.rewards for rollout in scored] == [[None, 7.0], [None, 3.5]]


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("not_a_dialogue", {"rejected": "What?"}),
        ("not_a_dialogue", {"rejected": [{"role": "user"}]}),
        ("not_a_pair", {"rejected": HH["chosen"]}),
        ("not_a_pair", {"rejected": "\n\nHuman: Other?\n\nAssistant: No."}),
    ],
)
def test_texts_that_are_no_pair(reason: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        rollouts_of_text(HH | changes)
    assert caught.value.reason == reason
    assert [
        d[0]["reason"] for r, d in text_rollouts([HH | changes], rollouts_of_text) if not r
    ] == [reason]


def test_tokenize_masks_reads_pairs_of_texts(tmp_path: Path) -> None:
    make_tokenizer("llama3").save_pretrained(tmp_path / "model")
    other = HH | {"rejected": HH["rejected"] + "\n\nHuman: Oh."}
    rows = [HH, HH | {"chosen": HH["chosen"][:-1]}, HH, other, HH | {"rejected": "?"}]
    repo = tokenize(tmp_path, rows, tokenizer=str(tmp_path / "model"))
    tokenizer = make_tokenizer("llama3")
    for pair in (pair_from_row(row) for row in repo.table().to_pylist()):
        chosen, reject = pair.chosen.sequence, pair.reject.sequence
        said = tokenizer.decode(chosen.ids[chosen.mask == 1].tolist())
        assert said in ("The answer.<|eot_id|>", "The answer<|eot_id|>")
        assert tokenizer.decode(reject.ids[reject.mask == 1].tolist()) == "No.<|eot_id|>"
        prefix = tokenizer.decode(chosen.ids[: pair.prefix_length].tolist())
        assert prefix.endswith("More?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert repo.num_rows() == 2
    assert repo.manifest is not None
    # What somebody said after the last answer is nothing that trains.
    assert repo.manifest["dropped"] == {"duplicate": 2, "not_a_dialogue": 1}


def test_the_row_that_is_wrong_is_named_not_the_one_before(tmp_path: Path) -> None:
    rows = [published_row([4], [6]), published_row([5], [6])]
    for row in rows:  # without padding, so that the masks of two rows touch
        row["chosen_token"], row["chosen_mask"] = row["chosen_token"][:4], row["chosen_mask"][:4]
    rows[1]["chosen_mask"][0] = 1
    assert rows[0]["chosen_mask"][-1] == 1
    with pytest.raises(DataError, match=r"samples 2 and 3 \(chosen\): the first id trains"):
        tokenize(tmp_path, rows)
