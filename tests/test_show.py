"""stages/show.py: exactly what trains is marked, and nothing in a dialogue acts on the terminal."""

import importlib.util
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

import multiturn
from pipeline import store
from pipeline.errors import DataError
from pipeline.paint import Look, painted
from pipeline.pieces import Ids, Numbers, Words, load_words, pieces_of
from pipeline.records import NO_SCORE, PAIRS, RANKED, ROLLOUTS, Rollout
from pipeline.rows import pair_row, rollout_row
from pipeline.selection import Rules, select_pairs
from pipeline.visible import in_line, visible
from play import messages_of, played
from templates import make_tokenizer

STAGE = Path(__file__).parents[1] / "stages" / "show.py"
TRAINED = re.compile(r"⟦(.*?)⟧", re.DOTALL)
HOSTILE = "\x1b[2J\x1b]0;title\x07 [bold red]b[/] :smile: \u202egnp\u202c\u200b\x9b31m\r\x85."


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage_show", STAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def show(stage: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that shows a repo and returns what it printed."""

    def shown(repo: object, **flags: Any) -> str:
        stage.main(stage.Config(str(repo), **{"width": 100, **flags}))
        return capsys.readouterr().out

    return shown


@dataclass(frozen=True)
class Played:
    model: str
    seed: int = 0


def write(folder: Path, rollouts: list[Rollout], model: str = "", scored: bool = True) -> Path:
    run = store.begin("rank", "ranked", Played(model), str(folder), seed=0)
    schema = RANKED if scored else ROLLOUTS
    rows = [rollout_row(rollout) for rollout in rollouts]
    run.write({"train": pa.Table.from_pylist(rows, schema=schema)}, counts={"rows": len(rows)})
    return folder


def marked(text: str) -> list[str]:
    """Return what is between the marks, without a panel's borders and its padding."""
    return [re.sub(r"[│\s]+", " ", found).strip() for found in TRAINED.findall(text)]


# What is printed of strangers' text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [bold]text[/]", "plain [bold]text[/]"),
        ("\x1b[31mred", "␛[31mred"),
        ("a\nb\tc", "a↵\nb⇥\tc"),
        ("\x00\x07\r\x7f", "␀␇␍␡"),
        ("\x9b31m\x85", "⟨009b⟩31m⟨0085⟩"),
        ("\u202eabc\u2066\u200b\ufeff\u2028", "⟨202e⟩abc⟨2066⟩⟨200b⟩⟨feff⟩⟨2028⟩"),
        ("\ud800\ue000\U000e0041", "⟨d800⟩⟨e000⟩⟨e0041⟩"),
        ("⟦x⟧ ⦗y⦘", "⟨27e6⟩x⟨27e7⟩ ⟨2997⟩y⟨2998⟩"),
        ("首都 é 😀 עברית", "首都 é 😀 עברית"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_nothing_that_acts_stays() -> None:
    every = "".join(map(chr, range(0x110000)))
    kinds = {unicodedata.category(letter) for letter in visible(every)}
    assert kinds & {"Cf", "Cs", "Co", "Cn", "Zl", "Zp"} == set()
    controls = {c for c in visible(every) if unicodedata.category(c) == "Cc"}
    assert controls == {"\n", "\t"}
    assert in_line("a\nb\tc") == "a↵b⇥c"


# Pieces


def words(*special: str) -> Words:
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "?": 3}, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return Words(tokenizer)


def texts(ids: list[int], mask: list[int], **options: Any) -> list[tuple[str, str, bool]]:
    row = Ids(ids, np.array(mask, np.uint8))
    values = {"decoder": words("<end>"), "limit": 99} | options
    found = pieces_of(row, (0, len(ids)), **values)
    return [(piece.kind, piece.text, piece.trained) for piece in found]


def test_pieces_part_at_masks_special_ids_and_cuts() -> None:
    assert texts([0, 1, 2, 4, 1, 1], [0, 0, 1, 1, 0, 0], cuts=[1]) == [
        ("text", "a", False),
        ("text", " b", False),  # its blank is there, though this decoder drops one at the start
        ("text", "c", True),
        ("special", "<end>", True),
        ("text", " b b", False),
    ]


