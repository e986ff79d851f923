"""Rewards of a group -> advantages. Pure. Axis: G rollouts of one prompt."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

EPSILON = 1e-4
"""Added to the standard deviation (GRPO's value in TRL and in the seeds)."""


def normalised(rewards_G: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return (r - mean) / (std + 1e-4) with the unbiased std; 0 for a rollout that is alone.

    [1, 2, 3] has mean 2 and std 1: -0.9999, 0, 0.9999. https://arxiv.org/abs/2402.03300, eq. 3.
    """
    centred_G = centred(rewards_G)
    if len(centred_G) < 2:
        return centred_G
    return centred_G / (np.std(centred_G, ddof=1) + EPSILON)


def centred(rewards_G: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return r - mean, without the division that favours easy and hard prompts.

    https://arxiv.org/abs/2503.20783, section 3.
    """
    values_G = np.asarray(rewards_G, dtype=np.float64)
    return values_G - values_G.mean()


ADVANTAGES: dict[str, Callable[[Sequence[float]], npt.NDArray[np.float64]] | None] = {
    "none": None,
    "normalised": normalised,
    "centred": centred,
}
