"""Servers as processes: one that fails, one that must die with its stage, and one real vLLM."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import guard
from pipeline.engines.base import Completion, EngineOptions, Request, Usage
from pipeline.engines.rounds import Rounds
from pipeline.engines.supervision import ServerKeeper
from pipeline.engines.vllm import VllmEngine, open_engine
from pipeline.engines.vllm_server import VllmServer, server_command
from pipeline.errors import EngineError, RequestFailed
from vllm_fixtures import request, save_tiny_llama

# Two processes in one group, as a server and its worker; the first writes both ids into a file.
SERVER = """
import os, subprocess, sys, time
from pathlib import Path
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(f"{os.getpid()} {worker.pid}")
time.sleep(600)
"""


def wait_for(file: Path) -> list[int]:
    """Return the process ids that SERVER wrote."""
    deadline = time.monotonic() + 30
    while not file.exists() or len(file.read_text().split()) < 2:
        assert time.monotonic() < deadline, f"{file} wasn't written"
        time.sleep(0.02)
    return [int(pid) for pid in file.read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    """Return when no process of `pids` runs any more; one that only waits to be reaped is gone."""
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"one of {pids} still runs"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_that_exits_is_an_error_with_its_code_and_last_20_lines(tmp_path: Path) -> None:
    code = "for n in range(30): print('line', n)\nraise SystemExit(3)"
    server = VllmServer([sys.executable, "-c", code], "http://127.0.0.1:9", "x", tmp_path / "log")
    with server, pytest.raises(EngineError) as caught:
        server.wait_until_ready(30)
    first, *lines = str(caught.value).splitlines()
    assert first == f"the vLLM server exited with code 3. The last lines of {tmp_path / 'log'}:"
    assert lines == [f"line {n}" for n in range(10, 30)]


def test_a_server_killed_by_a_signal_is_told_from_one_that_exits(tmp_path: Path) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    server = VllmServer([sys.executable, "-c", code], "http://127.0.0.1:9", "x", tmp_path / "log")
    with server, pytest.raises(EngineError, match="exited with code 137"):
        server.wait_until_ready(30)


def test_a_server_that_never_answers_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path / "pids")]
    with VllmServer(command, "http://127.0.0.1:9", "x", tmp_path / "log") as server:
        pids = wait_for(tmp_path / "pids")
        with pytest.raises(EngineError, match=r"did not answer within 0\.1 s"):
            server.wait_until_ready(0.1)
    wait_until_gone(pids)


def test_closing_ends_the_server_and_its_workers_and_can_be_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path / "pids")]
    server = VllmServer(command, "http://127.0.0.1:9", "x", tmp_path / "log")
    pids = wait_for(tmp_path / "pids")
    assert all(map(_runs, pids))
    server.close()
    server.close()
    wait_until_gone(pids)


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SERVER}"
    code = f"import sys; sys.path[:0] = [{str(Path(guard.__file__).parent)!r}]; import guard\n"
    code += "guard.GRACE_S = 0.2\nguard.run(sys.argv[1:])"
    command = [sys.executable, "-c", stubborn, str(tmp_path / "pids")]
    process = subprocess.Popen([sys.executable, "-c", code, *command], stdin=subprocess.PIPE)
    pids = wait_for(tmp_path / "pids")
    process.communicate()
    wait_until_gone(pids)


def test_killing_the_stage_ends_its_server(tmp_path: Path) -> None:
    stage = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.engines.vllm_server import VllmServer\n"
        "s = VllmServer(sys.argv[2:], 'http://127.0.0.1:9', 'x', Path(sys.argv[1]))\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", SERVER, str(tmp_path / "pids")]
    process = subprocess.Popen([sys.executable, "-c", stage, str(tmp_path / "log"), *command])
    pids = wait_for(tmp_path / "pids")
    process.kill()
    process.wait()
    wait_until_gone(pids)


def test_the_command_pins_what_exactness_needs() -> None:
    command = server_command("m", 8001, "name", {"dtype": "float32"}, ["--enforce-eager"])
    assert command == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "m", "--served-model-name", "name", "--host", "127.0.0.1", "--port", "8001"),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *("--load-format", "safetensors", "--dtype", "float32", "--enable-prompt-tokens-details"),
        *("--disable-uvicorn-access-log", "--no-enable-chunked-prefill", "--enforce-eager"),
    ]


def test_a_teardowns_noise_does_not_hide_the_error(tmp_path: Path) -> None:
    code = "print('(W pid=1) ERROR x RuntimeError: head_dim=24'); print('noise\\n' * 99); exit(0)"
    server = VllmServer([sys.executable, "-c", code], "http://127.0.0.1:9", "x", tmp_path / "log")
    with server, pytest.raises(EngineError) as caught:
        server.wait_until_ready(30)
    assert "exited with code 0. It said:\n  RuntimeError: head_dim=24" in str(caught.value)


EOS = 4  # <|eot_id|> of the tiny tokenizer

# The rest is one real server; the last test kills it twice, and it is started again once.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose folder asks for other sampling parameters than we send."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    asked = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 2.0}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    return folder


def test_a_start_that_nobody_waits_for_any_more_ends_at_once(model: Path, tmp_path: Path) -> None:
    options = EngineOptions(Rounds(), log_dir=tmp_path)

    async def run() -> float:
        opening = asyncio.create_task(asyncio.to_thread(open_engine, str(model), None, options))
        while not list(tmp_path.glob("*.log")):
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
        options.cancelled.set()
        began = time.monotonic()
        with pytest.raises(EngineError, match="called off"):
            await opening
        return time.monotonic() - began

    assert asyncio.run(run()) < 4.0
    assert not [command for command in _commands() if str(model).encode() in command]


def _commands() -> Iterator[bytes]:
    """Yield the command of every process that runs."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            yield file.read_bytes()


