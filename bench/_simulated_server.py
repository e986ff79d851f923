"""A server that speaks vLLM's API and has no model: for benchmarks, and tests of what outlives one.

python bench/_simulated_server.py --port 8000 --model tiny

It answers /health, /v1/models, /v1/completions (ids in, ids out), /v1/chat/completions (text) and
/stats, its exact totals. An answer is a pure function of the context, the seed and the sampling:
its length is log-normal, its ids are drawn from the seed, and it ends with the first stop id unless
it is cut. Latencies are those of `_simulated_batch`. Stop strings need text and are not looked for.
It ends on SIGTERM. Only the standard library and numpy are loaded: it starts in a moment.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import zlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
from _simulated_batch import Job
from _simulated_engine import HELP, Answer, Engine, Settings, answer_to


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, one request at a time, as HTTP clients use a connection."""

    _LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Serve one client."""
        self.engine, self.settings = engine, settings
        self._read = bytearray()
        self._job: Job | None = None
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Abort what nobody waits for any more, as vLLM does."""
        if self._job is not None:
            self.engine.cancel(self._job)

    def data_received(self, data: bytes) -> None:
        """Take in bytes until a request is whole."""
        self._read += data
        head_end = self._read.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(self._read[:head_end])
        length = self._LENGTH.search(head)
        end = head_end + 4 + (int(length[1]) if length else 0)
        if len(self._read) < end:
            return
        body = bytes(self._read[head_end + 4 : end])
        del self._read[:end]
        method, path = head.split(b" ", 2)[:2]
        self._route((method + b" " + path).decode("latin-1"), body)

    def _route(self, what: str, body: bytes) -> None:
        settings = self.settings
        card = {"id": settings.model, "root": settings.model}
        pages: dict[str, Callable[[], dict[str, Any]]] = {
            "GET /health": dict,
            "GET /stats": self.engine.stats,
            "GET /v1/models": lambda: {
                "data": [card | {"max_model_len": settings.max_model_len}],
            },
        }
        posts = {"POST /v1/completions": self._complete, "POST /v1/chat/completions": self._chat}
        if what in pages:
            self._send(200, json.dumps(pages[what]()).encode())
        elif what in posts:
            try:
                posts[what](json.loads(body))
            except (KeyError, TypeError, ValueError) as error:
                self._refuse(400, f"{type(error).__name__}: {error}")
        else:
            self._refuse(404, f"there is no {what}")

    def _complete(self, body: dict[str, Any]) -> None:
        prompt = np.array(body["prompt"], dtype=np.int32)
        if not self._accepts(body, len(prompt)):
            return
        if biased := body.get("logit_bias"):
            certain = np.array([int(max(biased, key=biased.__getitem__))])
            self._tell_ids(body, Answer(certain, [0.0], "length"), 0)
            return
        answer = answer_to(body, prompt, self.settings)
        self._play(prompt, answer, lambda cached: self._tell_ids(body, answer, cached))

    def _chat(self, body: dict[str, Any]) -> None:
        """Words stand in for ids: a context's are hashed, an answer's are named by number."""
        text = json.dumps(body["messages"], ensure_ascii=False)
        prompt = np.array([zlib.crc32(word.encode()) for word in text.split()], dtype=np.int64)
        body.setdefault("max_tokens", body.get("max_completion_tokens") or 1024)
        if not self._accepts(body, len(prompt)):
            return
        answer = answer_to(body | {"stop_token_ids": [0]}, prompt, self.settings)
        self._play(prompt, answer, lambda cached: self._tell_text(prompt, answer, cached))

    def _accepts(self, body: dict[str, Any], prompt_length: int) -> bool:
        """Refuse what vLLM refuses: another model's name, a context that is too long."""
        settings = self.settings
        if body["model"] != settings.model:
            self._refuse(404, f"The model `{body['model']}` does not exist.")
            return False
        if prompt_length + body["max_tokens"] > settings.max_model_len:
            self._refuse(400, f"the maximum context length is {settings.max_model_len}")
            return False
        return True

    def _play(self, prompt: np.ndarray, answer: Answer, tell: Callable[[int], None]) -> None:
        def done(cached: int) -> None:
            self._job = None
            tell(cached)

        job = self.engine.submit(prompt, answer, done)
        # With no latency it is over by now.
        self._job = job if job.state != "finished" else None

    def _tell_ids(self, body: dict[str, Any], answer: Answer, cached: int) -> None:
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": answer.logprobs}
        if body.get("return_token_ids"):
            choice |= {"token_ids": answer.ids.tolist(), "prompt_token_ids": body["prompt"]}
        self._tell(choice, "text_completion", _usage(len(body["prompt"]), answer, cached))

    def _tell_text(self, prompt: np.ndarray, answer: Answer, cached: int) -> None:
        words = [f"w{i}" for i in answer.ids.tolist() if i]
        content = " ".join([self.settings.opening_text, *words]).strip()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": content},
            "finish_reason": answer.finish_reason,
        }
        self._tell(choice, "chat.completion", _usage(len(prompt), answer, cached))

    def _tell(self, choice: dict[str, Any], kind: str, usage: dict[str, Any]) -> None:
        page = {"object": kind, "model": self.settings.model, "choices": [choice], "usage": usage}
        self._send(200, json.dumps(page, separators=(",", ":")).encode())

    def _refuse(self, status: int, message: str) -> None:
        page = {"error": {"message": message, "code": status}}
        self._send(status, json.dumps(page).encode())

    def _send(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n"
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def _usage(prompt_ids: int, answer: Answer, cached: int) -> dict[str, Any]:
    said = len(answer.ids)
    return {
        "prompt_tokens": prompt_ids,
        "completion_tokens": said,
        "total_tokens": prompt_ids + said,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    engine = Engine(settings)
    server = await loop.create_server(
        lambda: Connection(engine, settings), "127.0.0.1", settings.port, backlog=4096
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await over.wait()


def main(arguments: list[str]) -> None:
    """Serve as the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help=HELP[field.name])
    asyncio.run(serve(Settings(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main(sys.argv[1:])
