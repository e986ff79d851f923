"""A tiny policy, its chat, and a table to play at, for tests of engines and rollouts."""

from typing import Any

from pipeline.chat import Chat
from pipeline.engines.base import Completion, Request, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.environments.base import Dialogue, End
from pipeline.environments.guessing_game import GuessingGame, corpus
from pipeline.models import tiny_llama
from pipeline.records import Rollout
from pipeline.rollout import Table, TemplateContext
from pipeline.tiny import make_tokenizer

DATE = "2026-01-31"


def tiny_tokenizer(max_context: int = 256) -> Any:
    """Return a byte-level tokenizer with Llama-3's special tokens and dialogue format."""
    return make_tokenizer(corpus(), 400, max_context)


def tiny_policy(tokenizer: Any, seed: int = 0, max_context: int = 256) -> Any:
    """Return a random Llama of two layers in eval mode."""
    model = tiny_llama(
        tokenizer, seed=seed, hidden_size=32, layers=2, heads=2, max_positions=max_context
    )
    return model.eval()


class Said:
    """An engine that says given texts in order of (prompt, sample, turn), and keeps requests."""

    speaks = "ids"

    def __init__(self, tokenizer: Any, texts: dict[tuple[str, int, int], str] | str) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.max_context = 256
        self.requests: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        text = self.texts if isinstance(self.texts, str) else self.texts[request.key]
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return Completion([*ids, request.stop_ids[0]], None, "stop")

    async def close(self) -> None:
        pass


class Silent:
    """An environment that ends each dialogue after `turns` policy turns."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    async def reply(self, dialogue: Dialogue) -> list | End:
        if len(dialogue.turns) >= self.turns:
            return End("bye")
        return [{"role": "user", "content": "go on"}]


def table(engine: Any, tokenizer: Any, finished: list[Rollout], **changes: Any) -> Table:
    """Return a table for the guessing game."""
    chat = Chat(tokenizer, DATE)
    values: dict[str, Any] = {
        "run_seed": 0,
        "engine": engine,
        "chat": chat,
        "sampling": Sampling(temperature=0.8, max_tokens=8),
        "context": TemplateContext(chat),
        "environment": GuessingGame(),
        "rounds": getattr(engine, "rounds", Rounds()),
        "finished": finished.append,
    }
    return Table(**(values | changes))
