"""REFUEL and SFT losses against numbers worked by hand, and what must not change them."""

import numpy as np
import pytest
import torch

from pipeline.losses import member_sums, refuel, token_nll


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


def test_member_sums_add_in_float64() -> None:
    # In float32 the 1 would vanish beside 2^25.
    values = torch.tensor([2.0**25, 1.0, 5.0], dtype=torch.float32)

    assert member_sums(values, torch.tensor([0, 0, 2]), 3).tolist() == [2.0**25 + 1, 0.0, 5.0]


def test_token_nll_weighs_rollouts_by_their_trained_ids() -> None:
    loss = token_nll(torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([0, 0, 1]), 2)

    assert loss.numerators.tolist() == [3.0, 6.0]
    assert loss.weights.tolist() == [2.0, 1.0]
    assert (loss.numerators.sum() / loss.weights.sum()).item() == 3.0
