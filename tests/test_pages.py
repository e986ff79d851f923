"""Where turns stand on a page: found once for a shape, and anew where a template looks."""

import json
from typing import Any

import pytest

from page_oracle import encoded_slowly
from pipeline.chat import Chat
from pipeline.errors import RowError
from pipeline.pages import Page
from templates import CHATML, make_tokenizer

DATE = "2024-12-24"
SAID = "{{- '<|im_start|>' + message.role + '\\n' }}"
END = "{{- '<|im_end|>\\n' }}{%- endfor %}"
PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
LOOP = "{%- for message in messages %}" + SAID
SHORT = (
    LOOP
    + "{%- if message.content | length < 9 %}{{- '(short) ' }}{%- endif %}{{- message.content }}"
    + END
    + PROMPT
)
QUIET = (
    "{%- set quiet = '/quiet' in messages[0].content %}"
    + LOOP
    + "{{- message.content }}"
    + END
    + PROMPT.replace("assistant\\n' }}", "assistant\\n' }}{%- if quiet %}{{- '-' }}{%- endif %}")
)
TWICE = LOOP + "{{- message.content + message.content }}" + END + PROMPT
AS_JSON = LOOP + "{{- message.content | tojson }}" + END + PROMPT
LAST_FIRST = "{%- for message in messages[::-1] %}" + SAID + "{{- message.content }}" + END + PROMPT


def chat_of(template: str) -> Chat:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    return Chat(tokenizer, DATE)


