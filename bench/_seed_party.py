"""One party's turn, the seed's way: load the model, say one thing in every dialogue, and go.

python bench/_seed_party.py MODEL policy DIALOGUES.json SETTINGS.json

REFUEL's response_generator.py and user_generator.py, with what they compute and none of their
waits: a fresh `vllm.LLM`, the chat template as text, one call for all dialogues. The file of
dialogues, lists of messages, is read and written anew.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.environments.simulated_user import instructions

MARKER = "Question:"


def prompts_of(party: str, dialogues: list[list[Any]], tokenizer: Any) -> list[str]:
    """Return what the model reads, as text."""
    said = dialogues if party == "policy" else [[instructions(each)] for each in dialogues]
    return [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in said
    ]


def next_message(party: str, text: str) -> dict[str, str]:
    """Return the message made of what the model said: the seed takes all of it if in doubt."""
    if party == "policy":
        return {"role": "assistant", "content": text}
    return {"role": "user", "content": text.rpartition(MARKER)[2].strip()}


def main(model: str, party: str, dialogues_file: str, settings_file: str) -> None:
    """Add one message to each dialogue."""
    from vllm import LLM, SamplingParams

    path = Path(dialogues_file)
    dialogues = json.loads(path.read_text())
    settings = json.loads(Path(settings_file).read_text())
    engine = LLM(model, **settings["engine"])
    prompts = prompts_of(party, dialogues, engine.get_tokenizer())
    outputs = engine.generate(prompts, SamplingParams(**settings["sampling"]), use_tqdm=False)
    for messages, output in zip(dialogues, outputs, strict=True):
        messages.append(next_message(party, output.outputs[0].text))
    path.write_text(json.dumps(dialogues))


if __name__ == "__main__":
    main(*sys.argv[1:])
