"""A started server that exits, hangs or can't start again; the requests that were under way."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import frail_server
from pipeline.engines.serving import Line, Retry, Served
from pipeline.engines.supervision import Running, ServerKeeper, Watch
from pipeline.engines.vllm import VllmEngine
from pipeline.engines.vllm_server import VllmServer
from pipeline.engines.wire import Wire
from pipeline.errors import EngineError
from vllm_fixtures import request

QUICK = Watch(poll_s=0.1, answer_s=0.3, misses=3, pause_s=0.1)


class Started:
    """Starts frail servers, and keeps what it started and what was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[VllmServer] = []
        self.told: list[str] = []
        self.broken = False

    def start(self, cancelled: threading.Event) -> Running:
        """Start another server; one that exits at once when `broken`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        number = len(self.processes)
        command = [sys.executable, frail_server.__file__, str(port), str(self.folder)]
        if self.broken:
            command = [sys.executable, "-c", "raise SystemExit(7)"]
        url, log = f"http://127.0.0.1:{port}", self.folder / f"log-{number}"
        self.processes.append(VllmServer(command, url, f"life-{number}", log))
        try:
            self.processes[-1].wait_until_ready(cancelled=cancelled)
        except BaseException:
            self.processes[-1].close()
            raise
        return Running(self.processes[-1], Served(url, f"life-{number}", 256))


def play(
    folder: Path,
    story: Callable[[VllmEngine, Started], Awaitable[None]],
    restarts: int = 3,
    watch: Watch = QUICK,
    attempts: int = 2,
) -> Started:
    """Play a story with an engine that owns a frail server; all its processes end with it."""
    started = Started(folder)

    async def run() -> None:
        running = started.start(threading.Event())
        keeper = ServerKeeper(running, started.start, restarts, started.told.append, watch)
        retry = Retry(attempts, first_pause_s=0.05)
        engine = VllmEngine(Line([running.served], Wire("", 60.0), retry, keeper))
        try:
            await story(engine, started)
        finally:
            await engine.close()

    asyncio.run(run())
    assert [process.exit_code is None for process in started.processes].count(True) == 0
    return started


async def pid_of(engine: VllmEngine) -> int:
    return (await engine.complete(request([1]))).ids[0]


def test_a_server_that_exits_is_started_again_and_its_requests_are_answered(
    tmp_path: Path,
) -> None:
    """Eight requests are under way; each has two attempts, and waiting for the start costs none."""

    async def story(engine: VllmEngine, started: Started) -> None:
        first = await pid_of(engine)
        (tmp_path / "exit").write_text("1")
        done = await asyncio.gather(*(engine.complete(request([1], n)) for n in range(8)))
        assert {c.ids[0] for c in done} != {first}
        assert await pid_of(engine) != first

    started = play(tmp_path, story)
    assert len(started.processes) == 2
    log = tmp_path / "log-0"
    assert started.told == [
        f"the vLLM server exited with code 3; restart 1 of at most 3; its log: {log}"
    ]


@pytest.mark.parametrize("attempts", [1, 2])
def test_no_attempt_is_spent_on_a_server_that_died(attempts: int, tmp_path: Path) -> None:
    """Three servers die in a row under the same request."""

    async def story(engine: VllmEngine, started: Started) -> None:
        await pid_of(engine)
        (tmp_path / "exit").write_text("3")
        await pid_of(engine)

    assert len(play(tmp_path, story, attempts=attempts).processes) == 4


def test_a_new_server_has_all_attempts_before_it(tmp_path: Path) -> None:
    """The first server dies, and the second fails once: of two attempts, one is left."""

    async def story(engine: VllmEngine, started: Started) -> None:
        await pid_of(engine)
        (tmp_path / "exit").write_text("1")
        (tmp_path / "fail").write_text("1")
        await pid_of(engine)

    assert len(play(tmp_path, story).processes) == 2
    assert (tmp_path / "fail").read_text() == "0"


def test_an_idle_servers_exit_is_noticed_by_the_watch(tmp_path: Path) -> None:
    async def story(engine: VllmEngine, started: Started) -> None:
        await pid_of(engine)
        started.processes[0].close()
        while len(started.processes) < 2:
            await asyncio.sleep(0.05)

    assert "exited with code" in play(tmp_path, story).told[0]


def test_a_server_that_hangs_is_started_again_and_its_requests_are_answered(
    tmp_path: Path,
) -> None:
    async def story(engine: VllmEngine, started: Started) -> None:
        first = await pid_of(engine)
        (tmp_path / "hang").touch()
        assert await pid_of(engine) != first

    started = play(tmp_path, story)
    assert len(started.processes) == 2
    assert started.told[0].startswith("the vLLM server did not answer /health 3 times in a row;")


def test_restarts_are_bounded_and_then_the_story_is_told(tmp_path: Path) -> None:
    async def story(engine: VllmEngine, started: Started) -> None:
        await pid_of(engine)
        started.broken = True
        (tmp_path / "exit").write_text("1")
        requests = (engine.complete(request([1], n)) for n in range(4))
        errors = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(error) for error in errors} == {EngineError}
        [told] = {str(error) for error in errors}
        assert told.startswith("the vLLM server exited with code 7. ")
        assert told.endswith("Of 2 restarts none is left.")
        with pytest.raises(EngineError, match="none is left"):
            await pid_of(engine)

    started = play(tmp_path, story, restarts=2)
    assert len(started.processes) == 3
    assert [line.partition(";")[0] for line in started.told] == [
        "the vLLM server exited with code 3",
        "the vLLM server did not start again",
    ]


def test_without_restarts_the_log_of_the_server_that_died_is_in_the_error(tmp_path: Path) -> None:
    async def story(engine: VllmEngine, started: Started) -> None:
        (tmp_path / "exit").write_text("1")
        with pytest.raises(EngineError, match="exited with code 3") as caught:
            await pid_of(engine)
        assert "It said:\n  RuntimeError: told to exit\n" in str(caught.value)
        assert str(tmp_path / "log-0") in str(caught.value)

    assert play(tmp_path, story, restarts=0).told == []


def test_closing_calls_a_restart_off(tmp_path: Path) -> None:
    """The second start never gets an answer; closing ends it within the time for a server."""
    took: list[float] = []

    async def story(engine: VllmEngine, started: Started) -> None:
        await pid_of(engine)
        (tmp_path / "exit").write_text("1")
        waiting = asyncio.create_task(pid_of(engine))
        while len(started.processes) < 2:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await engine.close()
        took.append(time.monotonic() - began)
        with pytest.raises(EngineError):
            await waiting

    play(tmp_path, story)
    assert took[0] < 4.0


def test_a_stubborn_server_is_closed_within_four_seconds(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = (
        "import signal, time, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "time.sleep(600)"
    )
    server = VllmServer([sys.executable, "-c", code], "http://127.0.0.1:9", "x", tmp_path / "log")
    while not ready.exists():
        time.sleep(0.02)
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 4.0
    assert server.exit_code == 128 + 9


def test_a_start_that_is_called_off_ends_its_server_at_once(tmp_path: Path) -> None:
    started, cancelled = Started(tmp_path), threading.Event()
    cancelled.set()
    began = time.monotonic()
    with pytest.raises(EngineError, match="called off"):
        started.start(cancelled)
    assert time.monotonic() - began < 4.0
    assert started.processes[0].exit_code is not None
