"""The embedded engine: a transformers model in this process, batched in rounds.

Axes: B requests, S ids of the longest context, V vocabulary.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from pipeline.engines.base import Completion, EngineError, EngineOptions, Request, Sampling
from pipeline.engines.rounds import Rounds

_DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


class HfEngine:
    """Completes whatever waits. Each request samples from its own seed, so a neighbour in the batch
    changes nothing but floating-point rounding.
    """

    speaks = "ids"

    def __init__(
        self,
        model: Any,
        rounds: Rounds,
        max_batch_tokens: int,
        max_rows: int,
        tokenizer: Any = None,
    ) -> None:
        """`tokenizer` spells what is said, for requests with stop texts."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._closing = threading.Event()
        self.rounds = rounds
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = max_rows
        self.max_context: int = model.config.get_text_config().max_position_embeddings

    async def complete(self, request: Request) -> Completion:
        """Wait for the round in which every live dialogue waits, and return its completion."""
        return await self.rounds.submit(self._complete_all, request)

    async def close(self) -> None:
        """End a round under way, within one step of decoding, and forget the model."""
        self._closing.set()
        self.model = None

    def _complete_all(self, requests: Sequence[Request]) -> list[Completion]:
        """Run a round in batches of similar lengths; a batch that doesn't fit is halved."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].ids), requests[i].key))
        completions: dict[int, Completion] = {}
        for batch in self._batches([requests[i] for i in order]):
            for completion in self._fitting(batch):
                completions[order[len(completions)]] = completion
        return [completions[i] for i in range(len(requests))]

    def _batches(self, requests: list[Request]) -> list[list[Request]]:
        batches: list[list[Request]] = [[]]
        for request in requests:
            rows = len(batches[-1]) + 1
            # Sorted by length, so the newest is the longest and sets the batch's width.
            width = len(request.ids) + request.sampling.max_tokens
            if batches[-1] and (rows > self.max_rows or rows * width > self.max_batch_tokens):
                batches.append([])
            batches[-1].append(request)
        return batches

    def _fitting(self, batch: list[Request]) -> list[Completion]:
        try:
            return generate(self.model, batch, self.max_context, self._spell, self._closing.is_set)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EngineError(f"out of memory on one request: {error}") from error
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._fitting(batch[:half]) + self._fitting(batch[half:])

    def _spell(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


@torch.inference_mode()
def generate(
    model: Any,
    requests: Sequence[Request],
    max_context: int,
    spell: Callable[[Sequence[int]], str] | None = None,
    closing: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Sample one batch with a key-value cache; rows leave it as they stop.

    Log-probs are the float32 log-softmax of logits / temperature at the sampled id. A row stops at
    one of its stop ids or texts ("stop"; `spell` decodes ids), or at its bound of new ids or of the
    context ("length"). Raises EngineError as soon as `closing` says so.
    """
    rows = [_Row(request, max_context, spell) for request in requests]
    live = list(range(len(rows)))
    cache = DynamicCache(config=model.config)
    # Rollouts that part here have one context: it is read once, then its cache is copied.
    contexts = {tuple(request.ids): None for request in requests}
    order = {context: n for n, context in enumerate(contexts)}
    input_BS, mask_BS = _left_pad(list(contexts), model.device)
    position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    logits_BV = _forward(model, input_BS, mask_BS, position_BS, cache)
    from_B = torch.tensor([order[tuple(request.ids)] for request in requests], device=model.device)
    if len(contexts) < len(rows):
        cache.batch_select_indices(from_B)
    mask_BS, position_BS, logits_BV = mask_BS[from_B], position_BS[from_B], logits_BV[from_B]
    while not closing():
        ids_B = _sample([rows[i] for i in live], logits_BV)
        keep = [n for n, i in enumerate(live) if not rows[i].done]
        if not keep:
            return [row.completion() for row in rows]
        if len(keep) < len(live):
            live = [live[n] for n in keep]
            keep_B = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(keep_B)
            ids_B, mask_BS, position_BS = ids_B[keep_B], mask_BS[keep_B], position_BS[keep_B]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(live), 1)], dim=1)
        position_BS = position_BS[:, -1:] + 1
        logits_BV = _forward(model, ids_B[:, None], mask_BS, position_BS, cache)
    raise EngineError("the engine was closed while it generated")


