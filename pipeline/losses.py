"""Losses as pure functions: tensors in, per-example numerators and weights out.

Axes: N trained ids of a micro-batch, M members (one rollout each), E examples (pairs, rollouts).
`train_steps` divides the sum of the numerators by the all-reduced sum of the weights of the whole
optimizer step, so that the loss doesn't depend on micro-batches or on the number of processes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """What a loss gives `train_steps`: numerators_E, weights_E, and metrics of the same shape.

    A metric is averaged over the examples of a step with the same weights.
    """

    numerators: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]


def member_sums(values_N: Tensor, owners_N: Tensor, members: int) -> Tensor:
    """Sum the trained ids of each member in float64: values_N, owners_N (0..M-1) -> sums_M."""
    sums_M = torch.zeros(members, dtype=torch.float64, device=values_N.device)
    return sums_M.index_add(0, owners_N, values_N.double())


def refuel(
    delta_chosen_E: Tensor,
    delta_reject_E: Tensor,
    reward_chosen_E: Tensor,
    reward_reject_E: Tensor,
    eta: float,
) -> Loss:
    """Regress the relative log-ratio on the relative reward, one numerator a pair.

    `loss = ((Δ_chosen − Δ_reject) − eta (r_chosen − r_reject))²`, Δ = new − old log-prob summed
    over the trained ids of turn h; eta multiplies the reward difference (arXiv 2410.04612; eta²
    times the form printed there).

    By hand: new [-10, -12], old [-11, -11], rewards [1, 0.5]. Δ = [1, -1], so with eta 1 the loss
    is (2 - 0.5)² = 2.25, and with eta 1000 it is (2 - 500)² = 248004. Where Δ = 0, as at the first
    update, it is eta² Δr².
    """
    reward_gap_E = reward_chosen_E.double() - reward_reject_E.double()
    delta_gap_E = delta_chosen_E.double() - delta_reject_E.double()
    loss_E = (delta_gap_E - eta * reward_gap_E).square()
    metrics = pair_metrics(delta_chosen_E, delta_reject_E, reward_gap_E)
    return Loss(loss_E, torch.ones_like(loss_E), metrics)


def dpo(
    delta_chosen_E: Tensor,
    delta_reject_E: Tensor,
    reward_chosen_E: Tensor,
    reward_reject_E: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    reward_margin: bool = False,
) -> Loss:
    """Classify which of two rollouts was preferred by their log-ratios, one numerator a pair.

    `loss = −(1 − ε) log σ(x) − ε log σ(−x)`, `x = beta (Δ_chosen − Δ_reject)`, and with
    `reward_margin` less `(r_chosen − r_reject)`. Δ = new − reference log-prob summed over the
    trained ids (arXiv 2305.18290; the sum over the policy's ids of several turns is the token-level
    reading of arXiv 2404.12358). ε is `label_smoothing`: the share of preferences taken to be the
    wrong way round (conservative DPO, https://ericmitchell.ai/cdpo.pdf). A reward margin makes the
    policy exceed the reward's lead, in nats, before a pair counts as won.

    By hand: new [-10, -12], reference [-11, -11], rewards [1, 0.5], beta 0.5. Δ = [1, -1], x = 1:
    the loss is log(1 + e⁻¹) = 0.313262; with ε = 0.1 it is 0.9 · 0.313262 + 0.1 · 1.313262 =
    0.413262; with a margin x = 1 − 0.5, so it is log(1 + e^-0.5) = 0.474077. Where Δ = 0, as at
    the first update of a policy that is its own reference, it is log 2 without a margin.
    """
    reward_gap_E = reward_chosen_E.double() - reward_reject_E.double()
    x_E = beta * (delta_chosen_E.double() - delta_reject_E.double())
    if reward_margin:
        x_E = x_E - reward_gap_E
    loss_E = -(1 - label_smoothing) * F.logsigmoid(x_E) - label_smoothing * F.logsigmoid(-x_E)
    metrics = pair_metrics(delta_chosen_E, delta_reject_E, reward_gap_E)
    return Loss(loss_E, torch.ones_like(loss_E), metrics)


def pair_metrics(
    delta_chosen_E: Tensor, delta_reject_E: Tensor, reward_gap_E: Tensor
) -> dict[str, Tensor]:
    """Return what every loss of pairs reports; `sign_align`: the chosen log-ratio is the larger."""
    metrics = {
        "sign_align": (delta_chosen_E.double() > delta_reject_E.double()),
        "delta_chosen": delta_chosen_E,
        "delta_reject": delta_reject_E,
        "reward_gap": reward_gap_E,
    }
    return {name: value_E.detach().double() for name, value_E in metrics.items()}


def token_nll(logps_N: Tensor, owners_N: Tensor, members: int) -> Loss:
    """Give the negative log-likelihood of each rollout, weighted by its trained ids.

    The step's loss is then the mean over all of its trained ids. By hand: log-probs [-1, -2] of one
    rollout and [-6] of another give numerators [3, 6], weights [2, 1] and a loss of 9 / 3 = 3.
    """
    numerators_M = member_sums(-logps_N, owners_N, members)
    weights_M = member_sums(torch.ones_like(logps_N), owners_N, members)
    return Loss(numerators_M, weights_M, {})
