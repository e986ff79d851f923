"""Who scores the policy: rules, a user's own function, ArmoRM, sequence classifiers.

A new reward model is one file and one line in a dict here: LOADERS by the spec's prefix,
ARCHITECTURES by the first architecture that a checkpoint's config.json names.
"""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError
from pipeline.rewards.base import RewardModel, Scored, Settings

if TYPE_CHECKING:
    from pipeline.engines.base import EngineOptions
    from pipeline.rewards.served import ServedReward

LOADERS = {
    "rule:": "pipeline.rewards.rules",
    "python:": "pipeline.rewards.functions",
}
ARCHITECTURES = {"LlamaForRewardModelWithGating": "pipeline.rewards.armorm"}
OTHER_ARCHITECTURES = "pipeline.rewards.classifier"

__all__ = ["RewardModel", "Scored", "Settings", "load_reward", "load_served", "reward_fingerprint"]


def reward_fingerprint(spec: str) -> str:
    """Return what changes when the reward changes, without loading it."""
    if module := _prefixed(spec):
        return module.fingerprint(spec)
    from pipeline.fingerprints import fingerprint_model

    return fingerprint_model(spec)


def load_reward(
    spec: str, settings: Settings | None = None, fingerprint: str | None = None
) -> RewardModel:
    """Load `rule:<name>`, `python:file.py:function`, a local folder or a Hub id.

    Raises DataError when there is no such reward, or its checkpoint isn't whole.
    """
    settings = settings or Settings()
    if module := _prefixed(spec):
        return module.load(spec, settings)
    from pipeline.rewards.checkpoints import local_folder

    fingerprint = fingerprint or reward_fingerprint(spec)
    folder = local_folder(spec)
    module = importlib.import_module(ARCHITECTURES.get(_architecture(folder), OTHER_ARCHITECTURES))
    return module.load(folder, spec, fingerprint, settings)


def load_served(
    spec: str, settings: Settings, options: "EngineOptions", fingerprint: str | None = None
) -> "ServedReward":
    """Have a folder's or Hub id's classifier served: by `options.urls`, or by a server of our own.

    The caller closes it. Raises DataError for a reward that no server can give.
    """
    if _prefixed(spec):
        raise DataError(f"{spec} is no model, so that no server is needed: leave out --engine vllm")
    from pipeline.rewards import served
    from pipeline.rewards.checkpoints import local_folder

    fingerprint = fingerprint or reward_fingerprint(spec)
    folder = local_folder(spec)
    if (architecture := _architecture(folder)) in ARCHITECTURES:
        raise DataError(
            f"{spec} ({architecture}) reads two positions through a gating network, and vLLM's"
            " servers pool one through a linear layer: leave out --engine vllm"
        )
    return served.load(folder, spec, fingerprint, settings, options)


def _prefixed(spec: str) -> Any:
    for prefix, module in LOADERS.items():
        if spec.startswith(prefix):
            return importlib.import_module(module)
    return None


def _architecture(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the reward model {folder} has no readable config.json: {error}"
        ) from error
    return next(iter(config.get("architectures") or []), "")