def dialogue(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def turns(chat: Chat, said: list[dict[str, Any]]) -> list[str] | str:
    """Return the text of each turn that is found, or the reason why they aren't."""
    (found,) = chat.encode_dialogues([(said, None)])
    assert encoded_slowly(chat, said, None) == (
        found.reason if isinstance(found, RowError) else found
    )
    if isinstance(found, RowError):
        return found.reason
    ids, spans = found
    return [chat.tokenizer.decode(ids[start:end]) for start, end in spans]


class Counted:
    """A renderer that counts its pages."""

    def __init__(self, render: Any) -> None:
        self.render, self.count = render, 0

    def __call__(self, *arguments: Any, **options: Any) -> str:
        self.count += 1
        return self.render(*arguments, **options)


def renders(chat: Chat, *dialogues: list[dict[str, Any]], tools: str | None = None) -> list[int]:
    """Count the pages that are rendered for each dialogue in turn."""
    counted = Counted(chat._render)
    chat._pages._render = counted
    counts = []
    for said in dialogues:
        before = counted.count
        chat.encode_dialogues([(said, tools)])
        counts.append(counted.count - before)
    return counts


def test_a_shape_is_outlined_once_then_a_dialogue_costs_one_page() -> None:
    chat = Chat(make_tokenizer("llama3"), DATE)
    first, second = dialogue("Hi.", "Hello.", "?", "Bye."), dialogue("A", "B", "C", "D\ue000")
    # Its own page; then the page of markers and a prompt for each turn.
    assert renders(chat, first, second, first) == [1 + 1 + 2, 1, 1]
    assert renders(chat, dialogue("Hi.", "Hello.")) == [3]
    tools = json.dumps([{"name": "guess", "note": "\ue000"}])
    assert renders(chat, first, second, tools=tools) == [4, 1]


@pytest.mark.parametrize("content", ["", " Hello.", "Hello.\n", "\u2028Hello."])
def test_what_a_template_could_see_is_looked_up_anew(content: str) -> None:
    chat = Chat(make_tokenizer("llama3"), DATE)
    plain = dialogue("Hi.", "Hello.")
    # Its own page, a prompt and a page with a marker; no outline is asked for.
    assert renders(chat, plain, dialogue("Hi.", content), plain) == [3, 3, 1]
    more = [plain[0], {**plain[1], "reasoning_content": "Hm."}]
    assert renders(chat, more, plain) == [3, 1]


def test_a_needle_is_looked_up_anew() -> None:
    chat = Chat(make_tokenizer("qwen3"), DATE)
    plain, thinks = dialogue("Hi.", "Hello."), dialogue("Hi.", "<think>\nHm.\n</think>\n\nYes.")
    assert renders(chat, plain, plain, thinks) == [3, 1, 3]


def test_a_template_that_looks_at_contents() -> None:
    chat = chat_of(SHORT)
    assert chat._pages._needles is None
    long, short = "This is a long answer.", "Short."
    assert turns(chat, dialogue("Hi.", long, "?", short, "Is it so?", long)) == [
        f"{long}<|im_end|>",
        f"(short) {short}<|im_end|>",
        f"{long}<|im_end|>",
    ]
    cuts = chat_of(LOOP + "{{- message.content[:9] }}" + END + PROMPT)
    assert turns(cuts, dialogue("Hi.", short)) == ["Short.<|im_end|>"]
    assert turns(cuts, dialogue("Hi.", long)) == "span_unproven"


def test_a_generation_prompt_that_depends_on_contents() -> None:
    chat = chat_of(QUIET)
    assert turns(chat, dialogue("Hi.", "Hello.")) == ["Hello.<|im_end|>"]
    assert turns(chat, dialogue("Hi. /quiet", "Hello.")) == "span_unproven"
    assert turns(chat, dialogue("Hi. /quiet", "-Hello.")) == "span_unproven"
    assert turns(chat, dialogue("Hi.", "Hello.")) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(
    ("test", "blank"),
    [("not messages[-1].content | trim", "\n"), ("messages[-1].content.lstrip() == 'Hm'", " Hm")],
)
def test_a_generation_prompt_that_depends_on_blanks(test: str, blank: str) -> None:
    """No page without a generation prompt shows it; so contents with blanks are looked up anew."""
    prompt = f"assistant\\n' }}}}{{%- if {test} %}}{{{{- '-' }}}}{{%- endif %}}"
    chat = chat_of(
        LOOP + "{{- message.content }}" + END + PROMPT.replace("assistant\\n' }}", prompt)
    )
    assert chat._pages._needles is not None
    assert turns(chat, dialogue("Hi.", "Hello.")) == ["Hello.<|im_end|>"]
    assert turns(chat, dialogue(blank, "Hello.")) == "span_unproven"


@pytest.mark.parametrize("template", [TWICE, LAST_FIRST])
def test_a_page_that_does_not_show_its_turns_is_unproven(template: str) -> None:
    chat = chat_of(template)
    assert chat._pages._needles == ()
    for _ in range(2):
        assert turns(chat, dialogue("Hi.", "Hello.", "Why?", "So.")) == "span_unproven"


def test_contents_that_are_written_as_json_have_no_outline() -> None:
    chat = chat_of(AS_JSON)
    assert chat._pages._needles == ()
    assert chat._pages._outline(("user", "assistant"), None) is None
    assert turns(chat, dialogue("Hi.", "Hello.")) == ['"Hello.']
    assert turns(chat, dialogue("Hi.", 'Say "Hello."')) == "span_unproven"


@pytest.mark.parametrize("private", ["\ue000", "\\ue000", '\\ue000\\"'])
def test_a_template_that_writes_private_characters(private: str) -> None:
    chat = chat_of(CHATML.replace("<|im_start|>", f"<|im_start|>{private}"))
    for said in (dialogue("Hi.", "Hello."), dialogue("\ue000", "\ue001"), dialogue("Hi.", "So.")):
        assert turns(chat, said) == [said[1]["content"] + "<|im_end|>"]


def test_half_a_character_is_the_error_of_its_row_alone() -> None:
    chat = Chat(make_tokenizer("llama3"), DATE)
    good, bad = dialogue("Hi.", "Hello."), dialogue("Hi.", "Hello \ud83d.")
    tools = '[{"name": "\\ud83d"}]'
    assert chat.encode_dialogues([(good, None)]) == chat.encode_dialogues([(good, tools)])
    found = chat.encode_dialogues([(good, None), (bad, None), (good, None)])
    assert [f.reason for f in found if isinstance(f, RowError)] == ["not_unicode"]
    assert found[0] == found[2] == encoded_slowly(chat, good, None)
    with pytest.raises(RowError, match="surrogates not allowed"):
        chat.prompt(bad[1:])


def test_a_page_of_no_turns() -> None:
    chat = Chat(make_tokenizer("llama3"), DATE)
    said = dialogue("Hi.")
    page = chat._page(said, None)
    assert isinstance(page, Page)
    assert page.turns == []
    assert turns(chat, said) == []
    assert chat.encode_dialogues([]) == []
