"""An engine that speaks from a script: tests, and the demo's warm start.

A script is `function(messages, draw) -> text`; the engine tokenizes the text and ends it with the
template's end-of-turn token, as a model would.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.engines.base import Completion, EngineOptions, Request
from pipeline.errors import DataError
from pipeline.records import Message

Script = Callable[[Sequence[Message], np.random.Generator], str]

SCRIPTS = {"guessing_game": "pipeline.environments.guessing_game:random_player"}


class ScriptedEngine:
    """Answers with the script's text; `logprobs` are None because nothing was sampled."""

    speaks = "ids"

    def __init__(self, script: Script, tokenizer: Any, max_context: int) -> None:
        self.script = script
        self.tokenizer = tokenizer
        self.max_context = max_context

    async def complete(self, request: Request) -> Completion:
        """Return the script's next text as ids, cut at the room that there is."""
        draw = np.random.Generator(np.random.Philox(request.seed))
        text = _cut(self.script(request.messages, draw), request.sampling.stop)
        # split_special_tokens: a script that says "<|eot_id|>" must not end its own turn.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = [*ids, request.stop_ids[0]]
        room = min(request.sampling.max_tokens, self.max_context - len(request.ids))
        return Completion(ids[:room], None, "stop" if len(ids) <= room else "length")

    async def close(self) -> None:
        """Hold nothing."""


def _cut(text: str, stops: Sequence[str]) -> str:
    """Cut a text after the first stop text in it."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def load_script(name: str) -> Script:
    """Return a script by its name here or as `module:function`."""
    module, _, function = SCRIPTS.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"--script {name}: {error}; known: {', '.join(SCRIPTS)}") from error


def open_engine(model: str, tokenizer: Any, options: EngineOptions) -> ScriptedEngine:
    """Speak `options.script` with the tokenizer of `model`; no weights are loaded."""
    return ScriptedEngine(
        load_script(options.script), tokenizer, options.max_model_len or tokenizer.model_max_length
    )
