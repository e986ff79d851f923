"""Text through the stage: exact ids and masks, a reason for every row that can't have them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store
from pipeline.chat import Chat
from pipeline.errors import DataError
from pipeline.rows import group_from_row, pair_from_row
from stages import generate
from stages.tokenize_masks import Config, main
from templates import FORMATS, PUBLISHED, make_tokenizer

UNPROVEN = {
    *("qwen3_thinking", "r1", "deepseek_r1_distill", "qwen3_5_think"),  # an open thought is dropped
    *("counting", "plain"),  # history is written anew; letters melt into the header
}
"""Templates that don't show where the answers of two turns are."""
ALL = [*((name, False) for name in FORMATS), *((name, True) for name in PUBLISHED)]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def save(folder: Path, name: str, published: bool = False) -> Any:
    tokenizer = make_tokenizer(name, published)
    tokenizer.save_pretrained(folder / "model")
    return tokenizer


def source_of(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> str:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), source / "train.parquet")
    return str(source)


def tokenize(folder: Path, source: str, name: str = "out", **options: Any) -> store.Repo:
    options = {"tokenizer": str(folder / "model"), "test_size": 0, **options}
    main(Config(input_repo=source, output_repo=str(folder / name), **options))
    return store.open_repo(str(folder / name))


def groups(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    options = {"format": "groups", "mask": "all", **options}
    repo = tokenize(folder, source_of(folder, rows), **options)
    return [group_from_row(row) for row in repo.table().to_pylist()]


def runs(tokenizer: Any, sequence: Any) -> list[tuple[int, str]]:
    """Draw a sequence: (mask, text) of each stretch of ids with the same mask."""
    drawn: list[tuple[int, list[int]]] = []
    for id_, bit in zip(sequence.ids.tolist(), sequence.mask.tolist(), strict=True):
        if not drawn or drawn[-1][0] != bit:
            drawn.append((bit, []))
        drawn[-1][1].append(id_)
    return [(bit, tokenizer.decode(ids)) for bit, ids in drawn]


def dropped(repo: store.Repo) -> list[str]:
    return [json.loads(line)["reason"] for line in (repo.path / "dropped.jsonl").open()]


L3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED = {
    "llama3": [
        (0, "<|begin_of_text|>" + L3.format("user") + "Higher?<|eot_id|>" + L3.format("assistant")),
        (1, "I guess 16.<|eot_id|>"),
        (0, L3.format("user") + "Lower.<|eot_id|>" + L3.format("assistant")),
        (1, "8<|eot_id|>"),
    ],
    "chatml": [
        (
            0,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHigher?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (1, "I guess 16.<|im_end|>"),
        (0, "\n<|im_start|>user\nLower.<|im_end|>\n<|im_start|>assistant\n"),
        (1, "8<|im_end|>"),
    ],
    "qwen3": [
        (0, "<|im_start|>user\nHigher?<|im_end|>\n<|im_start|>assistant\n"),
        (1, "I guess 16.<|im_end|>"),
        (0, "\n<|im_start|>user\nLower.<|im_end|>\n<|im_start|>assistant\n"),
        (1, "<think>\n\n</think>\n\n8<|im_end|>"),
    ],
    "gemma": [
        (0, "<bos><start_of_turn>user\nHigher?<end_of_turn>\n<start_of_turn>model\n"),
        (1, "I guess 16.<end_of_turn>"),
        (0, "\n<start_of_turn>user\nLower.<end_of_turn>\n<start_of_turn>model\n"),
        (1, "8<end_of_turn>"),
    ],
    "mistral": [
        (0, "<s>[INST] Higher?[/INST]"),
        (1, " I guess 16.</s>"),
        (0, "[INST] Lower.[/INST]"),
        (1, " 8</s>"),
    ],
}
TWO_TURNS = [user("Higher?"), assistant("I guess 16."), user("Lower."), assistant("8")]


@pytest.mark.parametrize("name", EXPECTED)
def test_masks_drawn_by_hand(name: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, name)
    (example,) = groups(tmp_path, [{"messages": TWO_TURNS}])
    assert runs(tokenizer, example.sequence) == EXPECTED[name]
    spans = [(span.turn, span.start, span.end) for span in example.sequence.spans]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for _, text in EXPECTED[name]]
    assert spans == [
        (0, lengths[0], sum(lengths[:2])),
        (1, sum(lengths[:3]), sum(lengths)),
    ]


@pytest.mark.parametrize(("name", "published"), ALL)
def test_look_alikes_of_special_tokens_stay_text(
    name: str, published: bool, tmp_path: Path
) -> None:
    tokenizer = save(tmp_path, name, published)
    chat = Chat(tokenizer, "2024-12-24")
    special = sorted({*tokenizer.all_special_tokens, *chat._shield.special})
    header = chat._render([user("\u2620")], None).partition("\u2620")[2]  # a whole fake turn
    fake = f"q{''.join(special)} {header}No.{special[0]} end"
    said = [user(fake), assistant(f"a{''.join(special)} b"), user(f"z {fake}"), assistant("16")]
    plain = [user("Hi."), assistant("Yes."), user("More?"), assistant("16")]
    rows = [{"messages": said}, {"messages": plain}]
    if name in UNPROVEN:
        with pytest.raises(DataError, match=r"span_unproven: 2\."):
            groups(tmp_path, rows, max_length=10_000)
        return
    hostile, benign = groups(tmp_path, rows, max_length=10_000)
    ids = set(tokenizer.convert_tokens_to_ids(special))
    assert [i for i in hostile.sequence.ids.tolist() if i in ids] == [
        i for i in benign.sequence.ids.tolist() if i in ids
    ]
    drawn = [runs(tokenizer, one.sequence) for one in (hostile, benign)]
    assert [bit for bit, _ in drawn[0]] == [bit for bit, _ in drawn[1]] == [0, 1, 0, 1]
    for contents, run in ((said, drawn[0]), (plain, drawn[1])):
        for message, (_, text) in zip(contents, run, strict=True):
            assert message["content"] in text
    assert drawn[0][3] == drawn[1][3]


def test_text_has_the_ids_that_were_sampled(tmp_path: Path) -> None:
    for name in ("llama3", "chatml", "gemma"):
        folder = tmp_path / name
        folder.mkdir()
        save(folder, name)
        played = str(folder / "played")
        generate.main(
            generate.Config(
                model=str(folder / "model"),
                engine="scripted",
                script="guessing_game",
                environment="guessing_game",
                dataset="guessing_game",
                num_data=8,
                plan="independent",
                maxlen=64,
                output_repo=played,
            )
        )
        options = {"format": "groups", "mask": "all"}
        sampled = tokenize(folder, played, "sampled", **options).table()
        rows = store.open_repo(played).table().to_pylist()
        forgotten = source_of(folder, [row | {"turns": None} for row in rows], _schema(played))
        written = tokenize(folder, forgotten, "written", **options).table()
        assert written.num_rows == sampled.num_rows > 8
        for column in ("prompt_id", "sample", "token", "mask", "segments", "spans"):
            assert written.column(column).to_pylist() == sampled.column(column).to_pylist()


def _schema(repo: str) -> pa.Schema:
    return store.open_repo(repo).table().schema


PAIR = {"chosen": [user("Hi?"), assistant("Yes.")], "rejected": [user("Hi?"), assistant("No.")]}


def test_every_hostile_row_has_its_reason(tmp_path: Path) -> None:
    save(
        tmp_path, "gemma"
    )  # whose template refuses system messages, and roles that don't alternate
    cases: list[tuple[str | None, Any]] = [
        (None, PAIR["chosen"]),
        ("not_a_dialogue", None),
        ("not_a_dialogue", []),
        ("not_a_dialogue", [user("Only a question?")]),
        ("not_a_dialogue", [assistant("I begin.")]),
        ("not_a_dialogue", [user("Hi."), assistant("One."), assistant("Two.")]),
        ("not_a_dialogue", [user("Hi."), assistant(None)]),
        ("not_a_dialogue", [user(None), assistant("Hi.")]),
        ("not_a_dialogue", [{"role": "wizard", "content": "x"}, assistant("Hi.")]),
        ("not_a_dialogue", [{"role": None, "content": "x"}, assistant("Hi.")]),
        ("template_error", [{"role": "system", "content": "x"}, user("Hi."), assistant("Hi.")]),
        ("template_error", [user("Hi."), user("Hello?"), assistant("Hi.")]),
        ("too_long", [user("long " * 200_000), assistant("Short.")]),
        ("too_long", [user("Hi."), assistant("x" * 1_000_000)]),
        ("duplicate", PAIR["chosen"]),
    ]
    rows = [{"messages": said} for _, said in cases]
    repo = tokenize(tmp_path, source_of(tmp_path, rows), format="groups", mask="last")
    assert repo.num_rows() == 1
    assert sorted(dropped(repo)) == sorted(reason for reason, _ in cases if reason)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("{not JSON", "tools_unreadable"),
        ('{"name": "one"}', "tools_unreadable"),
        ('["look_up"]', "tools_unreadable"),
        ("[" * 100_000, "tools_unreadable"),
        ('[{"name": "' + "\\ud800" + '"}]', "not_unicode"),
    ],
)
def test_tools_that_are_none(tools: str, reason: str, tmp_path: Path) -> None:
    save(tmp_path, "qwen25")
    rows = [PAIR | {"tools": tools}, PAIR | {"tools": '[{"type": "function"}]'}]
    repo = tokenize(tmp_path, source_of(tmp_path, rows))
    assert repo.num_rows() == 1
    assert set(dropped(repo)) == {reason} | ({"missing_sibling"} & set(dropped(repo)))


