"""Chat templates written from the formats of real models, and a byte-level tokenizer for them.

The tokenizer is trained here, in a fraction of a second; any text survives encode and decode.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA31 = """{{- bos_token }}
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + today + '\\n\\n' + system }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

CHATML = """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- if tools %}{{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message.content is defined %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function.name + ' ' + call.function.arguments | tojson }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

QWEN3 = """{%- set state = namespace(last_user=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set state.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}{%- set thought = '' %}
{%- if message.role == 'assistant' %}
{%- if message.reasoning_content is defined %}{%- set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 > state.last_user %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Qwen3's models that always think: the page of a prompt ends in an open thought.
QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and not enable_thinking %}\n"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
    "{{- '<think>\\n' }}",
)

# The dialogue of Qwen2.5: a system turn of its own, tools in it, answers of tools in a user turn.
QWEN25 = """{%- set first = messages[0] %}
{%- set told = first.content if first.role == 'system' else 'You are Qwen, a helpful assistant.' %}
{{- '<|im_start|>system\\n' + told }}
{%- if tools %}
{{- '\\n\\n# Tools\\n\\nCall these, whose signatures are:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nAnswer with a JSON object in <tool_call></tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- if first.role == 'system' %}{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}
{%- set before = loop.previtem.role if loop.previtem is defined else '' %}
{%- set after = loop.nextitem.role if loop.nextitem is defined else '' %}
{%- if message.role == 'tool' %}
{%- if before != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if after != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role }}
{%- if message.content or not message.tool_calls %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# DeepSeek-R1's dialogue: it opens a thought for the model, and drops thoughts from history.
R1 = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content }}
{%- elif message.role == 'user' %}{{- '<|User|>' + message.content }}
{%- else %}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

# A template that shows every thought again, as those of models do that think between tool calls.
THOUGHTFUL = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

MISTRAL_APPENDS = MISTRAL.replace("loop.last", "loop.first")

# Mistral's with tools: they stand before what the user said last, and move on with it.
MISTRAL_TOOLS = """{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- if tools and message == users[-1] %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + message['content'] + '[/INST]' }}
{%- elif message['role'] == 'tool' %}
{{- '[TOOL_RESULTS] ' + message['content'] + '[/TOOL_RESULTS]' }}
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""

COUNTING = """{{- 'There are ' ~ messages | length ~ ' messages.\\n' }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

PLAIN = """{%- for message in messages %}
{{- message['role'] + ': ' + message['content'] + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

_LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]"]
_MISTRAL_TOOLS = ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
_R1 = ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"]

FORMATS: dict[str, tuple[str, list[str], str | None, str]] = {
    "llama3": (LLAMA3, _LLAMA, _LLAMA[0], "<|eot_id|>"),
    "llama31": (LLAMA31, _LLAMA, _LLAMA[0], "<|eot_id|>"),
    "chatml": (CHATML, _CHATML, None, "<|im_end|>"),
    "qwen25": (QWEN25, _CHATML, None, "<|im_end|>"),
    "qwen3": (QWEN3, _CHATML, None, "<|im_end|>"),
    "qwen3_thinking": (QWEN3_THINKING, _CHATML, None, "<|im_end|>"),
    "r1": (R1, _R1, "<|begin|>", "<|end|>"),
    "thoughtful": (THOUGHTFUL, _CHATML, None, "<|im_end|>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral": (MISTRAL_APPENDS, _MISTRAL, "<s>", "</s>"),
    "mistral_moving_system": (MISTRAL, _MISTRAL, "<s>", "</s>"),
    "mistral_tools": (MISTRAL_TOOLS, [*_MISTRAL, *_MISTRAL_TOOLS], "<s>", "</s>"),
    "counting": (COUNTING, _CHATML, None, "<|im_end|>"),
    "plain": (PLAIN, ["<eos>"], None, "<eos>"),
}
"""Name -> template, special tokens, BOS, EOS."""

PUBLISHED = {
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "gemma3": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
}
"""Templates as their models publish them, which TRL brings along -> EOS."""

_TEXT = [
    "The user asks what the answer is, and the assistant says that it's forty-two.",
    "Is it higher or lower? I guess 16. assistant user system model\n\nHello there.",
]


@cache
def _backend(special: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Real byte-level tokenizers trim offsets; chat.py must not be misled by it.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return tokenizer


def _published(name: str) -> tuple[str, list[str], str | None, str]:
    """Read a template that TRL brings along, and the special tokens that it writes."""
    trl = find_spec("trl")
    assert trl is not None and trl.submodule_search_locations
    folder = Path(trl.submodule_search_locations[0])
    template = (folder / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    written = re.findall(
        r"<[|\uff5c][^|\uff5c<>]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>", template
    )
    bos = "<bos>" if "bos_token" in template else None
    special = sorted({*written, PUBLISHED[name], *([bos] if bos else [])})
    return template, special, bos, PUBLISHED[name]


def make_tokenizer(name: str, published: bool = False) -> Any:
    """Return a fast tokenizer of transformers with a chat template of FORMATS or PUBLISHED."""
    from transformers import PreTrainedTokenizerFast

    template, special, bos, eos = _published(name) if published else FORMATS[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(tuple(special)).to_str()),
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        name_or_path=name,
    )
    if "<think>" in template:  # ids of their own that are no special tokens, as the models have
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer
