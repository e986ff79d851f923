"""Servers that fail: what is sent again and how often, where to, and what the errors say."""

import asyncio
import random
import socket
import threading
import time
import traceback
from collections import Counter
from typing import Any

import pytest

from pipeline.engines.base import EngineOptions
from pipeline.engines.rounds import Rounds
from pipeline.engines.serving import Retry
from pipeline.engines.vllm import open_engine
from pipeline.engines.wire import Outage, Wire, proxy_of
from pipeline.errors import DataError, EngineError, RequestFailed
from vllm_fixtures import (
    NO_LUCK,
    STOP,
    Answer,
    complete,
    completion,
    failing,
    fake_vllm,
    processed,
    request,
)

CUT = (200, b'{"choices": [', {"Content-Length": "5000"})
KEY = "sk-made-up-0123456789"


@pytest.mark.parametrize(
    "failure",
    [
        (429,),
        (500,),
        (503,),
        (408,),
        (0,),
        CUT,
        (200, b"<html>Bad gateway</html>"),
        (200, b"[]"),
        (200, {"error": {"message": "provider is gone"}}),
        (502, b"<html>Bad gateway</html>"),
    ],
    ids=lambda failure: f"{failure[0]}-{str(failure[1:2])[:20]}",
)
def test_an_outage_that_passes_is_retried_with_the_same_request(failure: Any) -> None:
    with fake_vllm(failing(2, *failure)) as fake:
        [done] = complete(fake.url, request([1, 2]))
    assert done.ids == [7, STOP]
    assert len(fake.bodies) == 3
    assert fake.bodies[0] == fake.bodies[1] == fake.bodies[2]


def test_a_server_that_does_not_answer_in_time_is_asked_again() -> None:
    release = threading.Event()
    slow = [True]

    def answer(body: dict[str, Any]) -> Answer:
        if slow:
            slow.pop()
            release.wait(30)
        return processed(body)

    with fake_vllm(answer) as fake:
        [done] = complete(fake.url, request([1]), timeout_s=0.3)
        release.set()
    assert (done.ids, len(fake.bodies)) == ([7, STOP], 2)


def test_a_server_that_never_answers_in_time_fails_the_request() -> None:
    release = threading.Event()

    def answer(body: dict[str, Any]) -> Answer:
        release.wait(30)
        return processed(body)

    with fake_vllm(answer) as fake:
        with pytest.raises(RequestFailed, match=r"TimeoutError: nothing within 0\.2 s$") as caught:
            complete(fake.url, request([1]), timeout_s=0.2)
        release.set()
    assert caught.value.reason == "server_lost"
    assert len(fake.bodies) == 3


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ((429,), "answered 429: no luck"),
        ((500, b"<html>Bad gateway</html>"), "answered 500: <html>Bad gateway</html>"),
        ((200, b"<html>"), "answered 200 without a JSON object: <html>"),
        ((0,), "is lost: ServerDisconnectedError: Server disconnected"),
        (CUT, "is lost: ClientPayloadError: "),
    ],
)
def test_retries_are_bounded_and_end_with_the_servers_words(failure: Any, words: str) -> None:
    with fake_vllm(failing(99, *failure)) as fake, pytest.raises(RequestFailed) as caught:
        complete(fake.url, request([1], 4))
    assert caught.value.reason == "server_lost"
    told = str(caught.value)
    assert told.startswith(f"('prompt-4', 0, 0): failed 3 times; the last time {fake.url}/v1/")
    assert words in told
    assert len(fake.bodies) == 3


