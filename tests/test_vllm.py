"""The vLLM engine over HTTP, with a small server in vLLM's place. A real one: test_vllm_server."""

import asyncio
import threading
from typing import Any

import pytest

from pipeline.engines.base import Completion, EngineOptions
from pipeline.engines.rounds import Rounds
from pipeline.engines.vllm import Retry, Served, VllmEngine, attach, open_engine
from pipeline.errors import EngineError
from vllm_fixtures import STOP, Answer, completion, fake_vllm, models, processed, request

QUICK = Retry(attempts=3, first_wait_s=0.01)


def complete(url: str, *requests: Any, max_context: int = 256) -> list[Completion]:
    async def run() -> list[Completion]:
        engine = VllmEngine([Served(url, "tiny", max_context)], retry=QUICK)
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(run())


def failing(times: int, status: int, headers: dict[str, str] | None = None) -> Any:
    """Answer `times` times with `status`, then as a healthy server does."""
    left = [times]

    def answer(body: dict[str, Any]) -> Answer:
        left[0] -= 1
        if left[0] >= 0:
            return status, {"error": {"message": "no luck"}}, headers or {}
        return processed(body)

    return answer


def test_ids_and_logprobs_come_back_with_the_sampled_stop_token() -> None:
    with fake_vllm() as fake:
        assert complete(fake.url, request([1, 2, 3])) == [
            Completion([7, STOP], [-0.5, -0.25], "stop")
        ]


def test_every_sampling_parameter_is_sent() -> None:
    with fake_vllm() as fake:
        complete(fake.url, request([1, 2], 9, temperature=0.7, max_tokens=5))
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
            "stop": [],
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
    assert done == Completion([7, STOP], None, "stop")


def test_new_ids_are_bounded_by_the_context_and_nothing_is_sent_without_room() -> None:
    with fake_vllm() as fake:
        complete(fake.url, request([1] * 6, max_tokens=100), max_context=10)
        assert [body["max_tokens"] for body in fake.bodies] == [4]
        with pytest.raises(EngineError, match="no room after 10 ids"):
            complete(fake.url, request([1] * 10), max_context=10)
        assert len(fake.bodies) == 1


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_an_outage_that_passes_is_retried(status: int) -> None:
    with fake_vllm(failing(2, status)) as fake:
        [done] = complete(fake.url, request([1, 2]))
    assert done.ids == [7, STOP]
    assert len(fake.bodies) == 3
    assert fake.bodies[0] == fake.bodies[1] == fake.bodies[2]


@pytest.mark.parametrize("status", [429, 500])
def test_retries_are_bounded_and_end_with_the_servers_words(status: int) -> None:
    with (
        fake_vllm(failing(99, status)) as fake,
        pytest.raises(EngineError, match=f"answered {status}: no luck"),
    ):
        complete(fake.url, request([1]))
    assert len(fake.bodies) == 3


def test_a_refused_request_is_not_repeated() -> None:
    with (
        fake_vllm(failing(99, 400)) as fake,
        pytest.raises(EngineError, match="answered 400: no luck"),
    ):
        complete(fake.url, request([1]))
    assert len(fake.bodies) == 1


def test_a_server_that_is_gone_is_an_engine_error() -> None:
    with fake_vllm() as fake:
        url = fake.url
    with pytest.raises(EngineError, match=f"the server at {url} is lost: ConnectError"):
        complete(url, request([1]))


@pytest.mark.parametrize(("asked", "wait_s"), [("7", 7.0), ("900", 60.0), ("Fri, 31 Dec", 0.01)])
def test_the_wait_a_server_asks_for_is_kept_within_bounds(asked: str, wait_s: float) -> None:
    with fake_vllm(failing(1, 429, {"Retry-After": asked})) as fake:
        waits = []

        async def run() -> None:
            engine = VllmEngine([Served(fake.url, "tiny", 256)], retry=Noted(waits))
            await engine.complete(request([1]))
            await engine.close()

        asyncio.run(run())
    assert waits == [wait_s]


