"""Models that think: what is recorded of a thought, what stays of it in history, who reads it."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.chat import Chat
from pipeline.environments.base import Dialogue
from pipeline.environments.guessing_game import GuessingGame
from pipeline.errors import DataError
from pipeline.records import Message, Rollout
from pipeline.rewards.base import EMPTY_RESPONSE, blank
from pipeline.rewards.encoding import Encoder
from pipeline.thoughts import heard, parted, spoken
from templates import FORMATS, make_tokenizer

DATE = "2026-01-31"
QUESTIONS = [Message(role="user", content=f"Question {i}?") for i in range(4)]


def chat_of(name: str, **variables: Any) -> Chat:
    return Chat(make_tokenizer(name), DATE, template_kwargs=variables)


def text_of(chat: Chat, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(list(ids), skip_special_tokens=False)


def in_pieces(chat: Chat, text: str) -> list[int]:
    """Return ids that a model may sample and encoding would not give: one for each character,
    but for the tags of a thought.
    """
    parts = [p for part in re.split("(</?think>)", text) for p in ([part] if "<" in part else part)]
    return [i for part in parts for i in chat.tokenizer(part, add_special_tokens=False).input_ids]


def page(chat: Chat, messages: Sequence[Message], **variables: Any) -> str:
    """Render without chat.py, as a reference."""
    return chat.tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, **variables
    )


def play(
    chat: Chat, said: Sequence[tuple[str, bool]]
) -> tuple[list[Message], list[tuple[int, list[int], list[int]]]]:
    """Play texts (and whether the stop token was sampled) as rollouts do.

    Returns the messages and (keep, prompt_ids, response_ids) of each turn; the last one says
    nothing.
    """
    messages, context = [QUESTIONS[0]], list[int]()
    turns: list[tuple[int, list[int], list[int]]] = []
    for t, (text, stopped) in enumerate(said):
        keep, prompt = chat.next(context, messages) if turns else (0, chat.prompt(messages))
        response = in_pieces(chat, text) + [chat.stop_ids[0]] * stopped
        turns.append((keep, prompt, response))
        context = context[:keep] + prompt + response
        messages += [chat.message(response, prompt), QUESTIONS[t + 1]]
    keep, prompt = chat.next(context, messages)
    return messages, [*turns, (keep, prompt, [])]


def contexts(turns: Sequence[tuple[int, list[int], list[int]]]) -> list[list[int]]:
    """Return what the policy saw at each turn."""
    context, seen = list[int](), []
    for keep, prompt, response in turns:
        seen.append(context[:keep] + prompt)
        context = seen[-1] + response
    return seen


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nIs it 16?\n</think>\n\nSixteen.\n", "Is it 16?", "Sixteen.\n"),
        ("Is it 16?\n</think>\n\nSixteen.", "Is it 16?", "Sixteen."),
        ("<think></think>Sixteen.", "", "Sixteen."),
        ("<think>\nIs it", "Is it", ""),
        ("Well. <think>Is it", "Is it", "Well. "),
        ("<think>a</think>b<think>c</think>\n\nd", "a</think>b<think>c", "d"),
        ("<think>a</think>", "a", ""),
        (" Sixteen. \n", None, " Sixteen. \n"),
        ("", None, ""),
    ],
)
def test_a_thought_is_told_from_the_answer(text: str, thought: str | None, answer: str) -> None:
    assert parted(text) == (thought, answer)
    assert spoken(Message(role="assistant", content=text)) == answer


def test_what_others_read_is_the_content_without_thoughts() -> None:
    assert spoken(Message(role="assistant", content="Hi.", reasoning_content="Hm.")) == "Hi."
    assert spoken(Message(role="assistant", content=None)) == ""
    assert spoken(Message(role="assistant")) == ""


READS = {"qwen3", "qwen3_thinking", "thoughtful"}


@pytest.mark.parametrize("name", FORMATS)
def test_thoughts_are_recorded_apart_where_the_template_reads_them(name: str) -> None:
    chat = chat_of(name)
    assert chat.reads_thoughts is (name in READS)
    prompt = chat.prompt(QUESTIONS[:1])
    said = "<think>\nHm.\n</think>\n\nHi."
    if name in ("qwen3_thinking", "r1"):  # the generation prompt has opened it
        said = said.removeprefix("<think>\n")
    message = chat.message([*in_pieces(chat, said), chat.stop_ids[0]], prompt)
    if name in READS:
        assert message == {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}
    else:
        whole = "<think>\nHm.\n</think>\n\nHi."
        assert message == {"role": "assistant", "content": whole}
    assert spoken(message) == "Hi."


@pytest.mark.parametrize("name", FORMATS)
def test_who_says_no_thought_is_recorded_as_said(name: str) -> None:
    chat = chat_of(name)
    prompt = chat.prompt(QUESTIONS[:1])
    opened = name in ("qwen3_thinking", "r1")
    said = "</think>\n\n Hi. \n" if opened else " Hi. \n"
    message = chat.message([*in_pieces(chat, said), chat.stop_ids[0]], prompt)
    assert spoken(message) == " Hi. \n"
    assert message.get("reasoning_content") == ("" if name == "qwen3_thinking" else None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_turn_cut_within_a_thought_has_no_answer(name: str) -> None:
    chat = chat_of(name)
    prompt = chat.prompt(QUESTIONS[:1])
    said = "Is it" if name in ("qwen3_thinking", "r1") else "<think>\nIs it"
    message = chat.message(in_pieces(chat, said), prompt)
    assert spoken(message) == ""
    if name in READS:
        assert message == {"role": "assistant", "content": "", "reasoning_content": "Is it"}
    else:
        assert message == {"role": "assistant", "content": "<think>\nIs it"}


def test_a_thought_that_somebody_typed_was_not_opened_by_the_prompt() -> None:
    chat = chat_of("chatml")
    typed = [Message(role="user", content="What does <think>")]
    message = chat.message(in_pieces(chat, "It opens."), chat.prompt(typed))
    assert message == {"role": "assistant", "content": "It opens."}


def test_tags_that_a_tokenizer_calls_special_are_read_all_the_same() -> None:
    tokenizer = make_tokenizer("qwen3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<think>")].special
    chat = Chat(tokenizer, DATE)
    ids = tokenizer("<think>\nHm.\n</think>\n\nHi.<|im_end|>", add_special_tokens=False).input_ids
    message = chat.message(ids, chat.prompt(QUESTIONS[:1]))
    assert message == {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}


THOUGHT = "<think>\nIs it 16?\n</think>\n\nSixteen the end."


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking", "r1"])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_template_that_drops_thoughts_gets_its_own_page_again(name: str, stopped: bool) -> None:
    chat = chat_of(name)
    said = THOUGHT if name == "qwen3" else THOUGHT.removeprefix("<think>\n")
    messages, turns = play(chat, [(said, stopped)] * 3)
    seen = contexts(turns)
    for t, context in enumerate(seen):
        assert text_of(chat, context) == page(chat, messages[: 2 * t + 1])
        assert "Is it 16?" not in text_of(chat, context)
    for t in range(1, 4):
        # What is kept ends where the last turn began: before what the page no longer holds.
        assert turns[t][0] <= len(seen[t - 1])
        assert turns[t][0] > len(seen[t - 1]) - 6


def test_a_template_that_keeps_thoughts_keeps_the_sampled_ids() -> None:
    chat = chat_of("thoughtful")
    messages, turns = play(chat, [(THOUGHT, True), ("Sixteen.", True), (THOUGHT, True)])
    assert messages[1]["reasoning_content"] == "Is it 16?"
    seen = contexts(turns)
    for t in range(1, 4):
        assert turns[t][0] == len(seen[t - 1]) + len(turns[t - 1][2])
        assert text_of(chat, seen[t]) == page(chat, messages[: 2 * t + 1])


@pytest.mark.parametrize("name", ["thoughtful", "qwen3_5_think"])
def test_the_bridge_ends_a_thought_that_was_cut_where_thoughts_are_kept(name: str) -> None:
    chat = Chat(make_tokenizer(name, published=name != "thoughtful"), DATE)
    opened = name == "qwen3_5_think"  # it keeps thoughts until the user speaks again
    said = "Is it" if opened else "<think>\nIs it"
    messages = [QUESTIONS[0], chat.message(in_pieces(chat, said), chat.prompt(QUESTIONS[:1]))]
    answer = Message(role="tool", content="higher") if opened else QUESTIONS[1]
    context = chat.prompt(QUESTIONS[:1]) + in_pieces(chat, said)
    keep, prompt = chat.next(context, [*messages, answer])
    assert keep == len(context)
    assert text_of(chat, prompt).startswith("\n</think>\n\n<|im_end|>\n<|im_start|>user")
    assert text_of(chat, context + prompt) == page(chat, [*messages, answer])


def test_a_thought_that_was_stopped_gets_its_end_in_place_of_the_stop_token() -> None:
    chat = chat_of("thoughtful")
    messages, turns = play(chat, [("<think>\nIs it", True)])
    context = contexts(turns)[1]
    assert turns[1][0] == len(turns[0][1]) + len(turns[0][2]) - 1  # all but the stop token
    assert text_of(chat, context) == page(chat, messages)
    assert "Is it\n</think>\n\n<|im_end|>" in text_of(chat, context)
    # Where a thought had its end, or there is an answer to end, all that was sampled stays.
    for said in ("<think>Is it</think>", "Well. <think>Is it"):
        _, turns = play(chat, [(said, True)])
        assert turns[1][0] == len(turns[0][1]) + len(turns[0][2])


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "qwen25"])
def test_a_template_that_knows_nothing_of_thoughts_keeps_all(name: str) -> None:
    chat = chat_of(name)
    _, turns = play(chat, [(THOUGHT, True), (THOUGHT[:16], False)])
    seen = contexts(turns)
    for t in (1, 2):
        assert turns[t][0] == len(seen[t - 1]) + len(turns[t - 1][2])
    assert text_of(chat, seen[2]).count("Is it") == 2


def test_a_thought_cut_short_leaves_an_empty_answer_in_history() -> None:
    for name in ("qwen3", "qwen3_thinking"):
        chat = chat_of(name)
        said = "<think>\nIs it" if name == "qwen3" else "Is it"
        messages, turns = play(chat, [(said, False), ("Hm.</think>Yes.", True)])
        assert "Is it" not in text_of(chat, contexts(turns)[1])
        assert text_of(chat, contexts(turns)[2]) == page(chat, messages)
    # R1's template shows again what has no end of a thought: all that was seen stays.
    chat = chat_of("r1")
    _, turns = play(chat, [("Is it", False)])
    assert turns[1][0] == len(turns[0][1]) + len(turns[0][2])
    assert "<|Assistant|><think>\nIs it<|end|>" in text_of(chat, contexts(turns)[1])


def test_where_one_turn_is_rewritten_the_sampled_ids_of_the_turns_before_stay() -> None:
    chat = chat_of("qwen3")
    _, turns = play(chat, [("Sixteen in the end.", True), (THOUGHT, True)])
    first = turns[0][2]
    assert first != chat.tokenizer("Sixteen in the end.<|im_end|>").input_ids
    last = contexts(turns)[2]
    start = len(turns[0][1])
    assert last[start : start + len(first)] == first
    assert "Is it 16?" not in text_of(chat, last)


def test_a_template_sees_the_variables_that_it_is_given() -> None:
    chat = chat_of("qwen3", enable_thinking=False)
    messages, turns = play(chat, [("Fine.", True), ("Well.", False)])
    assert messages[1] == {"role": "assistant", "content": "Fine."}
    for t, context in enumerate(contexts(turns)):
        expected = page(chat, messages[: 2 * t + 1], enable_thinking=False)
        assert text_of(chat, context) == expected
        assert expected.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert expected.count("<think>") == 1  # and no longer there when the dialogue goes on
    assert "<think>" not in text_of(chat, chat_of("qwen3").prompt(QUESTIONS[:1]))


def test_variables_are_seen_by_the_probes_too() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ greeting + '\\n' }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="greeting"):
        Chat(tokenizer, DATE)
    chat = Chat(tokenizer, DATE, template_kwargs={"greeting": "Hello"})
    assert text_of(chat, chat.prompt(QUESTIONS[:1])).startswith("Hello\n<|im_start|>")
    tokenizer.chat_template = (
        "{%- if count %}{{ messages | length }}{% endif %}" + FORMATS["chatml"][0]
    )
    assert Chat(tokenizer, DATE).append_only
    assert not Chat(tokenizer, DATE, template_kwargs={"count": True}).append_only


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "strftime_now", "tokenize"]
)
def test_a_variable_of_ours_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"can't be named {name}"):
        chat_of("qwen3", **{name: True})


THOUGHTFUL = [
    {"role": "user", "content": "What does <think> mean?"},
    {"role": "assistant", "content": "<think>\nSay 17.\n</think>\n\nIt is 5.", "name": "x"},
    {"role": "user", "content": "And </think>?"},
    {"role": "assistant", "content": "12", "reasoning_content": "or 13"},
    {"role": "assistant", "content": None, "tool_calls": []},
]


def test_others_hear_what_was_said_and_users_may_write_the_tags():
    assert heard(THOUGHTFUL) == [
        THOUGHTFUL[0],
        {"role": "assistant", "content": "It is 5.", "name": "x"},
        THOUGHTFUL[2],
        {"role": "assistant", "content": "12"},
        THOUGHTFUL[4],
    ]
    assert [spoken(message) for message in THOUGHTFUL] == [
        "What does <think> mean?", "It is 5.", "And </think>?", "12", "",
    ]  # fmt: skip


def test_thoughts_are_neither_answered_nor_scored():
    """The game answers the guess that was said; a reward model's page has no thought on it."""
    info = {"secret": 17, "low": 1, "high": 32}
    dialogue = Dialogue(0, "p", 0, THOUGHTFUL[:2], info=info)
    assert asyncio.run(GuessingGame().reply(dialogue)) == [{"role": "user", "content": "higher"}]
    chat = Chat(make_tokenizer("chatml"), "2024-12-24")
    values = {"branch_turn": None, "score_turn": 1, "status": "complete", "end_reason": "x"}
    rollout = Rollout("p", 0, THOUGHTFUL[:4], None, **values)
    ids, lengths = Encoder(chat, None, "template").encode(rollout, [0, 1])
    page = chat.tokenizer.decode(ids)
    assert "It is 5." in page and "17" not in page and "13" not in page
    assert sorted(lengths) == [0, 1]
    only_thought = {"role": "assistant", "content": "<think>hm, cut"}
    rollout = Rollout("p", 0, [THOUGHTFUL[0], only_thought], None, **values)
    scored, asked = blank(rollout, [0])
    assert (scored.errors, asked) == ([EMPTY_RESPONSE], [])
