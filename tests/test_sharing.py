"""Packed rows give what separate rows give: log-probs, loss, every gradient."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from pipeline.attention import dense_mask
from pipeline.logprobs import MaskedLogprobs
from pipeline.microbatches import collate
from pipeline.packing import Branch, Example, Layout, Strand
from pipeline.probe import IMPLEMENTATION, choose_layout
from pipeline.records import Segment
from tests import trainables

CPU = torch.device("cpu")


def accelerator(said: list[str] | None = None) -> Any:
    """Return what the probe needs of accelerate, on one process."""
    return SimpleNamespace(
        device=CPU,
        mixed_precision="no",
        unwrap_model=lambda policy: policy,
        reduce=lambda tensor, reduction: tensor,
        print=lambda text: said.append(text) if said is not None else None,
    )


def strand(ids: list[int], trained: list[int]) -> Strand:
    mask = np.isin(np.arange(len(ids)), trained).astype(np.uint8)
    return Strand(np.array(ids, dtype=np.int32), mask, [Segment(0, len(ids), 0)])


def test_no_branch_sees_another_and_nothing_sees_padding() -> None:
    rows = [
        (Branch(0, 4), Branch(4, 5, ((0, 2),)), Branch(5, 6, ((0, 2), (1, 1)))),
        (Branch(0, 3),),
    ]

    sees = dense_mask(rows, 7, CPU)[:, 0].int().tolist()

    assert sees[0] == [
        # 0 1 2 3 4 5 pad
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert sees[1][:3] == [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert sees[1][6] == [0, 0, 0, 1, 1, 1, 1]


def qwen(tie: bool) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tie,
    )
    return Qwen3ForCausalLM(config).eval()


def forked(seed: int) -> list[Example]:
    """Return groups of 2 to 8 that fork anywhere, some with trained ids inside the prefix."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(6):
        prefix = rng.integers(5, 250, int(rng.integers(0, 20)) if i else 0)
        strands = {}
        for k in range(int(rng.integers(2, 9))):
            tail = int(rng.integers(1, 8)) if len(prefix) else int(rng.integers(2, 8))
            ids = [*prefix.tolist(), *rng.integers(5, 250, tail).tolist()]
            trained = list(range(max(1, len(prefix)), len(ids)))
            trained += [p for p in (2, 5) if p < len(prefix) and i % 2]
            strands[str(k)] = strand(ids, trained)
        examples.append(Example(f"p{i}", strands))
    return examples


