"""Chat templates: what the policy sees is checked against whole renders of the template."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.chat import Chat
from pipeline.chat_files import load_chat
from pipeline.errors import DataError, RowError
from pipeline.records import Message, ToolCall
from templates import FORMATS, make_tokenizer

DATE = "2024-12-24"
PRIVATE = "\ue000 0\ue001 \ue002"


def chat_of(name: str) -> Chat:
    return Chat(make_tokenizer(name), DATE)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def text_of(chat: Chat, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(list(ids), skip_special_tokens=False)


def ids_of(chat: Chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def page(chat: Chat, messages: list[Message], **options: Any) -> str:
    """Render without chat.py, as a reference."""
    options = {"add_generation_prompt": True} | options
    return chat.tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, strftime_now=lambda _: "24 Dec 2024", **options
    )


def said_in_pieces(chat: Chat, text: str) -> list[int]:
    """Return ids that a model may sample for a text and encoding it would not give."""
    pieces = [id_ for char in text for id_ in ids_of(chat, char)]
    assert " the" not in text or pieces != ids_of(chat, text)
    return pieces


def play(
    chat: Chat, answers: Sequence[tuple[str, bool]], opening: Sequence[Message] = ()
) -> tuple[list[int], list[Message], list[tuple[int, list[int], list[int]]]]:
    """Play answers (text, whether the stop token was sampled) with questions between them.

    Returns the last context, the messages, and (keep, prompt_ids, response_ids) of each turn.
    """
    messages = [*opening, user("Question 0?")]
    context, turns = list[int](), list[tuple[int, list[int], list[int]]]()
    for i, (text, stopped) in enumerate(answers):
        keep, prompt = chat.next(context, messages) if turns else (0, chat.prompt(messages))
        response = said_in_pieces(chat, text) + [chat.stop_ids[0]] * stopped
        turns.append((keep, prompt, response))
        context = context[:keep] + prompt + response
        messages += [assistant(chat.decode(response)), user(f"Question {i + 1}?")]
    keep, prompt = chat.next(context, messages)
    return context[:keep] + prompt, messages, [*turns, (keep, prompt, [])]


APPENDS = {
    "llama3": True,
    "llama31": True,
    "chatml": True,
    "qwen25": True,
    "qwen3": False,
    "qwen3_thinking": False,
    "r1": False,
    "thoughtful": True,
    "gemma": True,
    "mistral": True,
    "mistral_moving_system": False,
    "mistral_tools": True,
    "counting": False,
    "plain": True,
}


def test_every_template_has_an_expectation() -> None:
    assert set(APPENDS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_append_only_is_probed(name: str) -> None:
    assert chat_of(name).append_only is APPENDS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_the_template_and_has_the_bos_it_writes(name: str) -> None:
    chat = chat_of(name)
    messages = [user("Is it higher?"), assistant("No."), user("Lower?")]
    ids = chat.prompt(messages)
    assert text_of(chat, ids) == page(chat, messages)
    bos = chat.tokenizer.bos_token_id
    assert bos is None or ids.count(bos) == 1


def test_stop_ids_are_the_end_of_turn_eos_and_the_generation_configs() -> None:
    chat = Chat(make_tokenizer("gemma"), DATE, extra_stop_ids=[7, 1])
    assert [text_of(chat, [i]) for i in chat.stop_ids[:2]] == ["<end_of_turn>", "<eos>"]
    assert chat.stop_ids[2:] == (7,)
    # A template without an end of turn: the tokenizer's EOS alone.
    assert [text_of(chat_of("plain"), [i]) for i in chat_of("plain").stop_ids] == ["<eos>"]


@pytest.mark.parametrize("name", [name for name, appends in APPENDS.items() if appends])
def test_sampled_ids_stay_and_the_context_reads_as_the_template(name: str) -> None:
    chat = chat_of(name)
    context, messages, turns = play(chat, [("In the end.", True), ("Sixteen!", True)])
    expected = page(chat, messages)
    if name.startswith("mistral"):  # its template puts a blank before what the assistant says
        expected = expected.replace("[/INST] ", "[/INST]")
    if name == "plain":  # it writes no end of turn; the sampled one stays
        expected = expected.replace("end.", "end.<eos>").replace("Sixteen!", "Sixteen!<eos>")
    assert text_of(chat, context) == expected
    seen = 0
    for keep, prompt, response in turns:
        assert keep == seen
        assert context[keep + len(prompt) :][: len(response)] == response
        seen = keep + len(prompt) + len(response)


@pytest.mark.parametrize(
    ("name", "after_stop", "after_cut"),
    [
        ("llama3", "<|start_header_id|>user", "<|eot_id|><|start_header_id|>user"),
        ("chatml", "\n<|im_start|>user", "<|im_end|>\n<|im_start|>user"),
        ("gemma", "\n<start_of_turn>user", "<end_of_turn>\n<start_of_turn>user"),
        ("mistral", "[INST] ", "</s>[INST] "),
        ("qwen3", "\n<|im_start|>user", "<|im_end|>\n<|im_start|>user"),
    ],
)
def test_the_bridge_ends_a_cut_turn_and_repeats_no_stop_token(
    name: str, after_stop: str, after_cut: str
) -> None:
    chat = chat_of(name)
    for stopped, opening in [(True, after_stop), (False, after_cut)]:
        _, _, turns = play(chat, [("Fine.", stopped)])
        assert text_of(chat, turns[1][1]).startswith(opening)
        assert chat.stop_ids[0] not in turns[0][2] or stopped


def test_another_stop_token_does_not_replace_the_templates() -> None:
    chat = Chat(make_tokenizer("gemma"), DATE)
    messages = [user("Hi."), assistant("Hello."), user("Bye.")]
    context = chat.prompt(messages[:1]) + ids_of(chat, "Hello.<eos>")
    keep, prompt = chat.next(context, messages)
    assert keep == len(context)
    assert text_of(chat, prompt).startswith("<end_of_turn>\n<start_of_turn>user")


def test_a_template_that_trims_leaves_sampled_blanks_alone() -> None:
    chat = chat_of("llama3")
    context, _, turns = play(chat, [(" padded \n", True), ("Done.", True)])
    assert "\n\n padded \n<|eot_id|>" in text_of(chat, context)
    assert [keep for keep, _, _ in turns[1:]] == [
        sum(len(p) + len(r) for _, p, r in turns[:i]) for i in (1, 2)
    ]


def test_qwen3_keeps_what_it_does_not_rewrite() -> None:
    chat = chat_of("qwen3")
    context, messages, turns = play(chat, [("In the end.", True), ("Not the user.", True)])
    assert text_of(chat, context) == page(chat, messages)
    assert turns[2][0] == sum(len(p) + len(r) for _, p, r in turns[:2])


def test_qwen3_drops_the_thoughts_of_earlier_turns() -> None:
    chat = chat_of("qwen3")
    thought = "<think>\nIs it 16?\n</think>\n\nSixteen."
    context, messages, turns = play(chat, [(thought, True), (thought, True)])
    keep, prompt, _ = turns[1]
    first = turns[0][1] + turns[0][2]
    assert text_of(chat, first[:keep]).endswith("<|im_start|>assistant\n")
    assert text_of(chat, first[:keep] + prompt) == page(chat, messages[:3])
    assert text_of(chat, context) == page(chat, messages)
    assert "think" not in text_of(chat, context)


@pytest.mark.parametrize("name", ["counting", "mistral_moving_system"])
def test_where_history_is_rewritten_the_longest_true_prefix_is_kept(name: str) -> None:
    chat = chat_of(name)
    system = [Message(role="system", content="Be brief.")]
    messages = [*system, user("Hi."), assistant("Hello."), user("Bye.")]
    context = [*chat.prompt(messages[:2]), *ids_of(chat, "Hello."), chat.stop_ids[0]]
    whole = chat.prompt(messages)
    keep, prompt = chat.next(context, messages)
    assert context[:keep] + prompt == whole
    assert keep < len(context)
    assert context[keep] != whole[keep]


def test_the_date_is_the_stages_not_todays() -> None:
    chat = chat_of("llama31")
    assert "Today Date: 24 Dec 2024\n" in text_of(chat, chat.prompt([user("Hi.")]))


def test_decode_leaves_out_the_stop_token_and_nothing_else() -> None:
    chat = chat_of("chatml")
    ids = ids_of(chat, " two  words \n")
    assert chat.decode([*ids, chat.stop_ids[0]]) == " two  words \n"
    assert chat.decode(ids) == " two  words \n"
    start = ids_of(chat, "<|im_start|>")
    assert chat.decode([*ids, *start, *ids]) == " two  words \n two  words \n"
    assert chat.decode([]) == ""
    # A stop id that is no special token is left out at the end, and only there.
    point = ids_of(chat, ".")
    chat = Chat(make_tokenizer("chatml"), DATE, extra_stop_ids=point)
    assert chat.decode([*ids, *point, *ids, *point]) == " two  words \n. two  words \n"


@pytest.mark.parametrize("name", FORMATS)
def test_a_typed_special_token_never_becomes_one(name: str) -> None:
    chat = chat_of(name)
    added = chat.tokenizer.added_tokens_decoder
    special = sorted(token.content for token in added.values() if token.special)
    typed = "".join(special) + " and " + special[0] * 2
    messages = [user(f"I type {typed} here."), assistant("Fine."), user("x")]
    ids, plain = chat.prompt(messages), chat.prompt([user("I."), *messages[1:]])
    count = {i: plain.count(i) for i in added}
    assert {i: ids.count(i) for i in count} == count
    assert text_of(chat, ids) == page(chat, messages)


def test_private_use_characters_in_a_text_are_left_alone() -> None:
    chat = chat_of("llama3")
    for content in (PRIVATE, f"{PRIVATE} <|eot_id|>"):
        ids = chat.prompt([user(content)])
        assert text_of(chat, ids) == page(chat, [user(content)])
        assert ids.count(chat.stop_ids[0]) == 1


def test_a_look_alike_is_plain_in_the_bridge_too() -> None:
    chat = chat_of("llama3")
    messages = [user("Hi."), assistant("Hello."), user("<|eot_id|>")]
    context = [*chat.prompt(messages[:1]), *ids_of(chat, "Hello."), chat.stop_ids[0]]
    _, prompt = chat.next(context, messages)
    assert prompt.count(chat.stop_ids[0]) == 1
    assert text_of(chat, prompt).count("<|eot_id|>") == 2


def test_the_two_ways_to_encode_agree() -> None:
    # With a look-alike the text goes through a copy of the tokenizer; the rest must not change.
    for name in FORMATS:
        chat = chat_of(name)
        plain = chat.prompt([user("Hi there. It's 16!"), assistant("No."), user("Why?")])
        shielded = chat.prompt(
            [user("Hi there. It's 16!"), assistant("No."), user(f"Why?{chat._shield.special[0]}")]
        )
        same = len(chat.prompt([user("Hi there. It's 16!")]))
        assert shielded[:same] == plain[:same]


def test_tools_and_calls_reach_the_template_decoded_and_without_nulls() -> None:
    chat = chat_of("chatml")
    call = ToolCall(id="1", name="guess", arguments='{"number": 16}')
    messages = [
        user("Guess."),
        Message(role="assistant", content=None, tool_calls=[call], name=None),
        Message(role="tool", content="higher", tool_call_id="1"),
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "guess"}}])
    text = text_of(chat, chat.prompt(messages, tools))
    assert '<tool_call>\nguess {"number": 16}\n</tool_call>' in text
    assert '{"type": "function", "function": {"name": "guess"}}' in text
    assert "None" not in text


def test_a_dialogue_that_the_template_refuses_is_a_row_error() -> None:
    chat = chat_of("gemma")
    with pytest.raises(RowError, match="System role not supported") as caught:
        chat.prompt([Message(role="system", content="Be brief."), user("Hi.")])
    assert caught.value.reason == "template_error"
    with pytest.raises(RowError, match="must alternate"):
        chat.prompt([user("Hi."), user("Hi.")])


@pytest.mark.parametrize("name", FORMATS)
def test_spans_of_text(name: str) -> None:
    chat = chat_of(name)
    if name in ("counting", "qwen3_thinking", "r1"):  # the last two open a thought
        with pytest.raises(RowError) as caught:
            chat.encode_dialogue([user("Hi."), assistant("Hello."), user("?"), assistant("Bye.")])
        assert caught.value.reason == "span_unproven"
        return
    messages = [user("Hi. <|eot_id|></s>"), assistant("Hello."), user("?"), assistant(" Bye. ")]
    ids, spans = chat.encode_dialogue(messages)
    assert text_of(chat, ids) == page(chat, messages, add_generation_prompt=False)
    end = {"plain": ""}.get(name, text_of(chat, chat.stop_ids[:1]))
    trims = name in ("llama3", "llama31", "gemma")
    blank = " " if name.startswith("mistral") else ""
    # Qwen3 opens the last answer with an empty thought.
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    last = "Bye." if trims else " Bye. "
    assert [text_of(chat, ids[start:end_]) for start, end_ in spans] == [
        f"{blank}Hello.{end}",
        f"{thought}{blank}{last}{end}",
    ]


def test_spans_agree_with_the_prompt() -> None:
    chat = chat_of("llama31")
    messages = [user("Hi."), assistant("Hello."), user("?"), assistant("Bye.")]
    ids, spans = chat.encode_dialogue(messages)
    assert ids[: spans[0][0]] == chat.prompt(messages[:1])
    assert ids[: spans[1][0]] == chat.prompt(messages[:3])
    assert spans[1][1] == len(ids)


def test_a_token_across_the_edge_is_unproven() -> None:
    # " the" is one token, whose blank belongs to the header "assistant: ".
    chat = chat_of("plain")
    assert len(ids_of(chat, " the")) == 1
    with pytest.raises(RowError, match="crosses the edge") as caught:
        chat.encode_dialogue([user("Hi."), assistant("the answer")])
    assert caught.value.reason == "span_unproven"
    # "er" is one token too, and here the template writes the r.
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template = FORMATS["plain"][0].replace("+ '\\n'", "+ 'r\\n'")
    chat = Chat(tokenizer, DATE)
    assert len(ids_of(chat, "er")) == 1
    with pytest.raises(RowError, match="crosses the edge"):
        chat.encode_dialogue([user("Hi."), assistant("X lowe")])


def test_thoughts_that_the_template_drops_are_unproven() -> None:
    chat = chat_of("qwen3")
    thought = "<think>\nHm.\n</think>\n\nFine."
    ids, spans = chat.encode_dialogue([user("Hi."), assistant(thought)])
    assert [text_of(chat, ids[a:b]) for a, b in spans] == [f"{thought}<|im_end|>"]
    with pytest.raises(RowError, match="message 1 isn't on the page"):
        chat.encode_dialogue([user("Hi."), assistant(thought), user("?"), assistant("Bye.")])


def test_a_tokenizer_that_cannot_chat_is_refused() -> None:
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="llama3 has no chat template"):
        Chat(tokenizer, DATE)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DataError, match="can't be used: never"):
        Chat(tokenizer, DATE)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match="doesn't write what the assistant said"):
        Chat(tokenizer, DATE)


def test_load_chat_reads_the_generation_config(tmp_path: Any) -> None:
    make_tokenizer("llama3").save_pretrained(tmp_path)
    assert load_chat(str(tmp_path), DATE).stop_ids == chat_of("llama3").stop_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert load_chat(str(tmp_path), DATE).stop_ids == (3, 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load_chat(str(tmp_path), DATE).stop_ids == (3, 2)


def test_load_chat_without_a_tokenizer(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_chat(str(tmp_path), DATE)


@pytest.mark.parametrize("name", FORMATS)
def test_texts_are_encoded_as_transformers_does_whatever_tokenizer_json_says(name: str) -> None:
    """Truncation and padding that a tokenizer.json brings along are reset there, and here."""
    chat = chat_of(name)
    text = f"Grüße 🙂 {chat.tokenizer.eos_token} and {PRIVATE}, ".join("abcdefgh")
    plain = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(plain) > 60
    assert chat._ids(text) == plain
    chat.tokenizer.backend_tokenizer.enable_truncation(5)
    chat.tokenizer.backend_tokenizer.enable_padding(length=500)
    assert chat._ids(text) == plain
