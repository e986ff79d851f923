"""Classifiers behind pooling servers: a fake one that answers, delays, fails, cuts and lies."""

import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.engines.base import EngineOptions
from pipeline.engines.rounds import Rounds
from pipeline.errors import DataError, EngineError
from pipeline.rewards import Settings, load_served
from pipeline.rewards.base import Scored
from pipeline.scoring import score_chunks, windows
from pooling_fixtures import (
    NAME,
    Counter,
    answer_of,
    dialogue,
    fake_pooling,
    opened,
    own_ids,
    packed,
    pooled,
    unprobed,
    value_of,
)
from reward_models import one_thread, write_armorm, write_classifier  # noqa: F401
from vllm_fixtures import Answer

REWRITES = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\n'"
    " }}{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n' }}{% endif %}"
    "{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("models") / NAME)


def expected(folder: Path, turns: int, mark: str) -> list[float]:
    rollout = dialogue(turns, mark)
    return [value_of(own_ids(folder, rollout, turn)) for turn in range(turns)]


def test_a_dialogue_is_one_request_of_ids_and_raw_scores_come_back(folder: Path) -> None:
    rollouts = [dialogue(turns, f"m{turns}") for turns in (3, 1, 2)]
    with fake_pooling() as fake, opened(folder, fake.url) as reward:
        probes = len(fake.bodies)
        scored = reward.score(rollouts, [range(3), [0], [1]])
        asked = fake.bodies[probes:]
    assert [one.rewards for one in scored] == [
        expected(folder, 3, "m3"),
        expected(folder, 1, "m1"),
        [None, expected(folder, 2, "m2")[1]],
    ]
    inputs = {len(body["input"]): body["input"] for body in asked if len(body["input"]) > 1}
    assert inputs == {3: [own_ids(folder, rollouts[0], turn) for turn in range(3)]}
    assert {path for path in fake.paths if path != "/v1/models"} == {"/pooling"}
    assert [{k: v for k, v in body.items() if k != "input"} for body in asked] == 3 * [
        {
            "model": NAME,
            "task": "classify",
            "add_special_tokens": False,
            "use_activation": False,
            "encoding_format": "base64",
            "embed_dtype": "float32",
            "endianness": "little",
        }
    ]


def test_conditions_of_the_row_are_reasons_and_are_not_sent(folder: Path) -> None:
    empty, missing, long = dialogue(2, "a"), dialogue(1, "b"), dialogue(4, "c")
    empty.messages[1]["content"] = " "
    limit = len(own_ids(folder, long, 1))
    with fake_pooling() as fake, unprobed(folder, fake.url, max_length=limit) as reward:
        scored = reward.score([empty, missing, long], [[0], [0, 2], range(4)])
    assert scored[0] == Scored([None, None], ["empty_response", None])
    assert scored[1] == Scored(
        [expected(folder, 1, "b")[0], None, None], [None, None, "no_policy_turn"]
    )
    scores = expected(folder, 4, "c")
    assert scored[2] == Scored([*scores[:2], None, None], [None, None, "too_long", "too_long"])
    assert max(len(ids) for body in fake.bodies for ids in body["input"]) == limit


def test_a_template_that_rewrites_has_each_prefix_encoded_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = REWRITES
    rewriting = write_classifier(tmp_path / NAME, tokenizer)
    rollout = dialogue(3, "m")
    with fake_pooling() as fake, opened(rewriting, fake.url) as reward:
        assert reward.separate
        [scored] = reward.score([rollout], [range(3)])
    assert scored.rewards == expected(rewriting, 3, "m")
    said = f"{rewriting}: prefixes are encoded one by one, because its chat template writes earlier"
    assert said in capsys.readouterr().err


def test_chunks_are_in_flight_together_and_come_back_in_order(folder: Path) -> None:
    rollouts = [dialogue(1 + n % 3, f"p{n // 2:03d}", n % 2) for n in range(160)]
    waiting = Counter(100)
    with fake_pooling() as fake, unprobed(folder, fake.url) as reward:
        chunks = [chunk for window in windows(rollouts, "train") for chunk in window]
        plain = list(score_chunks(reward, chunks, "all"))
        fake.answer = waiting
        crowded = list(score_chunks(reward, chunks, "all"))
    assert waiting.most >= 100
    assert crowded == plain
    assert [chunk.number for chunk, _ in crowded] == list(range(5))
    for chunk, records in crowded:
        for rollout, record in zip(chunk.rollouts, records, strict=True):
            own = [
                value_of(own_ids(folder, rollout, turn)) for turn in range(len(rollout.turns or []))
            ]
            assert record["rewards"] == own


def flaky(bad: Answer, times: int = 2) -> Callable[[dict[str, Any]], Answer]:
    """Answer so many times badly, then well."""
    left = [times]

    def answer(body: dict[str, Any]) -> Answer:
        left[0] -= 1
        return bad if left[0] >= 0 else pooled(body)

    return answer


CUT = (200, b'{"data": [', {"Content-Length": "400"})


