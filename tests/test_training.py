"""One optimizer step: the same whatever the passes, exact on ragged batches, loud on NaN."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline.balance import Budget
from pipeline.errors import DataError
from pipeline.logprobs import MaskedLogprobs
from pipeline.losses import Loss, refuel, token_nll
from pipeline.microbatches import MicroBatch
from pipeline.packing import Example
from pipeline.preferences import differences
from pipeline.training import Trainer, evaluate, finite_norm, train_steps
from tests import trainables

ETA = 2.0


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def trainer(tokens: int = 4096, max_grad_norm: float = 0.0, eta: float = ETA) -> Trainer:
    accelerator = Accelerator(cpu=True)
    policy = MaskedLogprobs(trainables.tiny_model(seed=5), 0.8)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, betas=(0.9, 0.95))
    policy, optimizer = accelerator.prepare(policy, optimizer)
    return Trainer(
        accelerator,
        policy,
        optimizer,
        lambda logps_N, batch: refuel(*differences(logps_N, batch, "old_logprob"), eta),
        lambda example: 1.0,
        Budget(tokens),
        max_grad_norm,
    )


def weights(made: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.policy.parameters()])


def with_old(examples: list[Example], made: Trainer) -> list[Example]:
    """Give examples the log-probs that the policy has now."""
    from pipeline.logprob_rows import Scorer, logprobs

    found = dict(logprobs(Scorer(made.accelerator, made.policy, made.budget), examples))
    return [
        dataclasses.replace(
            example,
            strands={
                role: dataclasses.replace(s, numbers={"old_logprob": found[i][role]})
                for role, s in example.strands.items()
            },
        )
        for i, example in enumerate(examples)
    ]


def run(tokens: int, updates: list[list[int]], **settings: Any) -> tuple[list[dict], torch.Tensor]:
    made = trainer(tokens, **settings)
    examples = with_old(trainables.examples(12), made)
    return list(train_steps(made, examples, updates, lambda u: 1e-3)), weights(made)


def test_at_the_first_update_nothing_has_moved_and_the_loss_is_eta_squared_times_the_gap() -> None:
    made = trainer()
    examples = with_old(trainables.examples(12), made)
    gaps = [e.strands["chosen"].reward - e.strands["reject"].reward for e in examples]
    expected = ETA**2 * np.mean(np.square(gaps))

    before = evaluate(made, examples)
    (first,) = train_steps(made, examples, [range(12)], lambda u: 1e-3)

    for metrics in (before, first):
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
        assert abs(metrics["delta_chosen"]) < 1e-5
        assert abs(metrics["delta_reject"]) < 1e-5
        assert metrics["reward_gap"] == pytest.approx(np.mean(gaps))
    assert first["grad_norm"] > 0


def test_how_a_step_is_cut_into_passes_changes_nothing() -> None:
    updates = [list(range(8)), [8, 9, 10, 11, 0, 1, 2, 3], [4, 5, 6]]
    whole, whole_weights = run(100_000, updates)
    single, single_weights = run(1, updates)

    for a, b in zip(whole, single, strict=True):
        for name in ("loss", "grad_norm", "delta_chosen", "delta_reject", "reward_gap"):
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5), name
    torch.testing.assert_close(single_weights, whole_weights, rtol=0, atol=2e-5)
    assert (single_weights - weights(trainer())).abs().max() > 1e-3  # it did train


def test_a_ragged_last_batch_is_the_mean_over_what_is_in_it() -> None:
    made = trainer()
    examples = with_old(trainables.examples(12), made)
    gaps = [e.strands["chosen"].reward - e.strands["reject"].reward for e in examples]

    (metrics,) = train_steps(made, examples, [[3, 7, 11]], lambda u: 0.0)

    expected = ETA**2 * np.mean([gaps[i] ** 2 for i in (3, 7, 11)])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_gradient_equals_that_of_the_equation_written_out() -> None:
    made = trainer()
    examples = trainables.examples(3)
    model = trainables.tiny_model(seed=5)
    losses = []
    for example in examples:
        delta = {}
        for role, strand in example.strands.items():
            ids = torch.from_numpy(strand.ids.astype(np.int64))
            logps = torch.log_softmax(model(ids[None]).logits[0, :-1].double() / 0.8, -1)
            chosen = logps.gather(-1, ids[1:, None])[:, 0]
            delta[role] = (chosen * torch.from_numpy(strand.mask[1:])).sum() + strand.mask.sum()
        gap = example.strands["chosen"].reward - example.strands["reject"].reward
        losses.append((delta["chosen"] - delta["reject"] - ETA * gap) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    (metrics,) = train_steps(made, examples, [[0, 1, 2]], lambda u: 0.0)

    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    updates = [list(range(12))]
    (free,), _ = run(4096, updates)
    made = trainer(max_grad_norm=0.5)
    examples = with_old(trainables.examples(12), made)
    clipped = []
    made.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: clipped.append(
            torch.cat([p.grad.flatten() for p in made.policy.parameters()]).norm().item()
        )
    )

    (metrics,) = train_steps(made, examples, updates, lambda u: 1e-3)

    assert free["grad_norm"] > 0.5
    assert metrics["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-5)
    assert clipped == [pytest.approx(0.5, rel=1e-4)]


@pytest.mark.parametrize("tokens", [1, 4096], ids=["one pass each", "one pass"])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_prompts(
    tokens: int,
) -> None:
    made = trainer(tokens)
    examples = trainables.examples(4)
    for i in (0, 2):
        examples[i].strands["reject"].numbers["old_logprob"][0] = np.nan
    before, steps = weights(made), []
    made.optimizer.optimizer.register_step_pre_hook(lambda *_: steps.append(1))

    with pytest.raises(DataError, match=r"update 1: .* not finite for the prompts p000, p002\."):
        list(train_steps(made, examples, [range(4)], lambda u: 1e-3))

    assert torch.equal(weights(made), before)
    assert steps == []


def test_evaluation_names_the_prompts_whose_loss_is_not_finite() -> None:
    examples = trainables.examples(4)
    examples[3].strands["chosen"].numbers["old_logprob"][0] = np.inf

    with pytest.raises(DataError, match=r"evaluation: .* not finite for the prompts p003\."):
        evaluate(trainer(), examples)


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    made = trainer()

    def steep(logps_N: torch.Tensor, batch: MicroBatch) -> Loss:
        loss = made.loss(logps_N, batch)
        zero = (logps_N - logps_N.detach()).abs().sum().sqrt()  # its slope at 0 is infinite
        return Loss(loss.numerators + zero, loss.weights, loss.metrics)

    before = weights(made)

    with pytest.raises(DataError, match=r"update 2: the gradient norm is nan\."):
        list(
            train_steps(
                dataclasses.replace(made, loss=steep),
                trainables.examples(4),
                [range(2), range(2, 4)],
                lambda u: 1e-3,
                done=1,
            )
        )

    assert torch.equal(weights(made), before)


@pytest.mark.parametrize("norm", [-1.0, float("inf")])
def test_a_norm_that_deepspeed_gives_for_overflow_is_refused(norm: float) -> None:
    with pytest.raises(DataError, match=f"update 7: the gradient norm is {norm}"):
        finite_norm(norm, 7)


def test_padding_and_examples_are_told() -> None:
    made = dataclasses.replace(trainer(), budget=Budget(10_000, layout="apart"))
    examples = trainables.examples(6)
    read = [len(s.ids) - 1 for e in examples for s in e.strands.values()]

    one, other = train_steps(made, examples, [range(6), range(2)], lambda u: 1e-3)

    assert one["padding_share"] == pytest.approx(1 - sum(read) / (len(read) * max(read)))
    assert (one["examples_seen"], other["examples_seen"]) == (6, 8)
    flat = dataclasses.replace(trainer(), budget=Budget(10_000, layout="chains"))
    (packed,) = train_steps(flat, examples, [range(6)], lambda u: 1e-3)
    assert packed["padding_share"] == 0


def test_sft_divides_by_all_trained_ids_of_the_step() -> None:
    made = dataclasses.replace(
        trainer(tokens=1),
        loss=lambda logps_N, batch: token_nll(logps_N, batch.owners_N, len(batch.rewards_M)),
        weigh=lambda example: example.trained,
    )
    examples = [
        Example(e.prompt_id, {"response": e.strands["chosen"]}) for e in trainables.examples(5)
    ]
    model = trainables.tiny_model(seed=5)
    logps = []
    for example in examples:
        strand = example.strands["response"]
        ids = torch.from_numpy(strand.ids.astype(np.int64))
        rows = torch.log_softmax(model(ids[None]).logits[0, :-1].double() / 0.8, -1)
        chosen = rows.gather(-1, ids[1:, None])[:, 0]
        logps.append(chosen[torch.from_numpy(strand.mask[1:].astype(bool))])

    (metrics,) = train_steps(made, examples, [range(5)], lambda u: 0.0)

    assert metrics["loss"] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-5)
