"""The embedded engine: what it samples, stops at, and reports, against plain forward passes."""

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.engines.base import EngineError, Request, Sampling
from pipeline.engines.hf import HfEngine, filtered, generate
from pipeline.engines.rounds import Rounds
from tests.playing import tiny_policy, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_policy(TOKENIZER)
STOP = (TOKENIZER.eos_token_id,)


def request(ids: list[int], seed: int = 1, stop: tuple[int, ...] = STOP, **sampling) -> Request:
    values = {"temperature": 0.8, "max_tokens": 12} | sampling
    return Request(ids, seed, Sampling(**values), stop, ("p", 0, seed))


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(5, 300, size=n).tolist() for n in (3, 40, 17, 90, 1, 64)]


@torch.no_grad()
def test_logprobs_are_those_of_a_plain_forward_pass_at_the_temperature():
    requests = [request(ids, seed) for seed, ids in enumerate(prompts())]
    for asked, said in zip(requests, generate(MODEL, requests, 256), strict=True):
        ids = torch.tensor([[*asked.ids, *said.ids]])
        logits = MODEL(ids).logits[0, len(asked.ids) - 1 : -1].double() / 0.8
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(said.ids)[:, None])[:, 0]
        assert said.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_batch_samples_what_each_request_samples_alone():
    requests = [request(ids, seed) for seed, ids in enumerate(prompts())]
    together = generate(MODEL, requests, 256)
    alone = [generate(MODEL, [one], 256)[0] for one in requests]
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]


