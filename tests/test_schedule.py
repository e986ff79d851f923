"""The learning rate of an update, and which examples it sees."""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.schedule import lr_at, plan_updates


def test_lr_warms_up_to_the_peak_and_falls_as_a_cosine() -> None:
    rates = [lr_at(u, 10, 1.0, 0.2) for u in range(1, 11)]

    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.5)  # half of the eight that follow the warm-up
    assert rates[9] == pytest.approx(0.5 * (1 + np.cos(np.pi * 7 / 8)))
    assert all(a > b for a, b in pairwise(rates[2:]))


def test_lr_without_warm_up_starts_at_the_peak_and_never_is_zero() -> None:
    assert lr_at(1, 1, 3e-7, 0.0) == 3e-7
    assert lr_at(1, 500, 3e-7, 0.0) == 3e-7
    assert 0 < lr_at(500, 500, 3e-7, 0.1) < 1e-11
    assert lr_at(1, 500, 3e-7, 0.1) == pytest.approx(3e-7 / 51)


def test_every_epoch_sees_every_example_once_and_keeps_its_ragged_last_batch() -> None:
    updates = plan_updates(examples=10, batch_size=4, total=20, run_seed=1)

    assert [len(u) for u in updates] == [4, 4, 2, 4, 4, 2]
    for epoch in (updates[:3], updates[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert not np.array_equal(np.concatenate(updates[:3]), np.concatenate(updates[3:]))


def test_total_counts_examples_and_cuts_the_last_epoch() -> None:
    assert [len(u) for u in plan_updates(10, 4, 13, 1)] == [4, 4, 2, 3]
    assert [len(u) for u in plan_updates(10, 64, 7, 1)] == [7]


def test_order_depends_on_the_seed_only() -> None:
    first, again, other = (np.concatenate(plan_updates(50, 8, 50, s)) for s in (7, 7, 8))
    np.random.default_rng(0).random()

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
