"""bench/generate.py without vLLM: small runs of its parts, and what they count."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
# A benchmark's own modules lie beside it, as they do when it is run by its file.
sys.path.append(str(BENCH))

from _seed_way import SeedWay  # noqa: E402 - found by the path above
from _servers_part import Seen  # noqa: E402 - as above
from _stage import Taken  # noqa: E402 - as above
from _wired import texts_of, write_prompts  # noqa: E402 - as above

from pipeline.prompts import load_prompts  # noqa: E402 - as above


def run(script: str, *flags: str) -> tuple[dict[str, float], str]:
    """Run a benchmark; return its last line and everything that it printed."""
    command = [sys.executable, str(BENCH / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_servers_and_overhead_are_measured():
    sizes = "--server_prompts 12 --time_scale 20 --games 20 60 --http_dialogues 6"
    result, out = run("generate.py", "--parts", "servers", "overhead", *sizes.split())
    assert set(result) == {
        "wall_vs_bound",
        "wall_vs_barrier",
        "overhead_ms_per_turn",
        "peak_rss_mb_100k",
    }
    # Nobody beats the bound; a dozen dialogues in step wait for each other, whatever the machine.
    assert 1.0 <= result["wall_vs_bound"] < 1000
    assert 1.0 < result["wall_vs_barrier"] < 10
    assert 0.1 < result["overhead_ms_per_turn"] < 100
    assert 100 < result["peak_rss_mb_100k"] < 2000
    assert len(re.findall(r"^\| turn barriers \|", out, re.MULTILINE)) == 2
    assert re.search(r"^\| 60 \| 180 \|", out, re.MULTILINE)


def test_processor_time_between_two_moments():
    taken = Taken(4.0, 9.0, [(10.0, 0.0), (11.0, 1.0), (12.0, 3.0), (14.0, 3.5)])
    assert taken.cpu_s == 3.5
    assert taken.cpu_between(10.5, 13.0) == pytest.approx(3.25 - 0.5)


def test_the_hf_engine_is_measured():
    result, out = run("hf_engine.py", "--games", "24", "--threads", "1")
    assert 1.0 < result["turns_per_s_vs_one_by_one"] < 100
    assert "hf engine in rounds:" in out


def test_a_wall_is_from_the_first_request_to_the_last_answer():
    """Worked by hand: 100 s to 130 s; 40 of 2 x 30 slot-seconds are 20 s, 27 of 1 x 30 are 27."""
    counts = {"requests": 3, "prompt_ids": 50, "response_ids": 7}
    policy = counts | {"first_s": 100.0, "last_s": 128.0, "busy_slot_s": 40.0, "slots": 2}
    user = counts | {"first_s": 105.0, "last_s": 130.0, "busy_slot_s": 27.0, "slots": 1}
    seen = Seen(policy, user)
    assert (seen.wall_s, seen.bound_s) == (30.0, 27.0)
    assert seen.work == [(3, 50, 7)] * 2


def test_the_seeds_way_plays_everything_to_the_end(tmp_path, monkeypatch):
    """Two rollouts of three turns each: 2 x (3 + 2) loads; the second one keeps 2h + 1 messages."""
    way = SeedWay(tmp_path, tmp_path, tmp_path, 3, tmp_path, {})
    calls = []

    def speak(party, dialogues):
        unfinished = [each for each in dialogues if len(each) < 6]
        calls.append((party, len(unfinished)))
        for each in unfinished:
            each.append(f"{party}-{len(calls)}")

    monkeypatch.setattr(way, "speak", speak)
    first, second = way.play([["a"], ["b"]], [0, 2])
    assert [len(each) for each in [*first, *second]] == [6] * 4
    assert first[0] == ["a", "policy-1", "user-2", "policy-3", "user-4", "policy-5"]
    assert second[0] == ["a", "policy-6", "user-7", "policy-8", "user-9", "policy-10"]
    assert second[1] == ["b", "policy-1", "user-2", "policy-3", "user-4", "policy-6"]
    parties = ["policy", "user", "policy", "user", "policy"]
    assert calls == list(zip(2 * parties, [2] * 6 + [1] * 4, strict=True))


@pytest.mark.parametrize("party", ["policy", "user"])
def test_one_party_speaks_in_each_unfinished_dialogue(party, tmp_path):
    """The command that SeedWay runs, with a script in the place of the one that loads vLLM."""
    script = tmp_path / "party.py"
    script.write_text(
        "import json, sys\n"
        "model, party, path, _ = sys.argv[1:]\n"
        "said = [d + [party + ' of ' + model] for d in json.load(open(path))]\n"
        "json.dump(said, open(path, 'w'))\n"
    )
    way = SeedWay(Path("p"), Path("u"), tmp_path, 1, tmp_path, {}, script)
    dialogues = [["a"], ["b", "whole"], ["c"]]
    way.speak(party, dialogues)
    said = f"{party} of {party[0]}"
    assert dialogues == [["a", said], ["b", "whole"], ["c", said]]
    assert way.loads == 1
    way.speak(party, dialogues)
    assert way.loads == 1  # nothing was left to say


def test_made_up_prompts_are_as_many_different_ones(tmp_path, monkeypatch):
    import _wired

    monkeypatch.setattr(_wired, "GSM8K", tmp_path / "absent.jsonl")
    path = tmp_path / "prompts.jsonl"
    assert write_prompts(path, 30) == "30 made-up prompts"
    assert len(load_prompts(str(path), "train", 0, 0, False)) == 30
    assert len(set(texts_of(path))) == 30
