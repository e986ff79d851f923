"""TRL's servers: a small one that answers as TRL 0.29.1 to 1.10 do, one that takes text only, and
one that is vLLM's own. https://github.com/huggingface/trl/blob/v1.0.0/trl/scripts/vllm_serve.py
"""

import asyncio
import threading
import time
from typing import Any

import pytest

from pipeline.engines.base import Completion, Engine, EngineOptions, Request, Usage
from pipeline.engines.rounds import Rounds
from pipeline.engines.trl import TrlEngine, open_engine
from pipeline.engines.vllm import VllmEngine
from pipeline.errors import DataError, EngineError
from vllm_fixtures import STOP, Answer, FakeVllm, fake_vllm, request


class Words:
    """Reads an id as its number and a blank."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def generated(body: dict[str, Any], ids: list[int], logprobs: list[Any]) -> dict[str, Any]:
    """Return what `/generate/` answers for its one prompt."""
    return {
        "prompt_ids": body["prompts"],
        "completion_ids": [ids],
        "logprobs": [[[x] for x in logprobs]],
        "logprob_token_ids": [[[i] for i in ids]],
    }


def tempered(body: dict[str, Any]) -> Answer:
    """Answer as a server of tempered log-probs: a certain id, or [7, STOP]."""
    if allowed := body["generation_kwargs"].get("allowed_token_ids"):
        return 200, generated(body, allowed, [0.0]), {}
    return 200, generated(body, [7, STOP], [-0.5, -0.25]), {}


def serve_old(fake: FakeVllm) -> None:
    fake.pages = {"/health/": (200, {"status": "ok"}, {})}


def opened(*fakes: FakeVllm, tell: Any = lambda line: None, **options: Any) -> Engine:
    urls = tuple(fake.url for fake in fakes)
    return open_engine(
        "tiny", Words(), EngineOptions(Rounds(), urls=urls, tell=tell, attempts=2, **options)
    )


def complete(engine: Engine, *requests: Request) -> list[Completion]:
    async def run() -> list[Completion]:
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(run())


def test_ids_go_in_and_ids_and_logprobs_come_out_of_an_older_server() -> None:
    told: list[str] = []
    with fake_vllm(tempered) as fake:
        serve_old(fake)
        engine = opened(fake, max_model_len=64, tell=told.append)
        sent = request([1, 2, 3], 9, temperature=0.7, max_tokens=5, stop=("END",))
        assert complete(engine, sent) == [
            Completion([7, STOP], [-0.5, -0.25], "stop", usage=Usage(3, 2))
        ]
        assert fake.paths == ["/v1/models", *["/generate/"] * 3]
    assert isinstance(engine, TrlEngine)
    assert engine.max_context == 64
    assert told == [
        f"{fake.url}: TRL before 1.11 answers one request at a time and doesn't name its model"
    ]
    assert fake.bodies[2] == {
        "prompts": [[1, 2, 3]],
        "n": 1,
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "max_tokens": 5,
        "logprobs": 0,
        "generation_kwargs": {
            "seed": 9,
            "stop": ["END"],
            "stop_token_ids": [STOP],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        },
    }


@pytest.mark.parametrize(
    ("ids", "stop", "reason"),
    [
        ([7, 8, 6], (), "length"),
        ([7, 8, STOP], (), "stop"),
        ([7, 8], ("8",), "stop"),
        ([7, 8], ("half a letter",), "stop"),
        ([7, 8, 6], ("8 6",), "stop"),
        ([7, 8, 6], ("5",), "length"),
    ],
)
def test_why_it_stopped_is_read_off_the_ids(
    ids: list[int], stop: tuple[str, ...], reason: str
) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        if "allowed_token_ids" in body["generation_kwargs"]:
            return tempered(body)
        return 200, generated(body, ids, [-1.0] * len(ids)), {}

    with fake_vllm(answer) as fake:
        serve_old(fake)
        [done] = complete(opened(fake, max_model_len=64), request([1], max_tokens=3, stop=stop))
    assert (done.ids, done.finish_reason) == (ids, reason)


def test_logprobs_of_raw_logits_are_not_kept_and_that_is_said() -> None:
    def raw(body: dict[str, Any]) -> Answer:
        allowed = body["generation_kwargs"].get("allowed_token_ids")
        return 200, generated(body, allowed or [7, STOP], [-2.0] if allowed else [-3.0, -4.0]), {}

    told: list[str] = []
    with fake_vllm(raw) as fake:
        serve_old(fake)
        [done] = complete(opened(fake, max_model_len=64, tell=told.append), request([1]))
    assert (done.ids, done.logprobs) == ([7, STOP], None)
    assert "its log-probs are of raw logits, and are not kept" in told[0]


def test_logprobs_are_not_kept_where_sampling_renormalises() -> None:
    with fake_vllm(tempered) as fake:
        serve_old(fake)
        [done] = complete(opened(fake, max_model_len=64), request([1], top_p=0.5))
        assert fake.bodies[-1]["top_p"] == 0.5
    assert done.logprobs is None


def test_a_server_that_takes_text_only_is_refused() -> None:
    detail = [{"loc": ["body", "prompts", 0], "msg": "Input should be a valid string"}]
    with fake_vllm(lambda body: (422, {"detail": detail}, {})) as fake:
        serve_old(fake)
        with pytest.raises(EngineError, match=r"valid string.*TRL before 0\.29\.1 takes text"):
            opened(fake, max_model_len=64)


def test_a_server_of_another_kind_is_refused() -> None:
    with fake_vllm(lambda body: (404, {"detail": "Not Found"}, {})) as fake:
        serve_old(fake)
        with pytest.raises(EngineError, match="neither vLLM nor TRL serves there"):
            opened(fake, max_model_len=64)


def test_the_longest_context_must_be_said_where_the_server_does_not_tell() -> None:
    with fake_vllm(tempered) as fake:
        serve_old(fake)
        with pytest.raises(DataError, match="give --max_model_len"):
            opened(fake)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [[0, 1]]}, "not the prompt's"),
        ({"completion_ids": [[]]}, "returned no ids"),
        ({"logprobs": [[[-0.5]]]}, "2 ids came with log-probs"),
        ({"logprobs": [[[-0.5], [None]]]}, "2 ids came with log-probs"),
        ({"logprobs": None}, "2 ids came with log-probs"),
        ({"logprob_token_ids": [[[7], [8]]]}, "are of other ids"),
    ],
)
def test_an_answer_that_is_not_exact_is_refused(change: dict[str, Any], message: str) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        status, reply, headers = tempered(body)
        is_probe = "allowed_token_ids" in body["generation_kwargs"]
        return status, reply if is_probe else reply | change, headers

    with fake_vllm(answer) as fake:
        serve_old(fake)
        with pytest.raises(EngineError, match=message):
            complete(opened(fake, max_model_len=64), request([1]))


def test_a_server_is_asked_for_two_completions_at_a_time() -> None:
    """It answers one after the other; waiting in it counts against a request's time limit."""
    lock, now, most = threading.Lock(), [0], [0]

    def answer(body: dict[str, Any]) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return tempered(body)

    with fake_vllm(answer) as fake:
        serve_old(fake)
        done = complete(opened(fake, max_model_len=64), *(request([1], n) for n in range(12)))
    assert (len(done), most[0]) == (12, 2)


def test_a_newer_servers_own_protocol_is_vllms() -> None:
    with fake_vllm() as fake:
        engine = opened(fake)
        [done] = complete(engine, request([1, 2]))
        assert set(fake.paths) == {"/v1/models", "/v1/completions"}
    assert isinstance(engine, VllmEngine)
    assert engine.max_context == 256
    assert done.logprobs == [-0.5, -0.25]


def test_servers_of_both_kinds_are_not_mixed() -> None:
    with fake_vllm() as new, fake_vllm(tempered) as old:
        serve_old(old)
        with pytest.raises(EngineError, match=f"{old.url} are of TRL before 1.11, the others"):
            opened(new, old)


def test_a_url_is_needed() -> None:
    with pytest.raises(DataError, match="attaches to servers that run"):
        opened()
