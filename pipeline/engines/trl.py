"""Servers that TRL's `trl vllm-serve` started, as they are.

From TRL 1.11 on that command runs vLLM's own server, and the vllm engine's way works. TRL 0.29.1 to
1.10 serve `/generate/` instead: ids in, ids and the log-probs of the tempered distribution out.
Such a server answers one request at a time, and tells neither its model nor its longest context.
Older ones take text only, so that nobody knows which ids the model saw; they are refused.
https://github.com/huggingface/trl/blob/v1.0.0/trl/scripts/vllm_serve.py
"""

import asyncio
from functools import partial
from typing import Any

from pipeline.engines.base import Completion, Engine, EngineOptions, Request, Sampling, Usage
from pipeline.engines.serving import OPENING, Line, Retry, Served, retry_of
from pipeline.engines.vllm import VllmEngine, attach, checked_logprobs, is_certain, room_of
from pipeline.engines.vllm_line import KEY_ENV, attach_all
from pipeline.engines.wire import Outage, Refusal, Wire, checked_url, opening, set_up_error
from pipeline.errors import DataError, EngineError

# The server's handler blocks its event loop until a request is done; the second one waits at its
# door, so that it is never idle. More would only run into their time limits there. (A request may
# hold many prompts, but they would share one seed, and siblings would draw the same ids.)
AT_ONCE = 2


class TrlEngine:
    """Completes through `/generate/`. `reads` turns ids into text: the server doesn't say why it
    stopped, and a stop text at the very last id that there was room for shows in no other way.
    """

    speaks = "ids"

    def __init__(self, line: Line, reads: Any, tempered: bool) -> None:
        self.line = line
        self.max_context = line.max_context
        self._reads = reads
        self._tempered = tempered
        self._turns = {served.url: asyncio.Semaphore(AT_ONCE) for served in line.servers}

    async def complete(self, request: Request) -> Completion:
        """Sample one completion. Raises RequestFailed for a request that can't be served, any
        other EngineError where none could be.
        """
        ids = list(request.ids)
        room = room_of(request, self.max_context)

        async def send(served: Served) -> Completion:
            async with self._turns[served.url]:
                answer = await self.line.wire.post(
                    f"{served.url}/generate/", request_body(request, ids, room)
                )
            return self._parse(request, ids, room, answer)

        return await self.line.ask(request, send)

    async def close(self) -> None:
        """Drop the connections."""
        await self.line.close()

    def _parse(
        self, request: Request, ids: list[int], room: int, answer: dict[str, Any]
    ) -> Completion:
        sampled = parse_ids(request, ids, answer)
        logprobs = None
        if self._tempered and not request.sampling.renormalises:
            logprobs = checked_logprobs(request, sampled, _first(answer))
        reason = "stop" if self._has_stopped(request, sampled, room) else "length"
        return Completion(sampled, logprobs, reason, usage=Usage(len(ids), len(sampled)))

    def _has_stopped(self, request: Request, sampled: list[int], room: int) -> bool:
        if len(sampled) < room or sampled[-1] in request.stop_ids:
            return True
        stops = request.sampling.stop
        return bool(stops) and any(stop in self._reads.decode(sampled) for stop in stops)


