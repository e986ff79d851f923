"""Render a chat template at one date, with a model's own variables."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from pipeline.dialogues import TEMPLATE_ERROR
from pipeline.errors import DataError, RowError

NOT_UNICODE = "not_unicode"
OURS = (
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message"),
    *("strftime_now", "chat_template", "tokenize", "tokenizer_kwargs", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
)
"""What no variable of a template may be called: we or `apply_chat_template` set it."""


class Renderer:
    """The chat template of a tokenizer. Raises DataError for a variable whose name is taken.

    `date`: ISO day that templates see as today; `variables`: what else they see.
    """

    def __init__(self, tokenizer: Any, date: str, variables: Mapping[str, Any]) -> None:
        if taken := sorted(set(variables) & set(OURS)):
            raise DataError(
                f"a template's variable can't be named {', '.join(taken)}: Turnwise sets it itself"
            )
        self._tokenizer = tokenizer
        self._now = datetime.fromisoformat(date).strftime
        self._variables = dict(variables)

    def __call__(
        self, messages: list[dict[str, Any]], tools: list | None, generation_prompt: bool = True
    ) -> str:
        """Return the page of cleaned messages.

        Raises RowError where the template refuses them, and for half a character (a lone
        surrogate, which JSON can spell), which no tokenizer takes.
        """
        try:
            page = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=self._now,
                **self._variables,
            )
        # Templates also fail as Python does: None + "text", a list taken for a string.
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RowError(TEMPLATE_ERROR, str(error)) from None
        try:
            page.encode()
        except UnicodeEncodeError as error:
            raise RowError(NOT_UNICODE, str(error)) from None
        return page