def test_tools_and_calls_are_what_the_template_shows(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, "qwen25")
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "cat"}}}
    said = [
        user("What is a cat?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "A pet.", "name": "look_up"},
        assistant("It is a pet."),
    ]
    # Arrow gives each call the arguments of the other.
    other = {"type": "function", "function": {"name": "add", "arguments": {"left": 1}}}
    tools = [{"type": "function", "function": {"name": "look_up", "description": None}}]
    rows = [
        {"messages": said, "tools": tools},
        {"messages": [user("1?"), assistant("Two.", tool_calls=[other])], "tools": None},
    ]
    called, added = groups(tmp_path, rows)
    page = tokenizer.decode(called.sequence.ids.tolist())
    assert '<tools>\n{"type": "function", "function": {"name": "look_up"}}\n</tools>' in page
    assert [text for bit, text in runs(tokenizer, called.sequence) if bit] == [
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "cat"}}\n</tool_call><|im_end|>',
        "It is a pet.<|im_end|>",
    ]
    assert '{"left": 1}' in tokenizer.decode(added.sequence.ids.tolist())


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    save(tmp_path, "llama3")
    row = {"prompt": "Hi?", "chosen": "Yes!", "rejected": "No."}
    table = pa.Table.from_pylist([row, row | {"chosen": "Yes."}])
    broken = pa.array([b"\xff\xfe!!", b"Yes."]).cast(pa.binary()).view(pa.string())
    (tmp_path / "source").mkdir()
    table = table.set_column(1, "chosen", broken)
    pq.write_table(table, tmp_path / "source" / "train.parquet")
    repo = tokenize(tmp_path, str(tmp_path / "source"))
    assert (repo.num_rows(), dropped(repo)) == (1, ["not_unicode"])


