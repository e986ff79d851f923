"""Losses against numbers worked by hand, and what must not change them."""

import math

import numpy as np
import pytest
import torch

from pipeline.logprobs import MaskedLogprobs
from pipeline.losses import dpo, member_sums, refuel, token_nll
from pipeline.microbatches import collate
from tests import trainables


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("eta", "expected"), [(1.0, 2.25), (1000.0, 248004.0)])
def test_refuel_equals_the_oracle_worked_by_hand(eta: float, expected: float) -> None:
    new, old = doubles(-10, -12), doubles(-11, -11)
    delta = new - old

    loss = refuel(delta[:1], delta[1:], doubles(1.0), doubles(0.5), eta)

    assert loss.numerators.tolist() == [expected]
    assert loss.weights.tolist() == [1.0]
    assert {name: value.tolist() for name, value in loss.metrics.items()} == {
        "sign_align": [1.0],
        "delta_chosen": [1.0],
        "delta_reject": [-1.0],
        "reward_gap": [0.5],
    }


def test_refuel_gradient_is_twice_the_residual_with_opposite_signs() -> None:
    chosen, reject = doubles(1.0).requires_grad_(), doubles(-1.0).requires_grad_()

    refuel(chosen, reject, doubles(1.0), doubles(0.5), 1.0).numerators.sum().backward()

    assert (chosen.grad.item(), reject.grad.item()) == (3.0, -3.0)


def drawn(seed: int) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.normal(size=16) * 10) for _ in range(4))