def test_only_what_doesnt_train_loses_its_middle() -> None:
    ids = list(range(1000))
    mask = [0] * 600 + [1] * 300 + [0] * 100
    found = texts(ids, mask, decoder=Numbers(), limit=400)
    # 100 ids are left for two stretches that don't train: 50 each.
    numbers = [[int(n) for n in text.split()] for kind, text, _ in found if kind == "text"]
    assert [n for part in numbers for n in part] == [
        *range(25),
        *range(575, 600),
        *range(600, 900),
        *range(900, 925),
        *range(975, 1000),
    ]
    told = [text.strip() for kind, text, _ in found if kind == "elided"]
    assert told == ["… 550 ids …", "… 50 ids …"]
    assert [kind for kind, *_ in texts(ids, mask, decoder=Numbers(), limit=1000)] == ["text"] * 3


def test_a_short_stretch_stays_whole_however_small_the_limit() -> None:
    ids, mask = list(range(30)), [0] * 16 + [1] * 14
    assert [kind for kind, *_ in texts(ids, mask, decoder=Numbers(), limit=1)] == ["text", "text"]


def test_marks_without_colour() -> None:
    row = Ids([0, 2, 4, 1], np.array([0, 1, 1, 0], np.uint8))
    look = Look(words("<end>"), False, 80, 99)
    pieces = pieces_of(row, (0, 4), look.decoder, 99)
    assert painted(pieces, look, "said", fork=1).plain == "a⑂⟦c⦗<end>⦘⟧ b"
    bright = replace(look, colour=True)
    text = painted(pieces, bright, "chosen", fork=1)
    assert text.plain == "a⑂c<end> b"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles == {"⑂": "bold yellow", "c": "bold green", "<end>": "bold green dim"}


# Pairs


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama3")