class Noted(Retry):
    """Notes how long the policy would wait, and doesn't."""

    def __init__(self, waits: list[float]) -> None:
        super().__init__(3, 0.01)
        object.__setattr__(self, "waits", waits)

    def policy(self) -> dict[str, Any]:
        policy = super().policy()
        wait = policy["wait"]

        def note(state: Any) -> float:
            self.waits.append(wait(state))  # type: ignore[attr-defined]
            return 0.0

        return policy | {"wait": note}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "returned no ids"),
        ({"prompt_token_ids": [0, 1, 2]}, "not the prompt's"),
        ({"finish_reason": "abort"}, "'abort'"),
        ({"logprobs": None}, "2 ids came with log-probs"),
        ({"logprobs": {"token_logprobs": [-0.5]}}, "2 ids came with log-probs"),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "2 ids came with log-probs"),
    ],
)
def test_an_answer_that_is_not_exact_is_refused(change: dict[str, Any], message: str) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        reply = completion(body, [7, STOP], [-0.5, -0.25])
        reply["choices"][0] |= change
        return 200, reply, {}

    with fake_vllm(answer) as fake, pytest.raises(EngineError, match=message):
        complete(fake.url, request([1, 2]))
    assert len(fake.bodies) == 1


def test_a_hundred_requests_are_in_flight_together() -> None:
    barrier = threading.Barrier(100)

    def answer(body: dict[str, Any]) -> Answer:
        barrier.wait(timeout=30)
        return processed(body)

    with fake_vllm(answer) as fake:
        assert len(complete(fake.url, *(request([1], n) for n in range(100)))) == 100


def test_the_rollouts_of_a_prompt_share_a_server_and_prompts_spread() -> None:
    async def run(urls: list[str]) -> None:
        engine = VllmEngine([Served(url, "tiny", 256) for url in urls])
        await asyncio.gather(*(engine.complete(request([1], n)) for n in [*range(20)] * 2))
        await engine.close()

    with fake_vllm() as one, fake_vllm() as two:
        asyncio.run(run([one.url, two.url]))
    seeds = [{body["seed"] for body in fake.bodies} for fake in (one, two)]
    assert seeds[0] | seeds[1] == set(range(20))
    assert not seeds[0] & seeds[1]
    assert len(one.bodies) == 2 * len(seeds[0]) > 0
    assert len(two.bodies) == 2 * len(seeds[1]) > 0


@pytest.mark.parametrize("asked", ["tiny", "/models/tiny", "/elsewhere/tiny/", "org/tiny"])
def test_attaching_finds_the_model_by_name_or_folder(asked: str) -> None:
    with fake_vllm() as fake:
        assert attach(f"{fake.url}/v1/", asked) == Served(fake.url, "tiny", 256)
        assert [body["logit_bias"] for body in fake.bodies] == [{"0": 100.0}, {"1": 100.0}]


def test_attaching_to_another_model_is_refused() -> None:
    with fake_vllm() as fake, pytest.raises(EngineError, match="serves tiny, not org/large"):
        attach(fake.url, "org/large")


def test_attaching_to_a_server_of_raw_logprobs_is_refused() -> None:
    """Id 0 has probability 0.95 without the bias and id 1 has 0.01: only the second probe tells."""

    def raw(body: dict[str, Any]) -> Answer:
        [token] = map(int, body["logit_bias"])
        return 200, completion(body, [token], [-0.05 if token == 0 else -4.6]), {}

    with fake_vllm(raw) as fake, pytest.raises(EngineError, match="logprobs-mode processed"):
        attach(fake.url, "tiny")
    assert len(fake.bodies) == 2


def test_attaching_where_nothing_listens_names_the_url() -> None:
    with fake_vllm() as fake:
        url = fake.url
    with pytest.raises(EngineError, match=f"the server at {url} is lost"):
        attach(url, "tiny", retry=QUICK)


def test_the_smallest_context_of_several_servers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "made-up")
    with fake_vllm() as one, fake_vllm() as two:
        two.models = models(max_model_len=128)
        engine = open_engine("tiny", None, EngineOptions(Rounds(), urls=(one.url, two.url)))
        asyncio.run(engine.close())
        assert engine.max_context == 128
        assert {headers["Authorization"] for headers in one.headers} == {"Bearer made-up"}
