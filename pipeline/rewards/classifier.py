"""FsfairX-LLaMA3-RM and kin: any AutoModelForSequenceClassification with one label.

A causal one with a linear `score` layer is read in one pass: score = w . h_last, with h_last the
hidden state at the prefix's last position. The position is counted, so a pad id that equals the
end-of-turn id is harmless. Any other one is given each prefix by itself (wholemodel.py).

BOS: FsfairX was trained without one by a tokenizer bug, while its card's pipeline adds one (about
1% on RewardBench, RLHFlow/RLHF-Reward-Modeling#16). The default, `--bos template`, scores what the
template renders, one BOS, as the card does; `--bos none` scores what it was trained on.
Axes: P scored prefixes, R = 1 position, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipeline.errors import DataError
from pipeline.rewards import checkpoints
from pipeline.rewards.backbone import Backbone
from pipeline.rewards.base import Settings
from pipeline.rewards.onepass import OnePass
from pipeline.rewards.wholemodel import WholeModel


class LinearHead(nn.Module):
    """The classifier's own score layer, in float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.float()
        self.objectives: list[str] = []

    def places(self, ids: Sequence[int], length: int) -> list[int] | str:
        """Return the last position of ids[:length]."""
        return [length - 1]

    def forward(self, hidden_PRD: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores_P and no objectives."""
        scores_P = self.layer(hidden_PRD[:, 0])[:, 0]
        return scores_P, scores_P.new_zeros(len(scores_P), 0)


def load(folder: Path, name: str, fingerprint: str, settings: Settings) -> OnePass | WholeModel:
    """Load a sequence classifier. Raises DataError on a tensor too many or few."""
    config = read_config(folder)
    tokenizer = checkpoints.load_tokenizer(folder)
    device, dtype = checkpoints.placement(config, settings)
    model = _model(folder, config, dtype, device)
    encoder = checkpoints.make_encoder(tokenizer, settings)
    settings = checkpoints.resolved(config, settings, device)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return WholeModel(name, fingerprint, encoder, model, settings.max_length)
    scorer = OnePass(
        name,
        fingerprint,
        encoder,
        Backbone(model.base_model, device),
        LinearHead(model.score),
        settings,
        checkpoints.PARALLEL[checkpoints.kind_of(device)],
    )
    scorer.probe(checkpoints.TOLERANCE[dtype])
    return scorer


def read_config(folder: Path) -> Any:
    """Read a classifier's config. Raises DataError unless it has exactly one label."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no config that transformers can read: {error}") from error
    if config.num_labels != 1:
        raise DataError(
            f"{folder} is a classifier of {config.num_labels} labels; a reward model has one"
        )
    return config


def _model(folder: Path, config: Any, dtype: torch.dtype, device: str) -> Any:
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise DataError(f"can't load a sequence classifier from {folder}: {error}") from error
    # transformers gives a missing tensor random values, and goes on.
    problems = [f"{key} is missing" for key in sorted(loaded["missing_keys"])]
    problems += [f"{key} is unexpected" for key in sorted(loaded["unexpected_keys"])]
    if problems:
        raise DataError(
            f"{folder} isn't the checkpoint that its config.json describes: "
            f"{'; '.join(problems[:5])}. Download it again"
        )
    return model.eval()
