import math

import pytest

from pipeline.advantages import centred, normalised


def test_normalised_divides_by_the_unbiased_deviation() -> None:
    # mean 2, unbiased variance (1 + 0 + 1) / 2 = 1
    assert normalised([1.0, 2.0, 3.0]).tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001])


def test_normalised_pair() -> None:
    # mean 0.5, unbiased variance 0.25 + 0.25 = 0.5
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert normalised([0.0, 1.0]).tolist() == pytest.approx([-expected, expected])


def test_equal_rewards_and_a_lonely_rollout_have_no_advantage() -> None:
    assert normalised([3.0, 3.0]).tolist() == [0.0, 0.0]
    assert normalised([3.0]).tolist() == [0.0]


def test_centred_leaves_the_scale() -> None:
    assert centred([1.0, 2.0, 6.0]).tolist() == [-2.0, -1.0, 3.0]