def _forward(
    model: Any, input_BS: torch.Tensor, mask_BS: torch.Tensor, position_BS: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Return the logits after the last position of each row, [B, V]."""
    return model(
        input_ids=input_BS,
        attention_mask=mask_BS,
        position_ids=position_BS,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _left_pad(contexts: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, contexts))
    ids_BS = torch.zeros(len(contexts), width, dtype=torch.long)
    mask_BS = torch.zeros(len(contexts), width, dtype=torch.long)
    for row, context in enumerate(contexts):
        ids_BS[row, width - len(context) :] = torch.as_tensor(np.asarray(context, dtype=np.int64))
        mask_BS[row, width - len(context) :] = 1
    return ids_BS.to(device), mask_BS.to(device)


class _Row:
    """One request under way: its own uniform draws, its ids so far and why it stopped."""

    __slots__ = (
        "draws", "finish_reason", "ids", "logprobs", "sampling", "spell", "stop_ids", "tail"
    )  # fmt: skip

    def __init__(
        self, request: Request, max_context: int, spell: Callable[[Sequence[int]], str] | None
    ) -> None:
        room = min(request.sampling.max_tokens, max_context - len(request.ids))
        if room < 1:
            raise EngineError(f"{request.key}: no room after {len(request.ids)} ids of context")
        self.draws = np.random.Generator(np.random.Philox(request.seed)).random(room)
        self.sampling = request.sampling
        self.stop_ids = frozenset(request.stop_ids)
        self.spell = spell
        # An id spells at least a byte, unless it is special: a few more for those.
        self.tail = 8 + max((len(text.encode()) for text in request.sampling.stop), default=0)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason = ""

    @property
    def done(self) -> bool:
        return bool(self.finish_reason)

    def take(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids or (self.sampling.stop and self._said_stop()):
            self.finish_reason = "stop"
        elif len(self.ids) == len(self.draws):
            self.finish_reason = "length"

    def _said_stop(self) -> bool:
        assert self.spell is not None, "an engine without a tokenizer can't stop at texts"
        said = self.spell(self.ids[-self.tail :])
        return any(text in said for text in self.sampling.stop)

    def completion(self) -> Completion:
        logprobs = None if self.sampling.renormalises else self.logprobs
        return Completion(self.ids, logprobs, self.finish_reason)


def _sample(rows: Sequence[_Row], logits_BV: torch.Tensor) -> torch.Tensor:
    """Draw one id for each row by inverting its distribution at the row's next uniform number."""
    temperature_B1 = torch.tensor(
        [[row.sampling.temperature or 1.0] for row in rows], device=logits_BV.device
    )
    logps_BV = torch.log_softmax(logits_BV.float() / temperature_B1, dim=-1)
    weights_BV = logps_BV.double().exp()
    for n, row in enumerate(rows):
        if row.sampling.renormalises:
            weights_BV[n] = filtered(weights_BV[n], row.sampling)
    cumulative_BV = weights_BV.cumsum(-1)
    draw_B1 = torch.tensor([[row.draws[len(row.ids)]] for row in rows], device=logits_BV.device)
    total_B1 = cumulative_BV[:, -1:]
    # Below the total and right=True: an id of weight zero is never hit, whatever the rounding.
    target_B1 = torch.minimum(draw_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    ids_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    logps_B = logps_BV.gather(1, ids_B[:, None])[:, 0]
    for row, token, logp in zip(rows, ids_B.tolist(), logps_B.tolist(), strict=True):
        row.take(token, logp)
    return ids_B


def filtered(weights_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Zero the weights that top_k, top_p, min_p or greedy sampling leave out (not renormalised).

    top_p keeps the smallest set of the likeliest ids whose probabilities reach top_p.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(weights_V).index_fill_(0, weights_V.argmax(), 1.0)
    ordered_V, order_V = weights_V.sort(descending=True, stable=True)
    keep_V = ordered_V >= sampling.min_p * ordered_V[0]
    if sampling.top_k:
        keep_V[sampling.top_k :] = False
        ordered_V = ordered_V * keep_V
    before_V = ordered_V.cumsum(0) - ordered_V
    keep_V &= before_V < sampling.top_p * ordered_V.sum()
    return torch.zeros_like(weights_V).scatter_(0, order_V, ordered_V * keep_V)


def open_engine(model: str, tokenizer: Any, options: EngineOptions) -> HfEngine:
    """Load a policy or user model into this process. `device` "auto": a GPU where there is one."""
    from pipeline.models import load_policy

    on_gpu = options.device == "auto" and torch.cuda.is_available()
    device = "cuda" if on_gpu else options.device.replace("auto", "cpu")
    code = options.trust_remote_code
    policy, _ = load_policy(model, dtype=_DTYPES[options.dtype], trust_remote_code=code)
    engine = HfEngine(
        policy.to(device),
        options.rounds,
        options.max_batch_tokens,
        options.max_batch_rows,
        tokenizer,
    )
    engine.max_context = min(engine.max_context, options.max_model_len or engine.max_context)
    return engine
