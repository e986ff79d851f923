"""vLLM over HTTP: servers that the stage starts, or that run already.

The endpoint is `/v1/completions` with the prompt as ids and `return_token_ids`. The one made for
ids (`/inference/v1/generate`) answers 403 unless the server was started with `--enable-scale-out`.
The sampled stop token is among the returned ids (seen with vLLM 0.32.0); only the text loses it.
"""

import asyncio
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import httpx
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from pipeline.engines.base import Completion, EngineOptions, Request, Sampling
from pipeline.engines.vllm_server import VllmServer, start_server
from pipeline.errors import EngineError

__all__ = ["Retry", "VllmEngine", "attach", "open_engine", "start_server"]

# No bytes come before a completion is whole: the bound is for a server that hangs, not a slow one.
READ_TIMEOUT_S = 3600.0
LONGEST_WAIT_S = 60.0
TRANSIENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.RemoteProtocolError,
    httpx.WriteError,
)


class ServerRefused(EngineError):
    """An HTTP error: its status, the server's message, and how long it asks us to wait (s)."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.url} answered {response.status_code}: {_message(response)}")
        self.status = response.status_code
        self.retry_after_s = response.headers.get("Retry-After", "")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a request is sent, and the first wait between (s), which doubles each time."""

    attempts: int = 6
    first_wait_s: float = 0.5

    def policy(self) -> dict[str, Any]:
        """Return tenacity's arguments. A repeated request draws the same ids: its seed is in it."""
        return {
            "retry": retry_if_exception(_is_transient),
            "stop": stop_after_attempt(self.attempts),
            "wait": self._wait,
            "reraise": True,
        }

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, ServerRefused) else ""
        doubled = self.first_wait_s * 2 ** (state.attempt_number - 1)
        # Retry-After may also be a date; then our own wait has to do.
        return min(LONGEST_WAIT_S, float(asked) if asked.isdecimal() else doubled)


@dataclass(frozen=True, slots=True)
class Served:
    """One server: its URL without `/v1`, the name that requests give, its context in ids."""

    url: str
    name: str
    max_context: int