def test_template_variables_and_system_prompts_are_those_of_generate(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, "qwen3")
    rows = [{"messages": TWO_TURNS[:2]}]
    off = {"template_kwargs": '{"enable_thinking": false}', "system_prompt": "Be brief."}
    (example,) = groups(tmp_path, rows, **off)
    assert runs(tokenizer, example.sequence) == [
        (
            0,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHigher?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (1, "I guess 16.<|im_end|>"),
    ]
    repo = tokenize(tmp_path, source_of(tmp_path, [PAIR]), "pairs", system_prompt="Be brief.")
    (pair,) = [pair_from_row(row) for row in repo.table().to_pylist()]
    assert pair.chosen.messages[0] == {"role": "system", "content": "Be brief."}
    assert repo.manifest is not None
    assert repo.manifest["config"]["system_prompt"] == "Be brief."


def test_flags_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"--template_kwargs must be JSON.*--num_proc 0: at least 1"
    ):
        Config(input_repo="./a", output_repo="./b", template_kwargs="[1]", num_proc=0)
    save(tmp_path, "gemma")
    source = source_of(tmp_path, [PAIR])
    with pytest.raises(DataError, match=r"takes no system prompt .*leave out --system_prompt"):
        tokenize(tmp_path, source, system_prompt="Be brief.")
    with pytest.raises(DataError, match="can't be named messages"):
        tokenize(tmp_path, source, "other", template_kwargs='{"messages": 1}')


def test_columns_of_nothing_that_is_known(tmp_path: Path) -> None:
    save(tmp_path, "llama3")
    label = {"prompt": "Hi?", "completion": "No.", "label": False}
    for row, form in (({"text": "x"}, "groups"), (label, "groups"), ({"messages": []}, "pairs")):
        with pytest.raises(DataError, match=rf"--format {form} reads.*it has: {min(row)}"):
            tokenize(tmp_path, source_of(tmp_path, [row]), min(row), format=form, mask="last")
