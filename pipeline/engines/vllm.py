"""vLLM over HTTP: servers that the stage starts, or that run already.

The endpoint is `/v1/completions` with the prompt as ids and `return_token_ids`. The one made for
ids (`/inference/v1/generate`) answers 403 unless the server was started with `--enable-scale-out`.
The sampled stop token is among the returned ids, and so are the ids that spell a stop text (seen
with vLLM 0.32.0); only the text loses them.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.engines.base import Completion, EngineOptions, Request, Sampling
from pipeline.engines.serving import OPENING, Line, Retry, Served
from pipeline.engines.vllm_line import find, open_line
from pipeline.engines.wire import Outage, Refusal, Wire, set_up_error, usage_of
from pipeline.errors import EngineError

__all__ = ["VllmEngine", "attach", "open_engine", "parse", "request_body"]


class VllmEngine:
    """Completes over HTTP; `line` knows the servers."""

    speaks = "ids"

    def __init__(self, line: Line) -> None:
        self.line = line
        self.max_context = line.max_context

    async def complete(self, request: Request) -> Completion:
        """Sample one completion. Raises RequestFailed for a request that can't be served, any
        other EngineError where none could be.
        """
        ids = list(request.ids)
        room = room_of(request, self.max_context)

        async def send(served: Served) -> Completion:
            body = request_body(request, ids, served.name, room)
            answer = await self.line.wire.post(f"{served.url}/v1/completions", body)
            return parse(request, ids, answer)

        return await self.line.ask(request, send)

    async def close(self) -> None:
        """Drop the connections, and end the server if the stage started it."""
        await self.line.close()


def room_of(request: Request, max_context: int) -> int:
    """Return how many ids may be sampled. Raises EngineError where there is room for none."""
    room = min(request.sampling.max_tokens, max_context - len(request.ids))
    if room < 1:
        raise EngineError(f"{request.key}: no room after {len(request.ids)} ids of context")
    return room


def request_body(
    request: Request, ids: Sequence[int], name: str, max_tokens: int
) -> dict[str, Any]:
    """Return the JSON of one request. Every sampling parameter is in it, so that no default of the
    server's, or of the model's generation_config.json, gets a say.
    """
    sampling = request.sampling
    return {
        "model": name,
        "prompt": ids,
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
        "stop": list(sampling.stop),
        "stop_token_ids": list(request.stop_ids),
        # The request's stop ids are the whole truth; they hold the end-of-sequence id if it stops.
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": None if sampling.renormalises else 0,
        "return_token_ids": True,
    }


def parse(request: Request, ids: list[int], answer: dict[str, Any]) -> Completion:
    """Return what was sampled after `ids`. Raises EngineError for an answer that isn't exact: no
    ids, other prompt ids than we sent, a log-prob that is missing or no number; Outage for one that
    is no completion.
    """
    choice = _choice(answer)
    sampled, reason = choice.get("token_ids"), choice.get("finish_reason")
    # A server that is being stopped gives back what it has so far.
    if reason == "abort":
        raise Outage("the server gave the request up ('abort')")
    if not sampled or choice.get("prompt_token_ids") != ids:
        raise EngineError(
            f"{request.key}: the server returned no ids, or not the prompt's "
            f"(ids {sampled!r}); `return_token_ids` needs vLLM 0.11 or newer"
        )
    if reason not in ("stop", "length"):
        raise EngineError(f"{request.key}: the server stopped for the reason {reason!r}")
    logprobs = None
    if not request.sampling.renormalises:
        told = (choice.get("logprobs") or {}).get("token_logprobs")
        logprobs = checked_logprobs(request, sampled, told or [])
    return Completion(sampled, logprobs, reason, usage=usage_of(answer))


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the only choice; a proxy's page of JSON has none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Outage(f"the server answered no completion: {str(answer)[:500]}")
    return choices[0]


def checked_logprobs(request: Request, sampled: list[int], logprobs: list[Any]) -> list[float]:
    """Return the log-probs. Raises EngineError unless each id has one, and it is a number."""
    if len(logprobs) != len(sampled) or None in logprobs or not all(map(math.isfinite, logprobs)):
        raise EngineError(f"{request.key}: {len(sampled)} ids came with log-probs {logprobs}")
    return logprobs


def open_engine(model: str, tokenizer: Any, options: EngineOptions) -> VllmEngine:
    """Attach to `options.urls`, or start one server for `model` and own it."""
    del tokenizer  # ids go in and ids come out
    return VllmEngine(open_line(model, options, attach))


async def attach(wire: Wire, url: str, model: str, retry: Retry = OPENING) -> Served:
    """Return how to address `model` at `url`.

    Raises EngineError where nothing answers, another model is served, or log-probs are not those of
    the distribution sampled from.
    """
    try:
        served = await find(wire, url, model, retry)
        for token in (0, 1):
            await retry.opening(partial(_probe, wire, served, token))
    except Refusal as refusal:
        raise set_up_error(refusal, model, wire.key_env) or EngineError(str(refusal)) from None
    return served


async def _probe(wire: Wire, served: Served, token: int) -> None:
    """Ask for one id, with a bias that makes `token` certain; raise EngineError unless its log-prob
    knows of the bias. Raw ones don't: two tokens are never both likely under them, so that at least
    one of two probes shows a server of the wrong mode.
    """
    probe = Request([0], 0, Sampling(temperature=1.0, max_tokens=1), (), ("probe", 0, 0))
    body = request_body(probe, [0], served.name, 1) | {"logit_bias": {str(token): 100.0}}
    choice = _choice(await wire.post(f"{served.url}/v1/completions", body))
    told = (choice.get("logprobs") or {}).get("token_logprobs") or [None]
    if not is_certain(told[0]):
        raise EngineError(
            f"{served.url} returns log-probs that are not of the distribution it samples from "
            f"({told[0]} for a certain id); start it with `--logprobs-mode processed_logprobs`"
        )


def is_certain(logprob: float | None) -> bool:
    """Whether a log-prob says that no other id was possible."""
    return logprob is not None and math.log(0.9) < logprob < 1e-3
