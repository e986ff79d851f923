"""Who scores the policy: rules, a user's own function, ArmoRM, sequence classifiers.

A new reward model is one file and one line in a dict here: LOADERS by the spec's prefix,
ARCHITECTURES by the first architecture that a checkpoint's config.json names.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.rewards.base import RewardModel, Scored, Settings

LOADERS = {
    "rule:": "pipeline.rewards.rules",
    "python:": "pipeline.rewards.functions",
}
ARCHITECTURES = {"LlamaForRewardModelWithGating": "pipeline.rewards.armorm"}
OTHER_ARCHITECTURES = "pipeline.rewards.classifier"

__all__ = ["RewardModel", "Scored", "Settings", "load_reward", "reward_fingerprint"]


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