def spoken(tokenizer: Any, k: int, texts: list[str], asked: list[str], **changes: Any) -> Rollout:
    """Play a dialogue as the template has it; the last turn has no end of turn: it was cut."""
    said, responses, prompts, seen = [], [], [], list[int]()
    for t, (question, text) in enumerate(zip(asked, texts, strict=True)):
        said.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(text, add_special_tokens=False)
        answer += [tokenizer.eos_token_id] * (t < len(texts) - 1)
        prompts.append(ids[len(seen) :])
        responses.append(answer)
        said.append({"role": "assistant", "content": text})
        seen = ids + answer
    rollout = played(responses, sample=k, **changes)
    rollout.messages = said  # type: ignore[assignment]
    length = 0
    for turn, new in zip(rollout.turns or [], prompts, strict=True):
        turn.keep, turn.prompt_ids = length, new
        length += len(new) + len(turn.response_ids)
    return rollout


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return a folder with a tokenizer, two ranked rollouts, and the pair that they make."""
    folder = tmp_path_factory.mktemp("repos")
    tokenizer.save_pretrained(folder / "policy")
    asked = ["What is it?", f"Really? {HOSTILE}", "Thanks."]
    rewards = [0.5, NO_SCORE, 1.5]
    sides = [
        spoken(tokenizer, 0, ["Paris.", "It is.\nYes\tso.", "Bye."], asked, branch_turn=1),
        spoken(
            tokenizer,
            1,
            ["Paris.", "It \x1b[31mmay.", "No."],
            asked,
            branch_turn=1,
            rewards=rewards,
            reward_errors=[None, "too \x1b[5mlong", None],
        ),
    ]
    write(folder / "ranked", sides, str(folder / "policy"))
    command = [sys.executable, str(STAGE.with_name("tokenize_masks.py")), "--test_size", "0"]
    for mask in ("forked", "all"):
        names = ["--input_repo", "./ranked", "--output_repo", f"./{mask}", "--mask", mask]
        done = subprocess.run([*command, *names], cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_pair_shows_what_trains_and_nothing_else_as_such(repos: Path, show: Any) -> None:
    shown = show(repos / "forked")
    assert marked(shown)[1:] == ["It is.↵ Yes⇥ so.⦗<|eot_id|>⦘", "It ␛[31mmay.⦗<|eot_id|>⦘"]
    assert "parts at turn 1 (h) · scored at turn 2 (L)" in shown
    assert "reward gap 0.5" in shown
    assert f"Decoded by {repos / 'policy'}" in shown.replace("\n", "")
    assert re.search(r"reward +2 +1\.5 ", shown)
    assert "⑂⟦It" in shown
    for answer in ("Bye.", "No."):
        assert f"assistant: {answer}" in shown, "what came after the fork is told apart"


def test_the_figures_of_a_pair(repos: Path, show: Any) -> None:
    row = pq.read_table(next((repos / "forked" / "data").glob("*.parquet"))).to_pylist()[0]
    shown = show(repos / "forked")
    lengths, trained = (
        [len(row[f"{s}_token"]) for s in SIDES],
        [sum(row[f"{s}_mask"]) for s in SIDES],
    )
    assert re.search(rf"ids +{lengths[0]} +{lengths[1]} ", shown)
    assert re.search(rf"ids that train +{trained[0]} +{trained[1]} ", shown)
    mean = np.mean(row["chosen_sample_logprob"])
    assert re.search(rf"log-prob when sampled, mean +{mean:.6g} ", shown)
    span = row["chosen_spans"][1]
    figures = rf"chosen +1 +{span['start']} +{span['end']} +{trained[0]} +{trained[0]} +0"
    assert re.search(figures, shown)


SIDES = ("chosen", "reject")


def test_ids_that_train_on_both_sides_are_marked_once(repos: Path, show: Any) -> None:
    shown = show(repos / "all", width=160)
    assert marked(shown)[1] == "Paris.⦗<|eot_id|>⦘"
    assert shown.count("Paris.") == 1


@pytest.mark.parametrize(("width", "beside"), [(119, False), (120, True)])
def test_sides_are_beside_each_other_where_there_is_room(
    repos: Path, show: Any, width: int, beside: bool
) -> None:
    _, *lines = show(repos / "forked", width=width).splitlines()  # the first has the path, whole
    assert any("chosen · ids" in line and "reject · ids" in line for line in lines) == beside
    assert max(map(len, lines)) <= width


def test_narrow_panels_fold_and_cut_nothing(repos: Path, show: Any) -> None:
    assert "…" not in show(repos / "all", width=60)


def test_hostile_text_is_shown_as_symbols(repos: Path, show: Any) -> None:
    for repo in ("ranked", "forked", "all"):
        for row in range(2 if repo == "ranked" else 1):
            shown = show(repos / repo, row=row)
            unseen = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
            assert unseen == {"\n"}, "only line ends"
            joined = re.sub(r"[│\s]+", "", shown)
            assert (
                "␛[2J␛]0;title␇[boldred]b[/]:smile:⟨202e⟩gnp⟨202c⟩⟨200b⟩⟨009b⟩31m␍⟨0085⟩." in joined
            )


def in_a_terminal(repo: Path, **env: str) -> str:
    """Run the stage with a pseudo-terminal as its output."""
    parent, child = pty.openpty()
    values = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "110", **env}
    process = subprocess.Popen([sys.executable, str(STAGE), str(repo)], stdout=child, env=values)
    os.close(child)
    read = b""
    while True:
        try:
            some = os.read(parent, 65536)
        except OSError:  # Linux says so when the last writer has closed it
            break
        if not some:
            break
        read += some
    os.close(parent)
    assert process.wait(timeout=60) == 0
    return read.decode()


def test_a_terminal_gets_colours_and_no_sequence_of_a_dialogue(repos: Path) -> None:
    shown = in_a_terminal(repos / "forked", NO_COLOR="")
    assert "\x1b[1;32mIt is." in shown, "chosen is green"
    assert "\x1b[1;31mIt ␛[31mmay." in shown, "reject is red"
    assert "\x1b[1;2;32m<|eot_id|>" in shown
    assert "⟦" not in shown
    ours = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "\x1b" not in ours
    assert {c for c in ours if unicodedata.category(c) in ("Cc", "Cf")} == {"\r", "\n"}


def test_no_color_is_respected_in_a_terminal(repos: Path) -> None:
    shown = in_a_terminal(repos / "forked", NO_COLOR="1")
    assert "⑂⟦It is." in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)


def test_ids_are_shown_beside_the_text(repos: Path, show: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("Paris.", add_special_tokens=False)
    shown = show(repos / "all", ids=True, width=200)
    assert re.search(rf"⟦Paris\.⟧ +{' '.join(map(str, ids))} ", shown)


def test_rewritten_contexts_are_shown_as_each_segment_saw_them(tmp_path: Path, show: Any) -> None:
    sides = [
        played([[1, 2], [3 + k], [5, 6 + k]], keeps=[0, 4, 2], sample=k, branch_turn=1)
        for k in range(2)
    ]
    write(tmp_path / "ranked", sides)
    pairs, _ = select_pairs(sides, Rules("all", 99, no_encoder))
    assert pairs == [], "equal rewards are a tie"
    sides[1].rewards = [0.0, 0.0, 5.0]
    pairs, _ = select_pairs(sides, Rules("all", 99, no_encoder))
    folder = tmp_path / "pairs"
    run = store.begin("tokenize_masks", "pairs", Played(""), str(folder), seed=0)
    table = pa.Table.from_pylist([pair_row(pairs[0])], schema=PAIRS)
    run.write({"train": table}, counts={"rows": 1})
    lines = [line.strip("│ ") for line in show(folder).splitlines()]
    at = next(i for i, line in enumerate(lines) if "chosen · segment 1 · ids 7 to 11" in line)
    assert "saw 2 ids before them" in lines[at]
    # Of 10 20 1 2 11 21 4, two are kept: what turn 2 saw, and what it said.
    assert lines[at + 1] == "10 20 12 22 ⟦5 7 ⟧"
    assert lines[at - 2] == "10 20 ⟦1 2 ⟧11 21 ⑂⟦4 ⟧"


def test_pairs_without_a_tokenizer_show_numbers_and_messages(tmp_path: Path, show: Any) -> None:
    row = multiturn.published_row([5, 6], [7, 8, 9])
    shown = show(multiturn.published_repo(tmp_path / "pub", [row]))
    assert marked(shown)[1:] == ["5 6", "7 8 9", "chosen", "reject"]
    assert "name one with --tokenizer" in shown
    assert "assistant: ⟦chosen⟧" in shown
    assert "assistant: e" in shown, "a turn that doesn't train isn't marked"
    assert "128256" not in shown, "padding isn't shown"


def test_pairs_of_text(tmp_path: Path, show: Any) -> None:
    folder = tmp_path / "hh" / "data"
    folder.mkdir(parents=True)
    start = "\n\nHuman: Hi.\n\nAssistant:"
    table = pa.table({"chosen": [f"{start} Hello."], "rejected": [f"{start} Go."]})
    pq.write_table(table, folder / "train.parquet")
    shown = show(tmp_path / "hh")
    assert {"Hello.", "Go."} <= set(marked(shown))


def test_groups_show_advantages(tmp_path: Path, show: Any) -> None:
    shown = show(multiturn.groups_repo(tmp_path / "groups"), row=1)
    assert "prompt g0 · sample 1" in shown
    assert re.search(r"reward +1 ", shown)
    assert re.search(r"advantage, mean +– ", shown)


# Rollouts


def test_a_rollout_shows_turns_reasons_and_rewards(repos: Path, show: Any) -> None:
    shown = show(repos / "ranked", row=-1)
    assert "prompt p · sample 1 · parts at turn 1 (h)" in shown
    assert re.search(r"h 1 +\d+ +\d+ +\d+ +stop +-?[\d.]+ +no score +too ␛\[5mlong", shown)
    assert re.search(r"L 2 +\d+ +\d+ +\d+ +stop +-?[\d.]+ +1\.5", shown)
    assert marked(shown)[1:] == ["Paris.⦗<|eot_id|>⦘", "It ␛[31mmay.⦗<|eot_id|>⦘", "No."]


def test_a_rollout_without_ids_shows_its_messages(tmp_path: Path, show: Any) -> None:
    rollout = replace(played([[1]]), turns=None, rewards=None, messages=messages_of(["x" * 90]))
    write(tmp_path / "text", [rollout], scored=False)
    shown = show(tmp_path / "text", max_tokens=10)
    assert "user: question 0" in shown
    assert "x" * 40 + " … 50 more⟧" in shown


def test_a_context_that_was_rewritten_says_what_was_kept(tmp_path: Path, show: Any) -> None:
    write(tmp_path / "r", [played([[65, 66], [67]], keeps=[0, 1])])
    make_tokenizer("llama3").save_pretrained(tmp_path / "t")
    shown = show(tmp_path / "r", tokenizer=str(tmp_path / "t"))
    assert "turn 1 · stop · saw the first 1 of the 4 ids before, then these" in shown
    beside = show(tmp_path / "r", tokenizer=str(tmp_path / "t"), ids=True)
    rows = re.findall(r"(\d+) +(?:⟦.*⟧|\S+) +([\d ]+?) +│", beside)
    assert rows == [("0", "10 20"), ("2", "65 66"), ("1", "11 21"), ("3", "67")]


# Which row


def test_rows_are_counted_from_either_end(tmp_path: Path, show: Any) -> None:
    multiturn.pairs_repo(tmp_path / "pairs", "forked", train=5)
    assert "prompt p000 " in show(tmp_path / "pairs")
    assert "prompt p004 " in show(tmp_path / "pairs", row=-1)
    assert "prompt p005 " in show(tmp_path / "pairs", split="test")
    several = show(tmp_path / "pairs", row=3, rows=9)
    assert re.findall(r"prompt (p\d+)", several) == ["p003", "p004"]


@pytest.mark.parametrize("row", [5, -6, 99])
def test_a_row_that_isnt_there_names_the_range(tmp_path: Path, show: Any, row: int) -> None:
    multiturn.pairs_repo(tmp_path / "pairs", "forked", train=5)
    with pytest.raises(DataError, match=f"no row {row} .*from 0 to 4, or from -1 back to -5"):
        show(tmp_path / "pairs", row=row)


def test_rows_of_a_prompt_and_of_a_sample(tmp_path: Path, show: Any) -> None:
    multiturn.groups_repo(tmp_path / "groups")
    both = show(tmp_path / "groups", prompt_id="g2")
    assert re.findall(r"prompt g2 · sample (\d)", both) == ["0", "1", "2", "3"]
    one = show(tmp_path / "groups", prompt_id="g2", sample=3)
    assert re.findall(r"row (\d+) ─", one) == ["7"]
    multiturn.pairs_repo(tmp_path / "pairs", "forked", train=3)
    assert "row 1 ─" in show(tmp_path / "pairs", prompt_id="p001", sample=1)
    for wanted in ({"prompt_id": "p9"}, {"prompt_id": "p001", "sample": 7}):
        with pytest.raises(DataError, match="no row of prompt p"):
            show(tmp_path / "pairs", **wanted)


def test_only_the_rows_own_group_is_read(tmp_path: Path, show: Any) -> None:
    """Every other group of the shard is damaged: neither its rows nor its hash are looked at."""
    write(tmp_path / "r", [played([[i]], prompt_id=f"p{i:05d}") for i in range(1100)])
    (shard,) = (tmp_path / "r" / "data").glob("*.parquet")
    metadata = pq.read_metadata(shard)
    assert metadata.num_row_groups == 3
    with shard.open("r+b") as file:
        for group in (0, 2):
            for column in range(metadata.row_group(group).num_columns):
                chunk = metadata.row_group(group).column(column)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                file.seek(start)
                file.write(b"\xff" * chunk.total_compressed_size)
    assert "prompt p00700 " in show(tmp_path / "r", row=700)
    with pytest.raises(DataError, match=r"row 3 of .*parquet can't be read"):
        show(tmp_path / "r", row=3)


# What can't be shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rows": 0}, "--rows 0"),
        ({"max_tokens": 0}, "--max_tokens 0"),
        ({"width": 20}, "--width 20"),
        ({"prompt_id": "p", "row": 2}, "give one of them"),
        ({"sample": 1}, "name it with --prompt_id"),
    ],
)
def test_flags_that_make_no_sense(stage: ModuleType, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        stage.Config("./r", **flags)


def test_a_dataset_of_something_else_names_its_columns(tmp_path: Path, show: Any) -> None:
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"question": ["a"], "e\x1b": ["b"]}), tmp_path / "d" / "train.parquet")
    with pytest.raises(DataError, match=r"have the columns question, e␛$"):
        show(tmp_path / "d")
    with pytest.raises(DataError, match="has no column 'prompt_id'"):
        show(tmp_path / "d", prompt_id="p")


def test_bytes_that_are_no_text(tmp_path: Path, show: Any) -> None:
    """Arrow takes any bytes for text."""
    (tmp_path / "d").mkdir()
    bytes_ = pa.array([b"sound", b"\xff\xfe"])
    text = pa.StringArray.from_buffers(2, bytes_.buffers()[1], bytes_.buffers()[2])
    roles = pa.array(["assistant"] * 2)
    said = pa.StructArray.from_arrays([roles, text], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), said)
    pq.write_table(pa.table({"messages": messages}), tmp_path / "d" / "train.parquet")
    assert "⟦sound⟧" in show(tmp_path / "d")
    with pytest.raises(DataError, match=r"row 1 of .* can't be read"):
        show(tmp_path / "d", row=1)


def test_missing_repos_splits_and_tokenizers(tmp_path: Path, repos: Path, show: Any) -> None:
    with pytest.raises(DataError, match="no such folder"):
        show(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no split 'dev'; it has: train"):
        show(repos / "ranked", split="dev")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        show(repos / "ranked", tokenizer=str(tmp_path))


def test_a_tokenizer_is_found_where_repos_were_moved(
    tmp_path: Path, tokenizer: Any, show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs name ./ranked as their parent, and that names ./policy; both lie beside the pairs."""
    home = tmp_path / "home"
    tokenizer.save_pretrained(home / "policy")
    monkeypatch.chdir(home)
    sides = [played([[65], [66 + k]], sample=k, branch_turn=1, rewards=[0, k]) for k in range(2)]
    write(home / "ranked", sides, "./policy")
    run = store.begin(
        "tokenize_masks", "pairs", Played(""), "./pairs", inputs=[store.open_repo("./ranked")]
    )
    pair = select_pairs(sides, Rules("forked", 99, no_encoder))[0][0]
    run.write({"train": pa.Table.from_pylist([pair_row(pair)], schema=PAIRS)}, counts={})
    assert "Decoded by policy." in show("./pairs")
    home.rename(tmp_path / "away")
    monkeypatch.chdir(tmp_path)
    assert "Decoded by away/policy." in show("./away/pairs")


def no_encoder() -> Any:
    raise AssertionError("ids need no chat template")


def test_a_tokenizer_that_is_gone_leaves_numbers(tmp_path: Path, show: Any) -> None:
    write(tmp_path / "r", [played([[7]])], model=str(tmp_path / "gone"))
    shown = show(tmp_path / "r")
    assert "No tokenizer is known" in shown


def test_words_of_a_folder_know_its_special_ids(repos: Path, tokenizer: Any) -> None:
    found = load_words(str(repos / "policy"))
    assert found.special[tokenizer.eos_token_id] == "<|eot_id|>"
