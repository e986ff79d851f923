"""Means, intervals and win-rates, worked by hand."""

import math

import numpy as np
import pytest

from pipeline.comparison import Estimate, compare, estimate, gained, scores_by_prompt
from pipeline.records import NO_SCORE


def test_estimate_by_hand():
    # sd of 0, 1, 1, 0 is sqrt(1/3); standard error sqrt(1/12) = .288675; x 1.959964 = .565793
    assert estimate(np.array([0.0, 1.0, 1.0, 0.0])) == Estimate(
        0.5, pytest.approx(0.565793, abs=1e-6), 4
    )


def test_missing_scores_are_left_out():
    result = estimate(np.array([np.nan, 2.0, 4.0]))
    assert (result.mean, result.prompts) == (3.0, 2)
    assert math.isnan(estimate(np.array([np.nan])).mean)
    assert math.isnan(estimate(np.array([1.0])).half_width)


def test_rollouts_of_one_prompt_are_averaged_first():
    scores = scores_by_prompt(
        [("a", [1.0, 2.0]), ("a", [3.0, NO_SCORE]), ("b", [None, 5.0]), ("c", None)], 3
    )
    np.testing.assert_array_equal(scores["a"], [2.0, 2.0, np.nan])
    np.testing.assert_array_equal(scores["b"], [np.nan, 5.0, np.nan])
    np.testing.assert_array_equal(scores["c"], [np.nan] * 3)


def test_win_rate_is_paired_and_ties_count_half():
    policy = scores_by_prompt([("a", [2.0]), ("b", [1.0]), ("c", [0.0]), ("x", [9.0])], 1)
    baseline = scores_by_prompt([("a", [1.0]), ("b", [1.0]), ("c", [1.0]), ("y", [0.0])], 1)
    (turn,) = compare(policy, baseline, 1)
    assert turn.win_rate.mean == 0.5
    assert turn.win_rate.prompts == 3
    assert turn.score.mean == 1.0  # 9.0 has no partner and stays out


def test_a_turn_that_only_one_has_counts_for_the_score_alone():
    policy = scores_by_prompt([("a", [1.0, 4.0])], 2)
    baseline = scores_by_prompt([("a", [0.0])], 2)
    _, second = compare(policy, baseline, 2)
    assert (second.score.mean, second.win_rate.prompts) == (4.0, 0)


def test_no_shared_prompt_gives_nothing():
    assert compare(scores_by_prompt([("a", [1.0])], 1), {}, 1) == []


def test_gained_needs_both_intervals():
    assert gained(Estimate(0.80, 0.01, 9), Estimate(0.83, 0.01, 9))
    assert not gained(Estimate(0.80, 0.02, 9), Estimate(0.83, 0.01, 9))
    assert not gained(Estimate(0.80, math.nan, 1), Estimate(0.9, 0.01, 9))
