import re
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from pipeline import cards, store
from pipeline.records import ROLLOUTS, GroupExample, Segment, TrainingSequence, Turn
from pipeline.rows import group_row, rollout_row
from small_repos import Config, ranked_table, rollout, table, write_rollouts

NASTY = (
    "---\nlicense: gpl\n---\n```\n# Heading\n<script>alert(1)</script>\n````\n| a | b |\n"
    "~~~\r```\r\n\x1b[31m\u202e![x](http://evil)"
)


def card_of(path):
    return (Path(path) / "README.md").read_text()


def write_messages(path, texts):
    rows = []
    for index, text in enumerate(texts):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
        rows.append(rollout_row(rollout(index, messages=messages)))
    run = store.begin("generate", "rollouts", Config(), str(path))
    return run.write({"train": pa.Table.from_pylist(rows, schema=ROLLOUTS)}, counts={})


def test_datasets_loads_the_folder_as_it_is(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = store.begin("generate", "rollouts", Config(), str(tmp_path / "out"))
    run.write(
        {"train": table(3), "test": table(2)},
        counts={},
        dropped=[{"reason": "tie"}],
        pictures={"reward.png": b"png"},
    )
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 3, "test": 2}
    row = loaded["test"][1]
    assert row["turns"][0]["prompt_ids"] == [1, 2, 1]
    assert row["messages"][1]["content"] == "answer 1"


def test_the_hub_parses_the_front_matter(tmp_path):
    from huggingface_hub import DatasetCard

    write_rollouts(tmp_path / "out", card={"license": "mit", "language": ["en"]})
    data = DatasetCard.load(tmp_path / "out" / "README.md").data
    assert data.license == "mit"
    assert data.language == ["en"]
    assert data.tags == ["turnwise", "rollouts"]
    assert data.size_categories == ["n<1K"]
    assert data.configs == [
        {
            "config_name": "default",
            "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
        }
    ]