def rewritten(seed: int) -> list[Example]:
    """Return pairs of several segments: each drops the end of the context before it."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(4):
        prefix, strands = rng.integers(5, 250, 12), {}
        for role in ("chosen", "reject"):
            lengths = [int(n) for n in rng.integers(4, 10, 3)]
            own = rng.integers(5, 250, sum(lengths))
            ids = np.concatenate([prefix, own]).astype(np.int32)
            segments, start, seen = (
                [Segment(0, 12 + lengths[0], 0)],
                12 + lengths[0],
                12 + lengths[0],
            )
            for length in lengths[1:]:
                keep = int(rng.integers(8, seen))
                segments.append(Segment(start, length, keep))
                start, seen = start + length, keep + length
            mask = (rng.random(len(ids)) < 0.5).astype(np.uint8)
            mask[:3], mask[-1] = 0, 1
            strands[role] = Strand(ids, mask, segments)
        examples.append(Example(f"r{i}", strands))
    return examples


def measured(model: Any, examples: list[Example], layout: Layout) -> list[torch.Tensor]:
    """Return the log-probs and the gradients of a loss that treats every id differently."""
    model.zero_grad()
    batch = collate(examples, layout, CPU)
    logps_N = MaskedLogprobs(model, 0.8)(*batch.inputs)
    weights_N = torch.sin(batch.targets_U[batch.copies_N].double() + batch.owners_N)
    (logps_N.double() * weights_N).sum().square().backward()
    return [logps_N.detach(), *[p.grad.clone() for p in model.parameters()]]


@pytest.mark.parametrize(
    ("layout", "attn"), [("chains", "sdpa"), ("dense", "sdpa"), ("dense", "eager")]
)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packing_changes_no_log_prob_and_no_gradient(
    architecture: str, tie: bool, layout: Layout, attn: str
) -> None:
    model = trainables.tiny_model(seed=3, tie=tie) if architecture == "llama" else qwen(tie)
    for examples in (forked(0), forked(1), forked(2), rewritten(3)):
        model.set_attn_implementation(attn)
        expected = measured(model, examples, "apart")
        model.set_attn_implementation(IMPLEMENTATION.get(layout, attn))
        batch, apart = collate(examples, layout, CPU), collate(examples, "apart", CPU)
        assert torch.equal(batch.targets_U[batch.copies_N], apart.targets_U[apart.copies_N])
        assert torch.equal(batch.owners_N, apart.owners_N)
        assert batch.tokens < apart.tokens

        found = measured(model, examples, layout)

        assert (found[0] - expected[0]).abs().max() < 1e-5
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_flex_rows_have_the_log_probs_of_separate_rows(architecture: str) -> None:
    model = trainables.tiny_model(seed=3) if architecture == "llama" else qwen(True)
    policy = MaskedLogprobs(model, 0.8)
    for examples in (forked(0), rewritten(3)):
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            expected = policy(*collate(examples, "apart", CPU).inputs)
            model.set_attn_implementation("flex_attention")
            found = policy(*collate(examples, "flex", CPU).inputs)
        assert (found - expected).abs().max() < 1e-5


def test_without_chains_the_attention_of_chains_is_causal() -> None:
    model, examples = qwen(True), forked(0)
    expected = measured(model, examples, "apart")
    model.set_attn_implementation(IMPLEMENTATION["chains"])
    for one, other in zip(measured(model, examples, "apart"), expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9


def test_the_probe_accepts_llama_and_sets_the_attention_that_the_layout_needs() -> None:
    policy = MaskedLogprobs(trainables.tiny_model(), 0.8)
    assert choose_layout(accelerator(), policy, ["chains", "dense"]) == "chains"
    assert policy.config._attn_implementation == IMPLEMENTATION["chains"]
    policy.model.set_attn_implementation("sdpa")
    assert choose_layout(accelerator(), policy, ["dense"]) == "dense"
    assert policy.config._attn_implementation == "sdpa"
    assert choose_layout(accelerator(), policy, []) == "apart"


def test_the_probe_refuses_kernels_without_a_mask() -> None:
    said: list[str] = []
    policy = MaskedLogprobs(trainables.tiny_model(), 0.8)
    policy.config._attn_implementation = "flash_attention_2"
    policy.model.set_attn_implementation = lambda name: None
    assert choose_layout(accelerator(said), policy, ["dense"]) == "apart"
    assert said == ["no packing by dense: flash_attention_2 takes no mask of branches"]


def test_windows_are_not_packed() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
    )
    said: list[str] = []
    gemma = MaskedLogprobs(Gemma3ForCausalLM(config).eval(), 0.8)
    assert choose_layout(accelerator(said), gemma, ["chains", "dense"]) == "apart"
    assert said[0] == "no packing by chains: the model's attention has a sliding window"
    assert gemma.config._attn_implementation == "sdpa"


def test_the_probe_sees_a_model_that_ignores_positions_and_branches() -> None:
    said: list[str] = []
    policy = MaskedLogprobs(trainables.tiny_model(), 0.8)
    backbone = policy.model.model.forward

    def plain(input_ids: torch.Tensor, **_: Any) -> Any:
        return backbone(input_ids=input_ids, use_cache=False)

    policy.model.model.forward = plain

    assert choose_layout(accelerator(said), policy, ["dense", "chains"]) == "apart"
    assert [text.partition(": ")[0] for text in said] == [
        "no packing by dense",
        "no packing by chains",
    ]
    assert "log-probs differ by" in said[0]


def test_the_probe_sees_a_model_that_takes_no_chains() -> None:
    said: list[str] = []
    policy = MaskedLogprobs(trainables.tiny_model(), 0.8)
    backbone = policy.model.model.forward

    def strict(input_ids: Any, position_ids: Any, use_cache: bool, attention_mask: Any) -> Any:
        return backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=use_cache,
            attention_mask=attention_mask,
        )

    policy.model.model.forward = strict

    assert choose_layout(accelerator(said), policy, ["chains", "dense"]) == "dense"
    assert "TypeError" in said[0]
