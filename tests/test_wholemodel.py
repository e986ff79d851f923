"""Classifiers without a linear layer over a causal state: each prefix by its own forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CTRLConfig,
    DebertaV2Config,
    RobertaConfig,
)

from pipeline.errors import EngineError
from pipeline.records import Message, Rollout
from pipeline.rewards import Settings, load_reward
from pipeline.rewards.wholemodel import WholeModel
from reward_models import one_thread, tokenizer_like_llama3  # noqa: F401

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 320,
    "type_vocab_size": 1,
    "initializer_range": 0.3,
    "num_labels": 1,
}


def dialogue(turns: int, mark: str = "") -> Rollout:
    messages = []
    for i in range(turns):
        messages += [
            Message(role="user", content=f"{mark} question {i}?"),
            Message(role="assistant", content=f"answer {i} {mark}" + " and so" * (2 * i + 1)),
        ]
    return Rollout(mark or "p", 0, messages, None, None, turns - 1, "complete", "")


def write(folder: Path, config: type, pad: str = "<|eot_id|>", **changes: Any) -> Path:
    """Save a random model; its pad id is by default the end-of-turn id, which every prefix has."""
    tokenizer = tokenizer_like_llama3()
    pad_id = tokenizer.convert_tokens_to_ids(pad)
    torch.manual_seed(0)
    values = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": pad_id} | changes
    model = AutoModelForSequenceClassification.from_config(config(**values))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_scores(folder: Path, rollout: Rollout) -> list[float]:
    """Score each prefix by the model's own forward, with all of its ids seen."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    values = []
    for turn in range(len(rollout.messages) // 2):
        page = rollout.messages[: 2 * turn + 2]
        ids = torch.tensor([tokenizer.apply_chat_template(page, return_dict=False)])
        with torch.no_grad():
            values.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    return values


ENCODERS = [
    (BertConfig, {}),
    (DebertaV2Config, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    # Its pad id is a special one that no text holds: it counts positions from there on.
    (RobertaConfig, {"pad": "<|end_of_text|>"}),
]


@pytest.mark.parametrize(("config", "changes"), ENCODERS, ids=lambda value: str(value)[-40:])
def test_every_turn_scores_as_its_prefix_alone(
    config: type, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, config, **changes)
    reward = load_reward(str(folder))
    assert isinstance(reward, WholeModel)
    note = f"{folder}: a pass for each prefix, because {config.__name__.removesuffix('Config')}"
    assert capsys.readouterr().err.count(note) == 1
    rollouts = [dialogue(turns, f"m{turns}") for turns in (3, 1, 2)]
    together = reward.score(rollouts, [range(3), [0], [1]])
    for rollout, scored in zip(rollouts, together, strict=True):
        own = own_scores(folder, rollout)
        asked = [turn for turn, value in enumerate(scored.rewards) if value is not None]
        assert asked == {3: [0, 1, 2], 1: [0], 2: [1]}[len(own)]
        assert [scored.rewards[t] for t in asked] == pytest.approx([own[t] for t in asked], 1e-6)
    first = own_scores(folder, rollouts[0])
    assert max(first) - min(first) > 1e-3, "a model that says the same of everything shows nothing"


def test_a_pad_id_within_the_text_moves_nothing(tmp_path: Path) -> None:
    """CTRL looks for the last id that isn't the pad id; here each prefix ends with that one."""
    sizes = {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 2, "n_positions": 160}
    folder = write(tmp_path, CTRLConfig, **sizes)
    reward = load_reward(str(folder))
    assert isinstance(reward, WholeModel)
    rollout = dialogue(3)
    [scored] = reward.score([rollout], [range(3)])
    assert scored.rewards == pytest.approx(own_scores(folder, rollout), 1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        rollout.messages, return_dict=False
    )
    with torch.no_grad():
        misled = model(torch.tensor([ids])).logits.item()
    assert abs(misled - scored.rewards[2]) > 1e-3


@pytest.mark.parametrize(("config", "places"), [(BertConfig, 320), (RobertaConfig, 318)])
def test_what_the_model_has_no_places_for_is_too_long(
    config: type, places: int, tmp_path: Path
) -> None:
    pad = "<|end_of_text|>"
    folder = write(tmp_path, config, pad)
    reward = load_reward(str(folder), Settings(max_length=4096))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def length(rollout: Rollout) -> int:
        return len(tokenizer.apply_chat_template(rollout.messages, return_dict=False))

    short = dialogue(1)
    room = places - length(short)
    fits, long = dialogue(1), dialogue(1)
    fits.messages[0] = Message(role="user", content=f"{short.messages[0]['content']}{'~' * room}")
    long.messages[0] = Message(role="user", content=f"{fits.messages[0]['content']}~")
    assert [length(fits), length(long)] == [places, places + 1]
    [scored] = reward.score([fits], [[0]])
    assert scored.rewards == pytest.approx(own_scores(folder, fits), 1e-6)
    [scored] = reward.score([long], [[0]])
    assert (scored.rewards, scored.errors) == ([None], ["too_long"])


class Broken(torch.nn.Module):
    """Answers with what it is told, or fails as a full device does."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value
        self.device = torch.device("cpu")
        self.base_model = None
        self.config = BertConfig()

    def forward(self, **_: Any) -> Any:
        if self.value is None:
            raise torch.OutOfMemoryError("no memory")
        return type("Output", (), {"logits": torch.tensor([[self.value]])})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "gave nan for prompt_id 'p', sample 0, policy turn 0"),
        (None, "out of memory on one prefix of"),
    ],
)
def test_a_failing_model_stops_the_stage(
    value: float | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_reward(str(write(tmp_path, BertConfig)))._encoder
    model = WholeModel("m", "f", encoder, Broken(value), 4096)
    with pytest.raises(EngineError, match=words):
        model.score([dialogue(2)], [[0, 1]])