@pytest.mark.parametrize("seed", range(5))
def test_refuel_ignores_a_constant_in_both_rewards_and_which_side_is_called_chosen(
    seed: int,
) -> None:
    delta_c, delta_r, reward_c, reward_r = drawn(seed)
    loss = refuel(delta_c, delta_r, reward_c, reward_r, 1.7).numerators

    shifted = refuel(delta_c, delta_r, reward_c + 3, reward_r + 3, 1.7).numerators
    swapped = refuel(delta_r, delta_c, reward_r, reward_c, 1.7).numerators

    torch.testing.assert_close(shifted, loss, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(swapped, loss, rtol=0, atol=0)


def test_refuel_without_a_change_of_policy_is_eta_squared_times_the_squared_reward_gap() -> None:
    _, _, reward_c, reward_r = drawn(0)
    nothing = torch.zeros(16, dtype=torch.float64)

    loss = refuel(nothing, nothing, reward_c, reward_r, 2.5)

    expected = 2.5**2 * (reward_c - reward_r).square()
    torch.testing.assert_close(loss.numerators, expected, rtol=1e-15, atol=0)
    assert loss.metrics["sign_align"].sum() == 0


@pytest.mark.parametrize(
    ("label_smoothing", "reward_margin", "expected"),
    [(0.0, False, 0.313262), (0.1, False, 0.413262), (0.0, True, 0.474077)],
)
def test_dpo_equals_the_numbers_worked_by_hand(
    label_smoothing: float, reward_margin: bool, expected: float
) -> None:
    new, reference = doubles(-10, -12), doubles(-11, -11)
    delta = new - reference

    loss = dpo(
        delta[:1], delta[1:], doubles(1.0), doubles(0.5), 0.5, label_smoothing, reward_margin
    )

    assert loss.numerators.tolist() == pytest.approx([expected], abs=5e-7)
    assert loss.weights.tolist() == [1.0]
    assert {name: value.tolist() for name, value in loss.metrics.items()} == {
        "sign_align": [1.0],
        "delta_chosen": [1.0],
        "delta_reject": [-1.0],
        "reward_gap": [0.5],
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reward_margin", [False, True])
def test_dpo_ignores_a_constant_in_both_rewards(seed: int, reward_margin: bool) -> None:
    delta_c, delta_r, reward_c, reward_r = drawn(seed)

    loss = dpo(delta_c, delta_r, reward_c, reward_r, 0.1, 0.2, reward_margin).numerators
    shifted = dpo(delta_c, delta_r, reward_c + 3, reward_r + 3, 0.1, 0.2, reward_margin).numerators

    torch.testing.assert_close(shifted, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reward_margin", [False, True])
def test_dpo_of_swapped_sides_is_that_of_minus_x(seed: int, reward_margin: bool) -> None:
    # −log σ(−x) = −log σ(x) + x, and with half of the labels smoothed the sides are alike.
    delta_c, delta_r, reward_c, reward_r = drawn(seed)
    x = 0.1 * (delta_c - delta_r) - (reward_c - reward_r if reward_margin else 0.0)

    loss = dpo(delta_c, delta_r, reward_c, reward_r, 0.1, 0.0, reward_margin).numerators
    swapped = dpo(delta_r, delta_c, reward_r, reward_c, 0.1, 0.0, reward_margin).numerators
    even = [
        dpo(*sides, 0.1, 0.5, reward_margin).numerators
        for sides in (
            (delta_c, delta_r, reward_c, reward_r),
            (delta_r, delta_c, reward_r, reward_c),
        )
    ]

    torch.testing.assert_close(swapped, loss + x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(even[0], even[1], rtol=1e-12, atol=1e-12)


def test_dpo_of_a_policy_that_is_its_own_reference_is_log_2() -> None:
    _, _, reward_c, reward_r = drawn(0)
    nothing = torch.zeros(16, dtype=torch.float64)

    loss = dpo(nothing, nothing, reward_c, reward_r, 0.3, 0.1)

    assert loss.numerators.tolist() == pytest.approx([math.log(2)] * 16, rel=1e-15)
    assert loss.metrics["sign_align"].sum() == 0


def test_dpo_gradient_is_beta_times_the_doubt_with_opposite_signs() -> None:
    chosen, reject = doubles(1.0).requires_grad_(), doubles(-1.0).requires_grad_()

    dpo(chosen, reject, doubles(1.0), doubles(0.5), 0.5).numerators.sum().backward()

    doubt = 0.5 / (1 + math.e)  # beta σ(−x), x = 1
    assert (chosen.grad.item(), reject.grad.item()) == pytest.approx((-doubt, doubt), rel=1e-14)


@pytest.mark.parametrize("sure", [-1e4, 1e4])
def test_dpo_of_very_unlike_rollouts_stays_finite(sure: float) -> None:
    loss = dpo(doubles(sure), doubles(0.0), doubles(1.0), doubles(0.0), 1.0, 0.1)

    assert loss.numerators.tolist() == pytest.approx([9e3 if sure < 0 else 1e3])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["refuel", "dpo"])
def test_temperature_enters_new_and_earlier_log_probs_alike(name: str, temperature: float) -> None:
    # So a policy that hasn't moved has Δ = 0 at every temperature, and a moved one has the Δ of
    # the tempered distributions, computed here from whole logits.
    before, after = (trainables.tiny_model(seed=seed).double() for seed in (1, 2))
    examples = trainables.examples(4)
    batch = collate(examples, "apart", torch.device("cpu"))
    old_N, same_N, new_N = (
        MaskedLogprobs(model, temperature)(*batch.inputs).detach()
        for model in (before, before, after)
    )
    expected = [
        tempered(after, strand, temperature) - tempered(before, strand, temperature)
        for example in examples
        for strand in example.strands.values()
    ]

    def sums(earlier_N: torch.Tensor, later_N: torch.Tensor) -> torch.Tensor:
        return member_sums(later_N.double() - earlier_N, batch.owners_N, len(batch.rewards_M))

    loss_of = {"refuel": lambda *args: refuel(*args, 1.0), "dpo": lambda *args: dpo(*args, 0.1)}
    losses = [
        loss_of[name](delta_M[::2], delta_M[1::2], batch.rewards_M[::2], batch.rewards_M[1::2])
        for delta_M in (sums(old_N, same_N), sums(old_N, new_N))
    ]

    assert losses[0].metrics["delta_chosen"].abs().max() == 0
    assert losses[1].metrics["delta_chosen"].tolist() == pytest.approx(expected[::2], abs=1e-4)
    assert losses[1].metrics["delta_reject"].tolist() == pytest.approx(expected[1::2], abs=1e-4)


@torch.no_grad()
def tempered(model: torch.nn.Module, strand: trainables.Strand, temperature: float) -> float:
    """Return the summed log-prob of the masked ids under softmax(logits / temperature)."""
    ids = torch.from_numpy(strand.ids).long()
    logps = torch.log_softmax(model(ids[None]).logits[0, :-1].double() / temperature, -1)
    chosen = logps.gather(-1, ids[1:, None])[:, 0]
    return float(chosen[torch.from_numpy(strand.mask[1:]).bool()].sum())


def test_member_sums_add_in_float64() -> None:
    # In float32 the 1 would vanish beside 2^25.
    values = torch.tensor([2.0**25, 1.0, 5.0], dtype=torch.float32)

    assert member_sums(values, torch.tensor([0, 0, 2]), 3).tolist() == [2.0**25 + 1, 0.0, 5.0]


def test_token_nll_weighs_rollouts_by_their_trained_ids() -> None:
    loss = token_nll(torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([0, 0, 1]), 2)

    assert loss.numerators.tolist() == [3.0, 6.0]
    assert loss.weights.tolist() == [2.0, 1.0]
    assert (loss.numerators.sum() / loss.weights.sum()).item() == 3.0
