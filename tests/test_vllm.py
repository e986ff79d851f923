"""The vLLM engine over HTTP, with a small server in vLLM's place. A real one: test_vllm_server.

What happens when servers fail is in test_serving.
"""

import asyncio
import threading
import time
from typing import Any

import pytest

from pipeline.engines.base import Completion, EngineOptions, Usage
from pipeline.engines.rounds import Rounds
from pipeline.engines.serving import Served
from pipeline.engines.vllm import attach, open_engine
from pipeline.engines.wire import Wire
from pipeline.errors import DataError, EngineError, RequestFailed
from vllm_fixtures import (
    QUICK,
    STOP,
    Answer,
    complete,
    completion,
    failing,
    fake_vllm,
    models,
    processed,
    request,
)


def attached(url: str, model: str) -> Served:
    async def run() -> Served:
        async with Wire("", 30.0) as wire:
            return await attach(wire, url, model, QUICK)

    return asyncio.run(run())


def test_ids_and_logprobs_come_back_with_the_sampled_stop_token_and_the_usage() -> None:
    with fake_vllm() as fake:
        assert complete(fake.url, request([1, 2, 3])) == [
            Completion([7, STOP], [-0.5, -0.25], "stop", usage=Usage(3, 2))
        ]


def test_every_sampling_parameter_is_sent() -> None:
    with fake_vllm() as fake:
        complete(fake.url, request([1, 2], 9, temperature=0.7, max_tokens=5, stop=("\n\n", "END")))
    assert fake.paths == ["/v1/completions"]
    assert fake.bodies == [
        {
            "model": "tiny",
            "prompt": [1, 2],
            "add_special_tokens": False,
            "n": 1,
            "stream": False,
            "echo": False,
            "seed": 9,
            "max_tokens": 5,
            "min_tokens": 0,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": None,
            "bad_words": [],
            "stop": ["\n\n", "END"],
            "stop_token_ids": [STOP],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
    ]


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_no_logprobs_are_asked_for_or_kept_where_the_engine_renormalises(
    sampling: dict[str, Any],
) -> None:
    with fake_vllm() as fake:
        [done] = complete(fake.url, request([1], **sampling))
    assert fake.bodies[0]["logprobs"] is None
    assert (done.ids, done.logprobs) == ([7, STOP], None)


def test_new_ids_are_bounded_by_the_context_and_nothing_is_sent_without_room() -> None:
    with fake_vllm() as fake:
        complete(fake.url, request([1] * 6, max_tokens=100), max_context=10)
        assert [body["max_tokens"] for body in fake.bodies] == [4]
        with pytest.raises(EngineError, match="no room after 10 ids"):
            complete(fake.url, request([1] * 10), max_context=10)
        assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        ({"prompt_tokens": 20, "completion_tokens": 2}, Usage(20, 2)),
        (
            {
                "prompt_tokens": 20,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
            Usage(20, 2, 16),
        ),
        (
            {"prompt_tokens": 20, "completion_tokens": 2, "prompt_tokens_details": None},
            Usage(20, 2),
        ),
        (None, None),
    ],
)
def test_the_usage_is_what_the_server_says(told: Any, usage: Usage | None) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        return 200, processed(body)[1] | {"usage": told}, {}

    with fake_vllm(answer) as fake:
        assert complete(fake.url, request([1]))[0].usage == usage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "returned no ids"),
        ({"prompt_token_ids": [0, 1, 2]}, "not the prompt's"),
        ({"finish_reason": "repetition"}, "'repetition'"),
        ({"logprobs": None}, "2 ids came with log-probs"),
        ({"logprobs": {"token_logprobs": [-0.5]}}, "2 ids came with log-probs"),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "2 ids came with log-probs"),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "2 ids came with log-probs"),
    ],
)
def test_an_answer_that_is_not_exact_is_refused(change: dict[str, Any], message: str) -> None:
    """For all requests: a server that isn't exact for one isn't for the next."""

    def answer(body: dict[str, Any]) -> Answer:
        reply = completion(body, [7, STOP], [-0.5, -0.25])
        reply["choices"][0] |= change
        return 200, reply, {}

    with fake_vllm(answer) as fake, pytest.raises(EngineError, match=message) as caught:
        complete(fake.url, request([1, 2]))
    assert not isinstance(caught.value, RequestFailed)
    assert len(fake.bodies) == 1


def test_a_request_that_a_stopping_server_gave_up_is_sent_again() -> None:
    aborted = {"choices": [{"token_ids": [7], "prompt_token_ids": [1], "finish_reason": "abort"}]}
    with fake_vllm(failing(1, 200, aborted)) as fake:
        [done] = complete(fake.url, request([1]))
    assert done.ids == [7, STOP]
    assert fake.bodies[0] == fake.bodies[1]