def test_a_server_that_is_gone_fails_the_request_and_names_the_url() -> None:
    with fake_vllm() as fake:
        url = fake.url
    with pytest.raises(RequestFailed, match=f"{url}/v1/completions is lost") as caught:
        complete(url, request([1]))
    assert caught.value.reason == "server_lost"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_repeated_and_fails_alone(status: int) -> None:
    with (
        fake_vllm(failing(99, status)) as fake,
        pytest.raises(RequestFailed, match=f"answered {status}: no luck") as caught,
    ):
        complete(fake.url, request([1]))
    assert caught.value.reason == "server_refused"
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"answered 401; check the key in \$SOME_KEY$"),
        (403, r"answered 403: no luck; check what the key in \$SOME_KEY may do and pay for"),
        (404, "answered 404: no luck; check the URL and the name of the model, tiny"),
        (307, "answered 307, a redirect; give the URL that it leads to"),
    ],
)
def test_a_wrong_set_up_stops_the_stage_and_says_what_to_check(status: int, message: str) -> None:
    with (
        fake_vllm(failing(99, status, NO_LUCK, {"Location": "/elsewhere"})) as fake,
        pytest.raises(EngineError, match=message) as caught,
    ):
        complete(fake.url, request([1]), key_env="SOME_KEY")
    assert not isinstance(caught.value, RequestFailed)
    assert len(fake.bodies) == 1


@pytest.mark.parametrize("words", [{"error": {"message": f"bad {KEY}"}}, f"bad {KEY}".encode()])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 200, 0])
def test_the_key_is_in_no_message_even_where_the_server_repeats_it(
    status: int, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with fake_vllm(failing(99, status, words)) as fake, pytest.raises(EngineError) as caught:
        complete(fake.url, request([1]), key_env="SOME_KEY")
    assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}
    shown = "".join(traceback.format_exception(caught.value))
    error: BaseException | None = caught.value
    while error is not None:
        shown += repr(error)
        error = error.__cause__ or error.__context__
    assert KEY not in shown
    assert len(shown) > 100


def test_a_key_that_no_header_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "made-up\nkey")
    with pytest.raises(DataError, match=r"\$VLLM_API_KEY holds a line break") as caught:
        open_engine("tiny", None, EngineOptions(Rounds(), urls=("http://127.0.0.1:9",)))
    assert "made-up" not in str(caught.value)


def test_a_wire_does_not_show_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    assert KEY not in repr(Wire("SOME_KEY", 1.0))


def test_pauses_grow_threefold_to_a_minute_and_keep_what_the_server_asks_for() -> None:
    retry = Retry()
    assert [retry.pause_s(n, 0.0, 0.0) for n in range(1, 7)] == [1, 3, 9, 27, 60, 60]
    assert retry.pause_s(1, 7.0, 0.0) == 7.0
    # Those that failed together come back spread over a quarter more.
    assert [retry.pause_s(1, 8.0, draw) for draw in (0.0, 0.5)] == [8.0, 9.0]


@pytest.mark.parametrize(("asked", "wait_s"), [("7", 7.0), ("900", 60.0), ("Fri, 31 Dec", 0.0)])
def test_the_wait_a_server_asks_for_is_kept_within_bounds(asked: str, wait_s: float) -> None:
    async def run(url: str) -> float:
        async with Wire("", 5.0) as wire:
            with pytest.raises(Outage, match="answered 429: no luck") as caught:
                await wire.post(f"{url}/v1/completions", {"logit_bias": None})
            return caught.value.asked_s

    with fake_vllm(failing(1, 429, NO_LUCK, {"Retry-After": asked})) as fake:
        assert asyncio.run(run(fake.url)) == wait_s


def test_a_server_that_asks_for_a_second_gets_it() -> None:
    with fake_vllm(failing(1, 429, NO_LUCK, {"Retry-After": "1"})) as fake:
        began = time.monotonic()
        complete(fake.url, request([1]))
    assert time.monotonic() - began >= 1.0


def test_requests_that_fail_together_do_not_return_together() -> None:
    """40 requests fail at once; the second attempts are spread over 0.6 s."""
    came: list[float] = []
    gate = threading.Barrier(40)

    def answer(body: dict[str, Any]) -> Answer:
        if len(came) < 40:
            came.append(0.0)
            gate.wait(30)
            return 500, NO_LUCK, {}
        came.append(time.monotonic())
        return processed(body)

    with fake_vllm(answer) as fake:
        complete(
            fake.url,
            *(request([1], n * 7919) for n in range(40)),
            retry=Retry(attempts=2, first_pause_s=2.4),
        )
    again = came[40:]
    assert len(again) == 40
    assert 0.4 < max(again) - min(again) < 1.5