@dataclass
class Opened:
    """An engine with its server, and the event loop that it lives in."""

    engine: VllmEngine
    runner: asyncio.Runner
    told: list[str]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Send the requests together."""

        async def run() -> list[Completion]:
            return await asyncio.gather(*map(self.engine.complete, requests))

        return self.runner.run(run())

    def kill(self) -> None:
        """Kill the server, not its guard."""
        assert isinstance(self.engine.line.keeper, ServerKeeper)
        guard_pid = self.engine.line.keeper.running.process._process.pid
        [pid] = Path(f"/proc/{guard_pid}/task/{guard_pid}/children").read_text().split()
        os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def opened(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    told: list[str] = []
    options = EngineOptions(
        Rounds(),
        dtype="float32",
        max_model_len=128,
        log_dir=tmp_path_factory.mktemp("logs"),
        # Compiling takes longer than these tests do.
        extra_args=("--enforce-eager", "--block-size", "32"),
        restarts=1,
        tell=told.append,
    )
    engine = open_engine(str(model), None, options)
    with asyncio.Runner() as runner:
        yield Opened(engine, runner, told)
        runner.run(engine.close())


def prompts(count: int, **sampling: Any) -> list[Request]:
    """Prompts of different lengths, of which some share a prefix; 20 of 280 ids stop.

    The model's own end-of-sequence id is one of them for every second prompt only.
    """
    requests = [request([5, *range(20, 20 + n % 9), 40 + n], n, **sampling) for n in range(count)]
    stop_ids = [tuple(range(EOS + n % 2, EOS + n % 2 + 20)) for n in range(count)]
    return [replace(r, stop_ids=ids) for r, ids in zip(requests, stop_ids, strict=True)]


def test_logprobs_are_those_of_transformers_and_stops_are_kept(opened: Opened, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    requests = prompts(32, temperature=0.8, max_tokens=24)
    completions = opened.complete(requests)
    for sent, done in zip(requests, completions, strict=True):
        ids = torch.tensor([[*sent.ids, *done.ids]])
        with torch.no_grad():
            logits_SV = policy(ids).logits[0, len(sent.ids) - 1 : -1]
        logps_SV = torch.log_softmax(logits_SV.double() / 0.8, dim=-1)
        expected = logps_SV.gather(1, torch.tensor(done.ids)[:, None])[:, 0].tolist()
        assert done.logprobs == pytest.approx(expected, abs=1e-4)
        stops = [n for n, token in enumerate(done.ids) if token in sent.stop_ids]
        if done.finish_reason == "stop":
            assert stops == [len(done.ids) - 1]
        else:
            assert (done.finish_reason, stops, len(done.ids)) == ("length", [], 24)
    assert {done.finish_reason for done in completions} == {"stop", "length"}


def test_a_seed_draws_the_same_ids_in_any_order(opened: Opened) -> None:
    requests = prompts(16, temperature=0.8, max_tokens=8)
    first = opened.complete(requests)
    again = opened.complete(requests[::-1])[::-1]
    assert [done.ids for done in again] == [done.ids for done in first]
    other = opened.complete([replace(request, seed=2**63 - 1) for request in requests])
    assert [done.ids for done in other] != [done.ids for done in first]


def test_greedy_takes_the_likeliest_ids_and_keeps_no_logprobs(opened: Opened, model: Path) -> None:
    """The folder's repetition penalty of 2 would show here."""
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for sent, done in zip(
        requests := prompts(8, temperature=0.0, max_tokens=6),
        opened.complete(requests),
        strict=True,
    ):
        with torch.no_grad():
            logits_SV = policy(torch.tensor([[*sent.ids, *done.ids]])).logits[0]
        assert done.ids == logits_SV[len(sent.ids) - 1 : -1].argmax(-1).tolist()
        assert done.logprobs is None


