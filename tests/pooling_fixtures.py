"""A small HTTP server in the place of vLLM's pooling servers, and dialogues for it to score."""

import base64
import math
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline.engines.base import EngineOptions
from pipeline.engines.rounds import Rounds
from pipeline.engines.serving import Line, Retry, Served
from pipeline.engines.wire import Wire
from pipeline.records import Message, Rollout, Turn
from pipeline.rewards import Settings, load_served
from pipeline.rewards.checkpoints import load_tokenizer, make_encoder
from pipeline.rewards.served import Check, ServedReward
from vllm_fixtures import QUICK, Answer, FakeVllm, fake_vllm, models

NAME = "classifier"
"""What the fake server calls its model: the last part of its folder's path."""
CONTEXT = 4096


def dialogue(turns: int, mark: str, sample: int = 0) -> Rollout:
    """Return a played dialogue of so many policy turns, the last of which is the score turn."""
    messages = []
    for i in range(turns):
        messages += [
            Message(role="user", content=f"{mark} question {i}?"),
            Message(role="assistant", content=f"answer {i} {mark} {sample}" + " and so" * (i + 1)),
        ]
    played = [Turn(0, [1], [2], None, "stop") for _ in range(turns)]
    return Rollout(mark, sample, messages, played, 0, turns - 1, "complete", "score_turn")


def own_ids(folder: Path, rollout: Rollout, turn: int) -> list[int]:
    """Return the ids of a prefix, by the template alone."""
    page = rollout.messages[: 2 * turn + 2]
    return list(AutoTokenizer.from_pretrained(folder).apply_chat_template(page, return_dict=False))


def value_of(ids: Sequence[int]) -> float:
    """Return the fake model's score of some ids, as float32: every id and its place counts."""
    total = sum((place + 1) * id_ for place, id_ in enumerate(ids))
    return float(struct.unpack("<f", struct.pack("<f", total % 9973 / 300 - 16))[0])


def packed(*values: float) -> str:
    """Return what vLLM makes of a score: the bits of float32, base64."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def pooled(body: dict[str, Any]) -> Answer:
    """Answer as a healthy server does."""
    scores = [value_of(ids) for ids in body["input"]]
    if body["use_activation"]:
        scores = [1 / (1 + math.exp(-score)) for score in scores]
    return 200, answer_of([packed(score) for score in scores]), {}


def answer_of(data: Sequence[Any]) -> dict[str, Any]:
    items = [{"index": n, "object": "pooling", "data": item} for n, item in enumerate(data)]
    return {"id": "pooling-1", "object": "list", "model": NAME, "data": items}


@contextmanager
def fake_pooling(
    answer: Callable[[dict[str, Any]], Answer] = pooled,
    name: str = NAME,
    context: int = CONTEXT,
    port: int = 0,
) -> Iterator[FakeVllm]:
    """Serve for as long as the block runs."""
    with fake_vllm(answer, port) as fake:
        fake.pages["/v1/models"] = (200, models(name, context), {})
        yield fake


@contextmanager
def opened(
    folder: Path, *urls: str, settings: Settings | None = None, **options: Any
) -> Iterator[ServedReward]:
    """Attach as the stage does, with its probes."""
    asked = EngineOptions(Rounds(), urls=urls, **options)
    reward = load_served(str(folder), settings or Settings(), asked)
    try:
        yield reward
    finally:
        reward.close()


@contextmanager
def unprobed(
    folder: Path,
    *urls: str,
    retry: Retry = QUICK,
    max_length: int = CONTEXT,
    key_env: str = "",
    timeout_s: float = 30.0,
) -> Iterator[ServedReward]:
    """Attach without any probe, so that a fake server may fail from its first request on."""
    served = [Served(url, NAME, CONTEXT) for url in urls]
    line = Line(served, Wire(key_env, timeout_s), retry, tell=lambda line: None)
    encoder = make_encoder(load_tokenizer(folder), Settings())
    check = Check(encoder, max_length, 2e-2, activates=True)
    reward = ServedReward("model", "fingerprint", encoder, check, line)
    try:
        yield reward
    finally:
        reward.close()


class Counter:
    """Counts the requests that a server answers at the same time, each of which takes a while."""

    def __init__(self, wanted: int) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self._enough = threading.Event()
        self._wanted = wanted

    def __call__(self, body: dict[str, Any]) -> Answer:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self._now >= self._wanted:
                self._enough.set()
        self._enough.wait(5.0)
        with self._lock:
            self._now -= 1
        return pooled(body)