def test_a_dead_servers_requests_go_to_the_others() -> None:
    with fake_vllm() as fake:
        dead = fake.url
    with fake_vllm() as healthy:
        done = complete([dead, healthy.url], *(request([1], n) for n in range(20)))
        assert [c.ids for c in done] == [[7, STOP]] * 20
        assert Counter(body["seed"] for body in healthy.bodies) == Counter(range(20))


def test_one_failing_server_of_two_costs_its_requests_one_attempt() -> None:
    """Its ten requests are sent again at the other one; nothing new goes to it while it rests."""
    with fake_vllm(failing(999, 500)) as broken, fake_vllm() as healthy:
        complete(
            [broken.url, healthy.url],
            *(request([1], n) for n in range(20)),
            retry=Retry(attempts=2, first_pause_s=5.0),
        )
    assert len(broken.bodies) == 10
    assert len(healthy.bodies) == 20


def test_a_dialogue_goes_on_at_another_server_with_the_same_request() -> None:
    with fake_vllm(failing(1, 500)) as one, fake_vllm() as two:
        [done] = complete([one.url, two.url], request([1]))
    assert done.ids == [7, STOP]
    assert one.bodies == two.bodies


def test_it_is_told_once_that_a_server_begins_to_fail() -> None:
    told: list[str] = []

    async def run(urls: list[str]) -> None:
        options = EngineOptions(Rounds(), urls=tuple(urls), tell=told.append)
        engine = await asyncio.to_thread(open_engine, "tiny", None, options)
        broken.answer = failing(999, 500)
        await asyncio.gather(*(engine.complete(request([1], n)) for n in range(8)))
        await engine.close()

    with fake_vllm() as broken, fake_vllm() as healthy:
        asyncio.run(run([broken.url, healthy.url]))
    assert told == [
        f"{broken.url}/v1/completions answered 500: no luck; what it was asked is sent again"
    ]


def test_a_server_that_comes_back_is_used_again() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    back: list[int] = []

    def come_back() -> None:
        with fake_vllm(port=port) as fake:
            while len(fake.bodies) < 1 and not release.wait(0.01):
                pass
            back.append(len(fake.bodies))

    release = threading.Event()
    thread = threading.Timer(0.5, come_back)
    thread.start()
    try:
        [done] = complete(
            f"http://127.0.0.1:{port}", request([1]), retry=Retry(attempts=6, first_pause_s=0.1)
        )
    finally:
        release.set()
        thread.join()
    assert (done.ids, back) == ([7, STOP], [1])


def test_only_what_lies_outside_goes_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "gpu17")
    urls = [
        "https://api.openai.com/v1",
        "http://gpu17:8000",
        "http://127.0.0.1:1",
        "http://[::1]:1",
    ]
    assert [proxy_of(url) for url in urls] == ["http://proxy:3128", None, None, None]


def test_three_servers_that_fail_a_third_of_the_time_lose_and_change_nothing() -> None:
    """Each request's ids follow from its seed; every failure is of another kind."""
    kinds: list[Answer] = [
        (0, None, {}),
        (500, NO_LUCK, {}),
        (429, NO_LUCK, {"Retry-After": "0"}),
        (200, b"<html>", {}),
        (503, b"", {}),
        CUT,
    ]

    def frail(number: int) -> Any:
        draws, lock = random.Random(number), threading.Lock()

        def answer(body: dict[str, Any]) -> Answer:
            with lock:
                fails, kind = draws.random() < 1 / 3, draws.choice(kinds)
            done = completion(body, [body["seed"] % 97, STOP], [-0.5, -0.25])
            return kind if fails else (200, done, {})

        return answer

    requests = [request([1, 2, n], n) for n in range(300)]
    with fake_vllm(frail(0)) as a, fake_vllm(frail(1)) as b, fake_vllm(frail(2)) as c:
        done = complete([a.url, b.url, c.url], *requests, retry=Retry(12, 0.01))
        sent = [len(fake.bodies) for fake in (a, b, c)]
    assert [d.ids for d in done] == [[n % 97, STOP] for n in range(300)]
    assert 400 < sum(sent) < 520
    assert min(sent) > 100