@pytest.mark.parametrize(
    "bad",
    [
        (503, {"error": {"message": "busy"}}, {}),
        (429, {"error": {"message": "later"}}, {}),
        (0, None, {}),
        CUT,
        (200, b"<html>a proxy's page</html>", {}),
        (200, {"hello": "a proxy"}, {}),
    ],
    ids=["503", "429", "crash", "cut", "page", "json"],
)
def test_an_outage_is_asked_again(folder: Path, bad: Answer) -> None:
    with fake_pooling(flaky(bad)) as fake, unprobed(folder, fake.url) as reward:
        [scored] = reward.score([dialogue(2, "m")], [range(2)])
    assert scored.rewards == expected(folder, 2, "m")
    assert len(fake.bodies) == 3
    assert fake.bodies[0] == fake.bodies[2]


def stopped(folder: Path, answer: Callable[[dict[str, Any]], Answer], **settings: Any) -> list[Any]:
    """Return what a stop says of the two turns of p3's second sample, and what the server got."""
    with (
        fake_pooling(answer) as fake,
        unprobed(folder, fake.url, **settings) as reward,
        pytest.raises(EngineError) as caught,
    ):
        reward.score([dialogue(2, "p3", 1)], [range(2)])
    return [str(caught.value), fake]


def refused(folder: Path, settings: Settings | None = None, **fake: Any) -> tuple[str, list[Any]]:
    """Return why a server can't be attached to, and what it was asked."""
    with (
        fake_pooling(**fake) as server,
        pytest.raises((DataError, EngineError)) as caught,
        opened(folder, server.url, settings=settings),
    ):
        pass
    return str(caught.value).replace(server.url, "URL"), server.bodies


def test_a_lost_server_stops_the_stage_with_the_row(folder: Path) -> None:
    said, fake = stopped(folder, flaky((503, {"error": "gone"}, {}), 99))
    assert said.startswith("model gave no score for prompt_id 'p3', sample 1: ")
    assert "failed 3 times" in said
    assert said.endswith("Run the same command again to go on")
    assert len(fake.bodies) == 3


def test_another_server_takes_what_one_fails(folder: Path) -> None:
    rollouts = [dialogue(2, f"m{n}") for n in range(12)]
    with (
        fake_pooling() as good,
        fake_pooling() as bad,
        opened(folder, good.url, bad.url) as reward,
    ):
        assert reward.parallel == 8
        probes = len(bad.bodies)
        bad.answer = lambda body: (0, None, {})
        scored = reward.score(rollouts, [range(2)] * 12)
    assert [one.rewards for one in scored] == [expected(folder, 2, f"m{n}") for n in range(12)]
    assert len(bad.bodies) > probes


def test_rollouts_of_a_prompt_go_where_their_prefix_is_cached(folder: Path) -> None:
    rollouts = [dialogue(1, f"m{n // 4}", n % 4) for n in range(24)]
    with (
        fake_pooling() as one,
        fake_pooling() as two,
        unprobed(folder, one.url, two.url) as reward,
    ):
        reward.score(rollouts, [[0]] * 24)
    at_one = [body["input"][0] for body in one.bodies]
    homes = {(r.prompt_id, own_ids(folder, r, 0) in at_one) for r in rollouts}
    assert len(homes) == 6
    assert len(at_one) == len(two.bodies) == 12


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_stops_at_once_with_the_row(folder: Path, value: float) -> None:
    data = [packed(1.0), packed(value)]
    said, fake = stopped(folder, lambda body: (200, answer_of(data), {}))
    assert f"gave {value} for prompt_id 'p3', sample 1, policy turn 1" in said
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([packed(1.0)], "1 scores for 2 prefixes"),
        ([packed(1.0)] * 3, "3 scores for 2 prefixes"),
        ([packed(1.0), packed(1.0, 2.0)], "isn't one float32"),
        ([packed(1.0), None], "isn't one float32"),
        ([packed(1.0), [0.5]], "isn't one float32"),
        ([packed(1.0), "%%%%"], "isn't one float32"),
    ],
)
def test_an_answer_that_is_not_one_score_each_stops(
    folder: Path, data: list[Any], words: str
) -> None:
    said, fake = stopped(folder, lambda body: (200, answer_of(data), {}))
    assert said.startswith("model gave no score for prompt_id 'p3', sample 1: ")
    assert words in said
    assert len(fake.bodies) == 1


def test_scores_in_another_order_stop(folder: Path) -> None:
    swapped = answer_of([packed(1.0), packed(2.0)])
    swapped["data"].reverse()
    said, _ = stopped(folder, lambda body: (200, swapped, {}))
    assert "prompt_id 'p3', sample 1: the server answered prefix 1 in place of 0" in said


def test_a_refusal_stops_with_the_row_and_the_servers_words(folder: Path) -> None:
    """A length that the server doesn't take, and we do, is no condition of the row."""
    words = "This model's maximum context length is 16 tokens."
    said, fake = stopped(folder, flaky((400, {"error": {"message": words}}, {}), 99))
    assert said.startswith("model gave no score for prompt_id 'p3', sample 1: ")
    assert f"answered 400: {words}" in said
    assert len(fake.bodies) == 1