def test_one_context_for_several_requests_is_read_once_and_sampled_apart():
    seen = []

    class Counting(type(MODEL)):
        def forward(self, input_ids=None, **kwargs):
            seen.append(tuple(input_ids.shape))
            return super().forward(input_ids=input_ids, **kwargs)

    model = Counting(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    shared, other = prompts()[1], prompts()[3]
    requests = [request(shared, 1), request(other, 2), request(shared, 3), request(shared, 4)]
    said = generate(model, requests, 256)
    assert seen[0] == (2, 90)
    assert [c.ids for c in said] == [generate(MODEL, [one], 256)[0].ids for one in requests]
    assert len({tuple(said[n].ids) for n in (0, 2, 3)}) == 3


def test_stops_at_any_stop_id_and_keeps_it():
    free = generate(MODEL, [request([7, 8, 9], stop=())], 256)[0]
    assert (len(free.ids), free.finish_reason) == (12, "length")
    third = free.ids[3]
    cut = generate(MODEL, [request([7, 8, 9], stop=(third,))], 256)[0]
    assert cut.ids == free.ids[: free.ids.index(third) + 1]
    assert cut.finish_reason == "stop"
    assert cut.logprobs == pytest.approx((free.logprobs or [])[: len(cut.ids)])


def test_the_context_bounds_the_response():
    said = generate(MODEL, [request([5] * 250, stop=())], 256)[0]
    assert (len(said.ids), said.finish_reason) == (6, "length")
    with pytest.raises(EngineError, match="no room"):
        generate(MODEL, [request([5] * 256)], 256)


def test_greedy_takes_the_likeliest_and_reports_no_logprobs():
    said = generate(MODEL, [request([7, 8], stop=(), temperature=0.0)], 256)[0]
    ids = [7, 8]
    for token in said.ids:
        assert token == int(MODEL(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert said.logprobs is None


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [0.4, 0.3, 0, 0]),
        (Sampling(top_p=0.7), [0.4, 0.3, 0, 0]),
        (Sampling(top_p=0.71), [0.4, 0.3, 0.2, 0]),
        (Sampling(min_p=0.5), [0.4, 0.3, 0.2, 0]),
        (Sampling(top_k=3, top_p=0.5), [0.4, 0.3, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_filters_by_hand(sampling, kept):
    order = [2, 0, 3, 1]
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)[np.argsort(order)]
    assert filtered(weights, sampling)[order].tolist() == kept


def test_sampling_follows_the_distribution():
    """4,000 first ids against the model's own probabilities: every count within 5 sigma."""
    requests = [request([7, 8, 9], seed, stop=(), max_tokens=1) for seed in range(4000)]
    counts = np.bincount([c.ids[0] for c in generate(MODEL, requests, 256)], minlength=400)
    probs = (MODEL(torch.tensor([[7, 8, 9]])).logits[0, -1].double() / 0.8).softmax(-1)
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] - 4000 * p) <= 5 * math.sqrt(4000 * p * (1 - p)) + 1


def test_a_stop_text_ends_a_row_with_its_ids_and_leaves_the_others_alone():
    """The text may begin and end within ids; those that spell it stay."""
    tokenizer = tiny_tokenizer()
    spell = tokenizer.decode
    free = generate(MODEL, [request([7, 8, n], n, stop=(), max_tokens=20) for n in range(6)], 256)
    texts = [spell(said.ids) for said in free]
    stops = [text[9:12] for text in texts[:3]] + ["never said"] * 3
    asked = [
        replace(
            request([7, 8, n], n, stop=(), max_tokens=20),
            sampling=Sampling(temperature=0.8, max_tokens=20, stop=("no", stop)),
        )
        for n, stop in enumerate(stops)
    ]
    for n, said in enumerate(generate(MODEL, asked, 256, spell)):
        assert said.ids == free[n].ids[: len(said.ids)]
        assert len(said.logprobs) == len(said.ids)
        if n < 3:
            assert said.finish_reason == "stop"
            assert stops[n] in spell(said.ids) and stops[n] not in spell(said.ids[:-1])
        else:
            assert (said.finish_reason, said.ids) == ("length", free[n].ids)


def test_closing_ends_a_round_under_way():
    asked = [request([7, 8, 9], 0, stop=(), max_tokens=200)]
    steps = iter([False, False, True])
    with pytest.raises(EngineError, match="closed while it generated"):
        generate(MODEL, asked, 256, closing=lambda: next(steps))
    assert next(steps, None) is None


def test_rounds_give_the_same_whatever_the_batch_bounds():
    def complete(max_tokens: int, max_rows: int) -> list[list[int]]:
        async def ask() -> list[list[int]]:
            rounds = Rounds()
            for _ in range(6):
                rounds.enter()
            engine = HfEngine(MODEL, rounds, max_tokens, max_rows)
            asked = [engine.complete(request(ids, n)) for n, ids in enumerate(prompts())]
            return [c.ids for c in await asyncio.gather(*asked)]

        return asyncio.run(ask())

    assert complete(10**6, 64) == complete(110, 64) == complete(10**6, 1)


def test_no_round_starts_before_everyone_waits():
    sizes = []

    async def play() -> None:
        rounds = Rounds()

        def run_batch(batch):
            sizes.append(len(batch))
            return list(batch)

        async def dialogue(turns: int) -> None:
            for turn in range(turns):
                await asyncio.sleep(0.001 * turns)
                await rounds.submit(run_batch, request([5], seed=turn))
            rounds.leave()

        for _ in range(3):
            rounds.enter()
        await asyncio.gather(dialogue(1), dialogue(2), dialogue(4))

    asyncio.run(play())
    assert sizes == [3, 2, 1, 1]


def test_a_failing_batch_reaches_everyone_who_waits():
    async def play() -> list:
        rounds = Rounds()
        for _ in range(2):
            rounds.enter()

        def run_batch(batch):
            raise EngineError("boom")

        asked = [rounds.submit(run_batch, request([5], seed=n)) for n in range(2)]
        return await asyncio.gather(*asked, return_exceptions=True)

    errors = asyncio.run(play())
    assert [str(error) for error in errors] == ["boom", "boom"]


def test_out_of_memory_halves_the_batch_and_never_drops_a_row(monkeypatch):
    calls = []

    def hungry(model, batch, max_context, *_):
        calls.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return generate(MODEL, batch, max_context)

    monkeypatch.setattr("pipeline.engines.hf.generate", hungry)
    engine = HfEngine(MODEL, Rounds(), 10**6, 64)
    requests = [request(ids, n) for n, ids in enumerate(prompts())]
    assert [c.ids for c in engine._complete_all(requests)] == [
        generate(MODEL, [one], 256)[0].ids for one in requests
    ]
    assert calls == [6, 3, 1, 2, 3, 1, 2]