def request_body(request: Request, ids: list[int], max_tokens: int) -> dict[str, Any]:
    """Return the JSON of one request; `generation_kwargs` reach vLLM's SamplingParams as they are.

    Log-probs are always asked for: TRL 0.29.1 can't answer without them.
    """
    sampling = request.sampling
    return {
        "prompts": [ids],
        "n": 1,
        "repetition_penalty": 1.0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # -1 is "off" for every release of vLLM, 0 for the newer ones only.
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "max_tokens": max_tokens,
        "logprobs": 0,
        "generation_kwargs": {
            "seed": request.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list(request.stop_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        },
    }


def parse_ids(request: Request, ids: list[int], answer: dict[str, Any]) -> list[int]:
    """Return the sampled ids. Raises EngineError when they follow another prompt than `ids`."""
    if "completion_ids" not in answer:
        raise Outage(f"the server answered no completion: {str(answer)[:500]}")
    sampled = answer["completion_ids"]
    if answer.get("prompt_ids") != [ids] or len(sampled) != 1 or not sampled[0]:
        raise EngineError(f"{request.key}: the TRL server returned no ids, or not the prompt's")
    told = answer.get("logprob_token_ids")
    if told is not None and told != [[[i] for i in sampled[0]]]:
        raise EngineError(f"{request.key}: the TRL server's log-probs are of other ids")
    return list(sampled[0])


def _first(answer: dict[str, Any]) -> list[Any]:
    """Return the log-prob at each position; the server gives a list of one for each."""
    logprobs = answer.get("logprobs") or [[]]
    return [position[0] if position else None for position in logprobs[0]]


def open_engine(model: str, tokenizer: Any, options: EngineOptions) -> Engine:
    """Attach to the servers at `options.urls`, in the way in which they serve."""
    if not options.urls:
        raise DataError(
            "engine trl attaches to servers that run: give their URLs (--policy_url, --user_url)"
        )
    urls = [checked_url(url).removesuffix("/v1") for url in options.urls]
    wire = Wire(options.api_key_env or KEY_ENV, options.timeout_s)
    if opening(lambda: _are_vllm(urls, model, options), options.cancelled):
        served = attach_all(urls, model, options, attach)
        return VllmEngine(Line(served, wire, retry_of(options), tell=options.tell))
    tempered = opening(lambda: _probe_all(urls, options), options.cancelled)
    if not options.max_model_len:
        raise DataError(
            f"{urls[0]} doesn't tell its longest context: give --max_model_len (for a user model "
            "--user_max_model_len), and no more than it was started with, or a long prompt ends it"
        )
    options.tell(
        f"{', '.join(urls)}: TRL before 1.11 answers one request at a time and doesn't name its "
        "model" + ("" if tempered else "; its log-probs are of raw logits, and are not kept")
    )
    served = [Served(url, model, options.max_model_len) for url in urls]
    line = Line(served, wire, retry_of(options), tell=options.tell)
    return TrlEngine(line, tokenizer, tempered)


async def _are_vllm(
    urls: list[str], model: str, options: EngineOptions, retry: Retry = OPENING
) -> bool:
    """Whether the servers are vLLM's own. Raises EngineError when some are and others aren't."""
    kinds = {}
    async with Wire(options.api_key_env or KEY_ENV, options.timeout_s) as wire:
        for url in urls:
            try:
                await retry.opening(partial(wire.get, f"{url}/v1/models"))
                kinds[url] = True
            except Refusal as refusal:
                wrong = set_up_error(refusal, model, wire.key_env)
                if wrong is not None and refusal.status != 404:
                    raise wrong from None
                kinds[url] = False
    if len(set(kinds.values())) > 1:
        old = ", ".join(url for url, is_vllm in kinds.items() if not is_vllm)
        raise EngineError(f"{old} are of TRL before 1.11, the others newer; attach to one kind")
    return all(kinds.values())


async def _probe_all(urls: list[str], options: EngineOptions, retry: Retry = OPENING) -> bool:
    """Whether every server's log-probs are of the distribution that it samples from.

    Raises EngineError where a server takes no ids.
    """
    tempered = True
    async with Wire(options.api_key_env or KEY_ENV, options.timeout_s) as wire:
        for url in urls:
            for token in (0, 1):
                try:
                    tempered &= await retry.opening(partial(_probe, wire, url, token))
                except Refusal as refusal:
                    raise _no_ids(refusal) from None
    return tempered


def _no_ids(refusal: Refusal) -> EngineError:
    """Say why a server can't be used. FastAPI answers 422 to a field of another type."""
    if refusal.status != 422:
        return EngineError(f"{refusal}; neither vLLM nor TRL serves there")
    return EngineError(
        f"{refusal}. TRL before 0.29.1 takes text only, so that the ids would be a guess; start "
        "a server of TRL 1.11 or newer, or `vllm serve`"
    )


async def _probe(wire: Wire, url: str, token: int) -> bool:
    """Allow one id only: its log-prob is 0, unless log-probs are of the raw logits.

    Not a bias: JSON's keys are texts, and a text as an id ends the server's worker.
    """
    probe = Request([0], 0, Sampling(temperature=1.0, max_tokens=1), (), ("probe", 0, 0))
    body = request_body(probe, [0], 1)
    body["generation_kwargs"]["allowed_token_ids"] = [token]
    answer = await wire.post(f"{url}/generate/", body)
    if parse_ids(probe, [0], answer) != [token]:
        raise EngineError(f"{url} sampled an id that it wasn't allowed to")
    return is_certain(_first(answer)[0])