def test_the_context_asked_for_is_the_bound(opened: Opened) -> None:
    assert opened.engine.max_context == 128
    [done] = opened.complete([replace(request([7] * 120, max_tokens=500), stop_ids=())])
    assert (len(done.ids), done.finish_reason) == (8, "length")


def test_a_refusal_carries_the_servers_message(opened: Opened) -> None:
    with pytest.raises(RequestFailed, match="answered 400: Token id 5000 is out of") as caught:
        opened.complete([request([5000])])
    assert caught.value.reason == "server_refused"


def test_the_usage_tells_what_a_repeated_prefix_had_cached(opened: Opened) -> None:
    """Blocks of 32 ids are cached once they are full."""
    prompt = [*range(100, 150)]
    [first] = opened.complete([request(prompt, max_tokens=4)])
    [again] = opened.complete([request([*prompt, *first.ids, 20], max_tokens=4)])
    assert first.usage == Usage(50, len(first.ids), 0)
    assert again.usage == Usage(51 + len(first.ids), len(again.ids), 32)


def test_a_stop_text_ends_a_turn_and_its_ids_stay(opened: Opened, model: Path) -> None:
    """Stop at the text of two ids that were sampled one after the other: both are returned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    free = [replace(r, stop_ids=()) for r in prompts(16, temperature=0.8, max_tokens=24)]
    whole = opened.complete(free)
    stops = [_two_plain_ids(tokenizer, done.ids) for done in whole]
    assert sum(end > 0 for _, end in stops) >= 8
    asked = [
        replace(r, sampling=replace(r.sampling, stop=("never said", stop)))
        for r, (stop, _) in zip(free, stops, strict=True)
    ]
    for before, done, (_, end) in zip(whole, opened.complete(asked), stops, strict=True):
        if end:
            assert done.ids == before.ids[:end]
            assert len(done.logprobs or []) == end
            assert done.finish_reason == "stop"
            assert done.usage is not None
            assert done.usage.completion_tokens == end


def _two_plain_ids(tokenizer: Any, ids: list[int]) -> tuple[str, int]:
    """Return the text of the first two neighbours that are plain ASCII, and where they end; ids of
    this random model are mostly bytes that are no letters.
    """
    for end in range(4, 23):
        text = tokenizer.decode(ids[end - 2 : end])
        is_new = text not in tokenizer.decode(ids[: end - 1])
        if text.isascii() and text.isprintable() and len(text) > 1 and is_new:
            return text, end
    return "never", 0


def test_a_server_that_dies_at_work_is_started_again_and_draws_the_same_ids(
    opened: Opened,
) -> None:
    requests = [replace(r, stop_ids=()) for r in prompts(64, temperature=0.8, max_tokens=100)]
    before = opened.complete(requests[:8])
    killer = threading.Timer(0.5, opened.kill)
    killer.start()
    after = opened.complete(requests * 4)
    killer.join()
    assert [done.ids for done in after[:8]] == [done.ids for done in before]
    [line] = [line for line in opened.told if "restart" in line]
    assert line.startswith("the vLLM server exited with code 137; restart 1 of at most 1; its")
    opened.kill()
    with pytest.raises(EngineError, match=r"exited with code 137\. (?s:.*)\.log:\n.") as caught:
        opened.complete(requests[:1])
    assert str(caught.value).endswith("Of 1 restarts none is left.")