def test_a_hundred_requests_are_in_flight_together() -> None:
    barrier = threading.Barrier(100)

    def answer(body: dict[str, Any]) -> Answer:
        barrier.wait(timeout=30)
        return processed(body)

    with fake_vllm(answer) as fake:
        assert len(complete(fake.url, *(request([1], n) for n in range(100)))) == 100


def test_the_rollouts_of_a_prompt_share_a_server_and_prompts_spread() -> None:
    requests = [request([1], n) for n in [*range(20)] * 2]
    with fake_vllm() as one, fake_vllm() as two:
        complete([one.url, two.url], *requests)
    seeds = [sorted(body["seed"] for body in fake.bodies) for fake in (one, two)]
    assert seeds == [sorted([*range(0, 20, 2)] * 2), sorted([*range(1, 20, 2)] * 2)]


@pytest.mark.parametrize("asked", ["tiny", "/models/tiny", "/elsewhere/tiny/", "org/tiny"])
def test_attaching_finds_the_model_by_name_or_folder(asked: str) -> None:
    with fake_vllm() as fake:
        assert attached(f"{fake.url}/v1/", asked) == Served(fake.url, "tiny", 256)
        assert [body["logit_bias"] for body in fake.bodies] == [{"0": 100.0}, {"1": 100.0}]


def test_attaching_to_another_model_is_refused() -> None:
    with fake_vllm() as fake, pytest.raises(EngineError, match="serves tiny, not org/large"):
        attached(fake.url, "org/large")


def test_attaching_to_an_api_that_is_not_vllms_is_refused() -> None:
    with fake_vllm() as fake:
        fake.pages["/v1/models"] = (200, {"data": [{"id": "tiny"}]}, {})
        with pytest.raises(EngineError, match="is no vLLM server: it tells no max_model_len"):
            attached(fake.url, "tiny")


def test_attaching_to_a_server_of_raw_logprobs_is_refused() -> None:
    """Id 0 has probability 0.95 without the bias and id 1 has 0.01: only the second probe tells."""

    def raw(body: dict[str, Any]) -> Answer:
        [token] = map(int, body["logit_bias"])
        return 200, completion(body, [token], [-0.05 if token == 0 else -4.6]), {}

    with fake_vllm(raw) as fake, pytest.raises(EngineError, match="logprobs-mode processed"):
        attached(fake.url, "tiny")
    assert len(fake.bodies) == 2


def test_attaching_waits_for_a_server_that_is_still_loading() -> None:
    with fake_vllm(failing(1, 503)) as fake:
        assert attached(fake.url, "tiny") == Served(fake.url, "tiny", 256)
    assert len(fake.bodies) == 3


def test_attaching_where_nothing_listens_names_the_url() -> None:
    with fake_vllm() as fake:
        url = fake.url
    with pytest.raises(EngineError, match=f"{url}/v1/models is lost"):
        attached(url, "tiny")


@pytest.mark.parametrize(
    ("url", "message"),
    [("localhost:8000", "is no URL of a server"), ("http://me:secret@host/v1", "a password in it")],
)
def test_urls_that_no_request_could_use_are_refused(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_engine("tiny", None, EngineOptions(Rounds(), urls=(url,)))
    assert "secret" not in str(caught.value)


def test_the_smallest_context_of_several_servers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "made-up")
    with fake_vllm() as one, fake_vllm() as two:
        two.pages["/v1/models"] = (200, models(max_model_len=128), {})
        engine = open_engine("tiny", None, EngineOptions(Rounds(), urls=(one.url, two.url)))
        asyncio.run(engine.close())
        assert engine.max_context == 128
        assert {headers["Authorization"] for headers in one.headers} == {"Bearer made-up"}


def test_the_options_bound_the_attempts_and_name_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "made-up")
    with fake_vllm() as fake:
        options = EngineOptions(Rounds(), urls=(fake.url,), attempts=1, api_key_env="MY_KEY")

        async def run() -> None:
            engine = await asyncio.to_thread(open_engine, "tiny", None, options)
            fake.answer = failing(99, 500)
            try:
                await engine.complete(request([1]))
            finally:
                await engine.close()

        with pytest.raises(RequestFailed, match="failed 1 times"):
            asyncio.run(run())
        assert {headers["Authorization"] for headers in fake.headers} == {"Bearer made-up"}


def test_an_opening_that_is_called_off_ends_at_once() -> None:
    """The server's second probe never comes back."""
    reached, release = threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> Answer:
        reached.set()
        release.wait(30)
        return processed(body)

    with fake_vllm(answer) as fake:
        options = EngineOptions(Rounds(), urls=(fake.url,))

        async def run() -> float:
            opening = asyncio.create_task(asyncio.to_thread(open_engine, "tiny", None, options))
            await asyncio.to_thread(reached.wait, 30)
            options.cancelled.set()
            began = time.monotonic()
            with pytest.raises(EngineError, match="called off"):
                await opening
            return time.monotonic() - began

        try:
            assert asyncio.run(run()) < 2.0
        finally:
            release.set()