def test_a_card_tells_command_parents_and_drops(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stages/rank.py", "--prompts", "./parent"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    parent = write_rollouts(tmp_path / "parent")
    run = store.begin("rank", "rollouts", Config(), str(tmp_path / "out"), inputs=[parent])
    run.write(
        {"train": table(4)},
        counts={"rows_in": 7},
        dropped=[{"reason": "too_long"}] * 3,
        pictures={"reward by turn.png": b"png"},
        card={"tables": [{"title": "By game", "columns": ["game", "n"], "rows": [["a|b", 2]]}]},
    )
    card = card_of(tmp_path / "out")
    assert "```bash\npython stages/rank.py --prompts ./parent\n```" in card
    assert f"parent | local | {parent.content_hash[:16]} |" in card
    assert "| train | 4 |" in card
    assert "| rows&#95;in | 7 |" in card
    assert "| too&#95;long | 3 |" in card
    assert "## By game\n\n| game | n |\n|---|---|\n| a&#124;b | 2 |\n" in card
    assert "](pictures/reward%20by%20turn.png)" in card
    assert (tmp_path / "out" / "pictures" / "reward by turn.png").read_bytes() == b"png"
    assert f'load_dataset("{tmp_path / "out"}")' in card


def test_rewards_are_told_by_turn_and_no_score_is_no_reward(tmp_path):
    rewards = [[0.0, -99999.0], [1.0, 0.5], [None, 0.75]]
    run = store.begin("rank", "ranked", Config(), str(tmp_path / "out"))
    run.write({"train": ranked_table(rewards)}, counts={})
    card = card_of(tmp_path / "out")
    # turn 1: 0 and 1, sd sqrt(1/2); turn 2: 0.5 and 0.75, sd 0.125 sqrt(2), and one without
    assert "| 1 | 2 | 0.5 | 0.7071 | 0 |" in card
    assert "| 2 | 2 | 0.625 | 0.1768 | 1 |" in card
    assert "99999 |" not in card


def test_a_turn_without_any_score_has_no_mean(tmp_path):
    run = store.begin("rank", "ranked", Config(), str(tmp_path / "out"))
    run.write({"train": ranked_table([[0.5, -99999.0]])}, counts={})
    assert "| 1 | 1 | 0.5 | - | 0 |" in card_of(tmp_path / "out")
    assert "| 2 | 0 | - | - | 1 |" in card_of(tmp_path / "out")


def test_text_cannot_break_out_of_the_card(tmp_path):
    write_messages(tmp_path / "out", [NASTY, "plain"])
    card = card_of(tmp_path / "out")
    block = re.search(r"^(`{5,})text\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert "user: ---\nlicense: gpl" in block[2]
    outside = card.replace(block[0], "")
    assert "script" not in outside
    assert "gpl" not in outside
    assert [c for c in "\r\x1b\u202e" if c in card] == []
    front = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in front
    assert front["tags"] == ["turnwise", "rollouts"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b", "a&#124;b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("x\ny", "x&#10;y"),
        ("[l](u)", "&#91;l&#93;&#40;u&#41;"),
        ("`c`", "&#96;c&#96;"),
        (0.123456, "0.1235"),
        (12, "12"),
    ],
)
def test_plain_text_shows_as_it_is(value, shown):
    assert cards.plain(value) == shown


@pytest.mark.parametrize("text", ["x", "```", "a ````` b", "`" * 9])
def test_a_fence_is_longer_than_any_in_its_text(text):
    first, *middle, last = cards.fenced(text).split("\n")
    assert "\n".join(middle) == text
    assert set(last) == {"`"}
    assert first == last + "text"
    assert last not in text


def test_long_dialogues_are_cut_with_a_word_on_how_much():
    messages = [{"role": "user", "content": "x" * 1000}] + [{"role": "user", "content": ""}] * 20
    shown = cards.show_dialogue(messages)
    assert "x [... 300 more characters]" in shown
    assert shown.endswith("[... 9 more messages]")


def test_tool_calls_are_shown():
    call = {"id": "1", "name": "search", "arguments": '{"q": 1}'}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert cards.show_dialogue([message]) == 'assistant: search({"q": 1})'


def test_lengths_count_the_last_context_with_its_response(tmp_path):
    # 4 + 2, then 3 of those kept, 1 new and 5 sampled: 9.
    turns = [Turn(0, [1] * 4, [2] * 2, None, "stop"), Turn(3, [1], [2] * 5, None, "stop")]
    row = rollout_row(rollout(0, turns=turns))
    run = store.begin("generate", "rollouts", Config(), str(tmp_path / "out"))
    text_only = rollout_row(rollout(1, turns=None))
    split = pa.Table.from_pylist([row, text_only, row], schema=ROLLOUTS)
    repo = run.write({"train": split}, counts={})
    facts = cards.gather(repo.path, repo.manifest)
    assert facts.lengths == {9: 2}


def test_a_histogram_covers_every_length_with_few_bars():
    drawn = cards.histogram({0: 1, 5: 40, 119: 20}).splitlines()
    assert len(drawn) == 12
    assert drawn[0].split() == ["0", "-", "9", "41", "█" * 40]
    assert drawn[-1].split() == ["110", "-", "119", "20", "█" * 20]
    assert cards.histogram({}) == ""
    assert cards.histogram({7: 3}).split()[:4] == ["7", "-", "7", "3"]


def test_groups_show_lengths_and_no_dialogue(tmp_path):
    import numpy as np

    from pipeline.records import GROUPS

    ids = np.arange(6, dtype=np.int32)
    sequence = TrainingSequence(ids, np.ones(6, dtype=np.uint8), [Segment(0, 6, 0)], [])
    row = group_row(GroupExample("p", 0, sequence, 0.5, None))
    run = store.begin("tokenize_masks", "groups", Config(), str(tmp_path / "out"))
    run.write({"train": pa.Table.from_pylist([row], schema=GROUPS)}, counts={})
    card = card_of(tmp_path / "out")
    assert "6 - 6" in card
    assert "Sample dialogues" not in card


@pytest.mark.parametrize("kind", store.KINDS)
def test_every_kind_has_a_template(tmp_path, kind):
    run = store.begin("stage", kind, Config(), str(tmp_path / "out"))
    run.write({"train": pa.table({"n": [1]})}, counts={})
    card = card_of(tmp_path / "out")
    assert card.count("\n# ") == 1
    assert "\n\n\n" not in card


def test_sizes_have_the_hubs_names():
    sizes = [cards.size_category(n) for n in (1, 999, 1000, 99_999, 100_000, 2_000_000)]
    assert sizes == ["n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]


def test_a_models_card_names_hub_parents_only():
    model = {"kind": "model", "models": {"base_model": {"name": "meta/llama"}}, "inputs": []}
    front = yaml.safe_load(cards.front_matter(model, {}).split("---\n")[1])
    assert front["base_model"] == "meta/llama"
    model["models"]["base_model"]["name"] = "./policy"
    model["inputs"] = [{"name": "org/pairs"}, {"name": "./pairs"}]
    front = yaml.safe_load(cards.front_matter(model, {}).split("---\n")[1])
    assert "base_model" not in front
    assert front["datasets"] == ["org/pairs"]
