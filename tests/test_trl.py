"""DPO against TRL's DPOTrainer: its own loss and log-prob code, on the same ids, in float32.

TRL's mask covers the whole completion, so pairs whose last turn alone trains are compared, at
temperature 1. https://huggingface.co/docs/trl/dpo_trainer
"""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from pipeline.balance import Budget
from pipeline.logprob_rows import Scorer, logprobs
from pipeline.logprobs import MaskedLogprobs
from pipeline.losses import dpo
from pipeline.microbatches import collate
from pipeline.packing import Example, Layout, Strand
from pipeline.preferences import differences
from pipeline.probe import IMPLEMENTATION
from pipeline.records import Segment
from tests import trainables

BETA = 0.3


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def trl_trainer(folder: Path, loss_type: str, label_smoothing: float) -> Any:
    """Return a DPOTrainer of a tiny policy and another reference; it never trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

    # It insists on a dataset of texts; the ids that are compared are given to its collator.
    texts = {"prompt": ["a guess"] * 2, "chosen": ["higher"] * 2, "rejected": ["lower"] * 2}
    settings = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        loss_type=[loss_type],
        label_smoothing=label_smoothing,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
    )
    return DPOTrainer(
        model=trainables.tiny_model(seed=1, tie=False),
        ref_model=trainables.tiny_model(seed=2, tie=False),
        args=settings,
        train_dataset=Dataset.from_dict(texts),
        processing_class=trainables.tokenizer(),
    )


def drawn_pairs(count: int) -> list[dict[str, list[int]]]:
    """Return pairs in TRL's own format: ids of a prompt and of two completions."""
    rng = np.random.default_rng(3)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(5, 250, int(rng.integers(low, high))).tolist()

    return [
        {"prompt_ids": ids(2, 40), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 12)}
        for _ in range(count)
    ]


def as_example(pair: dict[str, list[int]], i: int, old: dict[str, np.ndarray]) -> Example:
    """Return the same pair as ours, with reference log-probs."""
    strands = {}
    for side, key in (("chosen", "chosen_ids"), ("reject", "rejected_ids")):
        ids = np.array(pair["prompt_ids"] + pair[key], dtype=np.int32)
        mask = (np.arange(len(ids)) >= len(pair["prompt_ids"])).astype(np.uint8)
        numbers = {"ref_logprob": old[side]} if old else {}
        strands[side] = Strand(ids, mask, [Segment(0, len(ids), 0)], 0.0, numbers)
    return Example(f"p{i}", strands)


def with_reference(pairs: list[dict[str, list[int]]]) -> list[Example]:
    """Score the pairs by the reference model, packed, as the stage does."""
    accelerator = Accelerator(cpu=True)
    policy = accelerator.prepare(MaskedLogprobs(trainables.tiny_model(seed=2, tie=False), 1.0))
    bare = [as_example(pair, i, {}) for i, pair in enumerate(pairs)]
    found = dict(logprobs(Scorer(accelerator, policy, Budget(256, layout="dense")), bare))
    return [as_example(pair, i, found[i]) for i, pair in enumerate(pairs)]


def our_gradients(
    examples: list[Example], layout: Layout, label_smoothing: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of the pairs and the gradient of every parameter."""
    model = trainables.tiny_model(seed=1, tie=False)
    if layout in IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION[layout])
    batch = collate(examples, layout, torch.device("cpu"))
    logps_N = MaskedLogprobs(model, 1.0)(*batch.inputs)
    loss = dpo(*differences(logps_N, batch, "ref_logprob"), BETA, label_smoothing)
    mean = loss.numerators.sum() / loss.weights.sum()
    mean.backward()
    return mean.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["apart", "dense", "chains"])
def test_loss_and_every_gradient_equal_trls(tmp_path: Path, layout: Layout) -> None:
    pairs = drawn_pairs(6)
    ours, gradients = our_gradients(with_reference(pairs), layout, 0.0)

    trainer = trl_trainer(tmp_path, "sigmoid", 0.0)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(copy.deepcopy(pairs)))
    loss.backward()

    assert abs(loss.item() - np.log(2)) > 0.01, "a reference that differs from the policy"
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    assert_equal_gradients(gradients, trainer.model)


def test_label_smoothing_equals_trls(tmp_path: Path) -> None:
    """Its sigmoid loss has none any more; its `aot` loss of a single pair is the smoothed one.

    AOT sorts the log-ratios of a batch, which changes nothing where there is only one.
    """
    pairs = drawn_pairs(3)
    examples = with_reference(pairs)
    trainer = trl_trainer(tmp_path, "aot", 0.2)
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator([p])) for p in pairs]
    mean = sum(losses) / 3
    mean.backward()

    ours, gradients = our_gradients(examples, "dense", 0.2)

    assert ours == pytest.approx(mean.item(), rel=1e-5)
    assert ours != pytest.approx(our_gradients(examples, "dense", 0.0)[0], rel=1e-3)
    assert_equal_gradients(gradients, trainer.model)


def assert_equal_gradients(ours: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 1e-4, f"{name} has a gradient to compare"
        difference = float((ours[name] - gradient).norm() / gradient.norm())
        assert difference < 1e-5, (name, difference)


def test_reference_log_probs_add_up_to_trls(tmp_path: Path) -> None:
    pairs = drawn_pairs(6)
    ours = {
        side: [float(e.strands[side].numbers["ref_logprob"].sum()) for e in with_reference(pairs)]
        for side in ("chosen", "reject")
    }

    trainer = trl_trainer(tmp_path, "sigmoid", 0.0)
    batch = trainer.data_collator(copy.deepcopy(pairs))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)

    assert ours["chosen"] == pytest.approx(chosen.tolist(), rel=1e-5)
    assert ours["reject"] == pytest.approx(rejected.tolist(), rel=1e-5)