class VllmEngine:
    """Completes over HTTP. A prompt's rollouts go to one server, whose prefix cache knows them."""

    speaks = "ids"

    def __init__(
        self,
        servers: Sequence[Served],
        process: VllmServer | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.servers = list(servers)
        self.max_context = min(server.max_context for server in servers)
        self.process = process
        self._retry = retry or Retry()
        # The stage bounds what is in flight; a smaller pool here would time requests out.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(limits=limits, **_client_options(process))

    async def complete(self, request: Request) -> Completion:
        """Sample one completion. Raises EngineError when the server refuses, fails or is gone."""
        room = min(request.sampling.max_tokens, self.max_context - len(request.ids))
        if room < 1:
            raise EngineError(f"{request.key}: no room after {len(request.ids)} ids of context")
        server = self.servers[zlib.crc32(request.key[0].encode()) % len(self.servers)]
        body = request_body(request, server.name, room)
        try:
            async for attempt in AsyncRetrying(**self._retry.policy()):
                with attempt:
                    return parse(request, await self._post(server.url, body))
        except httpx.TransportError as error:
            await self._explain(server.url, error)
        raise AssertionError("tenacity returns or raises")

    async def close(self) -> None:
        """Drop the connections, and end the server if the stage started it."""
        await self._client.aclose()
        if self.process is not None:
            await asyncio.to_thread(self.process.close)

    async def _explain(self, url: str, error: httpx.TransportError) -> NoReturn:
        """Raise EngineError, with the log's last lines where the server is ours."""
        raise EngineError(await asyncio.to_thread(_outage, url, error, self.process)) from error

    async def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return _json(await self._client.post(f"{url}/v1/completions", json=body))
        except TRANSIENT:
            if self.process is not None:
                self.process.check()
            raise


def request_body(request: Request, name: str, max_tokens: int) -> dict[str, Any]:
    """Return the JSON of one request. Every sampling parameter is in it, so that no default of the
    server's, or of the model's generation_config.json, gets a say.
    """
    sampling = request.sampling
    return {
        "model": name,
        "prompt": [int(i) for i in request.ids],
        "add_special_tokens": False,
        "n": 1,
        "stream": False,
        "echo": False,
        "seed": request.seed,
        "max_tokens": max_tokens,
        "min_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "bad_words": [],
        "stop": [],
        "stop_token_ids": list(request.stop_ids),
        # The request's stop ids are the whole truth; they hold the end-of-sequence id if it stops.
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": None if sampling.renormalises else 0,
        "return_token_ids": True,
    }


def parse(request: Request, answer: dict[str, Any]) -> Completion:
    """Return what was sampled. Raises EngineError for an answer that isn't exact: no ids, other
    prompt ids than we sent, a log-prob that is missing or no number, another reason to stop.
    """
    choice = answer["choices"][0]
    ids, reason = choice.get("token_ids"), choice["finish_reason"]
    if not ids or choice.get("prompt_token_ids") != [int(i) for i in request.ids]:
        raise EngineError(
            f"{request.key}: the server returned no ids, or not the prompt's "
            f"(ids {ids!r}); `return_token_ids` needs vLLM 0.11 or newer"
        )
    if reason not in ("stop", "length"):
        raise EngineError(f"{request.key}: the server stopped for the reason {reason!r}")
    if request.sampling.renormalises:
        return Completion(ids, None, reason)
    logprobs = (choice["logprobs"] or {}).get("token_logprobs") or []
    if len(logprobs) != len(ids) or any(x is None or not math.isfinite(x) for x in logprobs):
        raise EngineError(f"{request.key}: {len(ids)} ids came with log-probs {logprobs}")
    return Completion(ids, logprobs, reason)


def open_engine(model: str, tokenizer: Any, options: EngineOptions) -> VllmEngine:
    """Attach to `options.urls`, or start one server for `model` and own it."""
    del tokenizer  # ids go in and ids come out
    if options.urls:
        return VllmEngine([attach(url, model) for url in options.urls])
    flags: dict[str, str | int] = {
        "dtype": options.dtype,
        "tensor-parallel-size": options.tensor_parallel,
        **({"max-model-len": options.max_model_len} if options.max_model_len else {}),
    }
    args = (*options.extra_args, *(["--trust-remote-code"] if options.trust_remote_code else []))
    process = start_server(model, options.log_dir, flags, args, gpus=options.gpus)
    try:
        return VllmEngine([attach(process.url, process.name, process)], process)
    except BaseException:
        process.close()
        raise


def attach(
    url: str, model: str, process: VllmServer | None = None, retry: Retry | None = None
) -> Served:
    """Return how to address `model` at `url`.

    Raises EngineError where nothing answers, another model is served, or log-probs are not those of
    the distribution sampled from.
    """
    url = url.rstrip("/").removesuffix("/v1")
    with httpx.Client(**_client_options(process)) as client:
        retrying = Retrying(**(retry or Retry()).policy())

        def call(send: Callable[[], httpx.Response]) -> dict[str, Any]:
            return retrying(lambda: _json(send()))

        try:
            served = _served(url, model, call(partial(client.get, f"{url}/v1/models"))["data"])
            for token in (0, 1):
                body = _probe_body(served.name, token)
                _check_probe(url, call(partial(client.post, f"{url}/v1/completions", json=body)))
        except httpx.TransportError as error:
            raise EngineError(_outage(url, error, process)) from error
    return served


def _served(url: str, model: str, models: list[dict[str, Any]]) -> Served:
    """Find `model` by its name, by its path, or by the last part of either."""
    for shorten in (_whole, _base):
        for entry in models:
            if shorten(model) in (shorten(entry["id"]), shorten(entry.get("root") or "")):
                return Served(url, entry["id"], int(entry["max_model_len"]))
    names = ", ".join(entry["id"] for entry in models)
    raise EngineError(
        f"{url} serves {names}, not {model}; start it with `--served-model-name {model}`"
    )


def _whole(name: str) -> str:
    return name.rstrip("/")


def _base(name: str) -> str:
    return _whole(name).rpartition("/")[2]


def _probe_body(name: str, token: int) -> dict[str, Any]:
    """Ask for one id, with a bias that makes `token` certain."""
    probe = Request([0], 0, Sampling(temperature=1.0, max_tokens=1), (), ("probe", 0, 0))
    return request_body(probe, name, 1) | {"logit_bias": {str(token): 100.0}}


def _check_probe(url: str, answer: dict[str, Any]) -> None:
    """Raise unless the log-prob knows of the bias. Raw ones don't: two tokens are never both likely
    under them, so that at least one of the two probes shows a server of the wrong mode.
    """
    logprobs = (answer["choices"][0]["logprobs"] or {}).get("token_logprobs") or [None]
    if logprobs[0] is None or not math.log(0.9) < logprobs[0] < 1e-3:
        raise EngineError(
            f"{url} returns log-probs that are not of the distribution it samples from "
            f"({logprobs[0]} for a certain id); start it with `--logprobs-mode processed_logprobs`"
        )


def _client_options(process: VllmServer | None) -> dict[str, Any]:
    """A server of our own is never behind a proxy. The key's variable is the one vLLM reads."""
    key = os.environ.get("VLLM_API_KEY")
    return {
        "timeout": httpx.Timeout(10.0, read=READ_TIMEOUT_S, pool=None),
        "trust_env": process is None,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
    }


def _json(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise ServerRefused(response)
    data: dict[str, Any] = response.json()
    return data


def _message(response: httpx.Response) -> str:
    """Return vLLM's error text; a proxy in between sends another body, whose start will do."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, ServerRefused):
        return error.status == httpx.codes.TOO_MANY_REQUESTS or error.status >= 500
    return isinstance(error, TRANSIENT)


def _outage(url: str, error: httpx.TransportError, process: VllmServer | None) -> str:
    """Tell which server is lost; of one that is ours, also its exit code and its log's end."""
    outage = f"the server at {url} is lost: {type(error).__name__} {error}".rstrip()
    return outage if process is None else process.story_of_the_end(outage)