@pytest.mark.parametrize("status", [400, 401, 503])
def test_a_key_is_sent_and_never_shown(
    folder: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_KEY", "sk-hidden-key")
    bad = (status, {"error": {"message": "Bearer sk-hidden-key is bad"}}, {})
    said, fake = stopped(folder, flaky(bad, 99), key_env="REWARD_KEY")
    assert fake.headers[0]["Authorization"] == "Bearer sk-hidden-key"
    assert "hidden" not in said
    assert "$REWARD_KEY" in said


def test_a_server_of_another_model_is_refused(folder: Path) -> None:
    said, asked = refused(folder, name="other")
    assert said.startswith(f"URL serves other, not {folder}")
    assert asked == []


def test_a_server_that_reads_less_is_refused_with_the_length_to_ask_for(folder: Path) -> None:
    """Which rows are too long mustn't depend on the server that was asked."""
    said, _ = refused(folder, context=100)
    assert said.startswith("URL reads at most 100 ids, not the 4096 that may be scored: give")
    assert "--max_length 100, or" in said
    with (
        fake_pooling(context=100) as fake,
        opened(folder, fake.url, settings=Settings(max_length=100)) as reward,
    ):
        [scored] = reward.score([dialogue(3, "m")], [range(3)])
    assert scored.errors[-1] == "too_long"


def deaf(body: dict[str, Any]) -> Answer:
    """Activate, whatever is asked."""
    return pooled(body | {"use_activation": True})


def test_a_server_that_activates_whatever_it_is_told_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    said, _ = refused(folder, answer=deaf)
    assert said.startswith("URL gives the same scores with and without an activation")
    # Of a regression vLLM has no activation, so that nothing can be wrong with it.
    regression = write_classifier(tmp_path / NAME)
    config = json.loads((regression / "config.json").read_text())
    config["problem_type"] = "regression"
    (regression / "config.json").write_text(json.dumps(config))
    with fake_pooling(deaf) as fake, opened(regression, fake.url) as reward:
        assert reward.name == str(regression)


@pytest.mark.parametrize(
    ("off", "dtype", "trusted"),
    [(0.5, "auto", False), (0.01, "auto", True), (0.01, "float32", False), (1e-6, "float32", True)],
)
def test_scores_are_fresh_where_those_from_the_cache_are_others(
    folder: Path, off: float, dtype: str, trusted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(body: dict[str, Any]) -> Answer:
        if "cache_salt" in body or body["use_activation"]:
            return pooled(body)
        return 200, answer_of([packed(value_of(ids) * (1 + off)) for ids in body["input"]]), {}

    with (
        fake_pooling(stale) as fake,
        opened(folder, fake.url, settings=Settings(dtype=dtype)) as reward,
    ):
        probes = len(fake.bodies)
        [scored] = reward.score([dialogue(3, "m")], [range(3)])
        asked = fake.bodies[probes:]
    said = f"{fake.url}: no score is taken from its cache, because those of probes differ by up to"
    assert (said in capsys.readouterr().err) is not trusted
    assert (scored.rewards == expected(folder, 3, "m")) is not trusted
    assert [len(body["input"]) for body in asked] == ([3] if trusted else [1, 1, 1])
    salts = [body["cache_salt"] for body in fake.bodies if "cache_salt" in body]
    assert len(salts) == len(set(salts)) > 5


def test_a_server_that_generates_is_told_apart(folder: Path) -> None:
    said, _ = refused(folder, answer=lambda body: (404, {"detail": "Not Found"}, {}))
    assert said == "URL has no /pooling: start it with `--runner pooling`"


def test_what_no_server_can_score_is_refused(tmp_path: Path) -> None:
    armorm = write_armorm(tmp_path)
    with pytest.raises(DataError, match=r"gating network.*leave out --engine vllm"):
        load_served(str(armorm), Settings(), EngineOptions(Rounds()))
    with pytest.raises(DataError, match=r"rule:length is no model.*leave out --engine vllm"):
        load_served("rule:length", Settings(), EngineOptions(Rounds()))


def test_closing_calls_off_what_waits(folder: Path) -> None:
    free = threading.Event()

    def stuck(body: dict[str, Any]) -> Answer:
        free.wait(10)
        return pooled(body)

    with fake_pooling(stuck) as fake, ThreadPoolExecutor(4) as pool:
        with unprobed(folder, fake.url) as reward:
            waiting = [pool.submit(reward.score, [dialogue(1, "m")], [[0]]) for _ in range(4)]
            while len(fake.bodies) < 4:
                time.sleep(0.01)
            began = time.monotonic()
        for one in waiting:
            with pytest.raises(EngineError, match="called off"):
                one.result(5)
        assert time.monotonic() - began < 5
        with pytest.raises(EngineError, match="are closed"):
            reward.score([dialogue(1, "m")], [[0]])
        free.set()
