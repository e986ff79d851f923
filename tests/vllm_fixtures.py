"""What the vLLM tests share: a tiny model folder, and a small HTTP server in vLLM's place."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.engines.base import Completion, Request, Sampling
from pipeline.engines.serving import Line, Retry, Served
from pipeline.engines.vllm import VllmEngine
from pipeline.engines.wire import Wire
from pipeline.tiny import make_tokenizer

STOP = 9
"""The stop id of these tests' requests: any id of the vocabulary can be one."""

Answer = tuple[int, Any, dict[str, str]]
"""Status, body (bytes go out as they are, anything else as JSON), headers. Status 0 is a crash; a
Content-Length that is longer than the body cuts it."""


def save_tiny_llama(folder: Path, max_context: int = 256) -> Path:
    """Save a random Llama of two layers. Its head size is 32: vLLM's CPU kernels refuse 16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(["higher lower correct"], 300, max_context)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def request(ids: list[int], number: int = 0, **sampling: Any) -> Request:
    """Return a request that stops at STOP; `number` gives it its seed and its prompt id."""
    return Request(ids, number, Sampling(**sampling), (STOP,), (f"prompt-{number}", 0, 0))


QUICK = Retry(attempts=3, first_pause_s=0.01)


def complete(
    urls: str | list[str],
    *requests: Request,
    max_context: int = 256,
    retry: Retry = QUICK,
    timeout_s: float = 30.0,
    key_env: str = "",
) -> list[Completion]:
    """Send the requests together to servers of vLLM's kind."""

    async def run() -> list[Completion]:
        at = [urls] if isinstance(urls, str) else urls
        line = Line(
            [Served(url, "tiny", max_context) for url in at], Wire(key_env, timeout_s), retry
        )
        engine = VllmEngine(line)
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(run())


NO_LUCK = {"error": {"message": "no luck"}}


def failing(
    times: int, status: int, body: Any = NO_LUCK, headers: dict[str, str] | None = None
) -> Callable[[dict[str, Any]], Answer]:
    """Answer `times` times with a failure, then as a healthy server does."""
    left = [times]

    def answer(asked: dict[str, Any]) -> Answer:
        left[0] -= 1
        return (status, body, headers or {}) if left[0] >= 0 else processed(asked)

    return answer


def models(name: str = "tiny", max_model_len: int = 256) -> dict[str, Any]:
    """Return what `/v1/models` answers."""
    return {"data": [{"id": name, "root": f"/models/{name}", "max_model_len": max_model_len}]}


def completion(
    body: dict[str, Any], ids: list[int], logprobs: list[float] | None
) -> dict[str, Any]:
    """Return what `/v1/completions` answers to `body` with `return_token_ids`."""
    choice = {
        "token_ids": ids,
        "prompt_token_ids": body["prompt"],
        "logprobs": None if logprobs is None else {"token_logprobs": logprobs},
        "finish_reason": "stop" if ids[-1:] == [STOP] else "length",
    }
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
    return {"choices": [choice], "usage": usage}


def processed(body: dict[str, Any]) -> Answer:
    """Answer a probe as a server of processed log-probs does, anything else with [7, STOP]."""
    if body["logit_bias"]:
        return 200, completion(body, [int(next(iter(body["logit_bias"])))], [0.0]), {}
    return 200, completion(body, [7, STOP], [-0.5, -0.25]), {}


class FakeVllm:
    """Answers POSTs through `answer` and GETs from `pages`; keeps the requests that it got."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.answer = answer
        self.pages: dict[str, Answer] = {"/v1/models": (200, models(), {})}
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""


@contextmanager
def fake_vllm(
    answer: Callable[[dict[str, Any]], Answer] = processed, port: int = 0
) -> Iterator[FakeVllm]:
    """Serve for as long as the block runs, on a free port unless one is given."""
    fake = FakeVllm(answer)
    server = _Server(("127.0.0.1", port), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a connection that is kept alive would hold the test up
    request_queue_size = 256  # the default of 5 refuses bursts, which real servers don't


def _handler(fake: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fake.headers.append(dict(self.headers))
            fake.paths.append(self.path)
            self._send(*fake.pages.get(self.path, (404, {"detail": "Not Found"}, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            fake.paths.append(self.path)
            fake.headers.append(dict(self.headers))
            self._send(*fake.answer(body))

        def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            if status == 0:  # a crash: the connection closes without an answer
                self.close_connection = True
                return
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Length": str(len(data)), **headers}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            if int(headers["Content-Length"]) > len(data):
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Keep pytest's output free of access logs."""

    return Handler
