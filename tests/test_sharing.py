"""Rows with shared prefixes give what separate rows give: log-probs, loss, every gradient."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from pipeline.logprobs import MaskedLogprobs
from pipeline.packing import Example, Strand, collate, rows_of, share, widths
from pipeline.probe import why_not_share
from pipeline.records import Segment
from tests import trainables

CPU = torch.device("cpu")
ACCELERATOR = SimpleNamespace(device=CPU, mixed_precision="no", unwrap_model=lambda policy: policy)


def strand(ids: list[int], trained: list[int]) -> Strand:
    mask = np.isin(np.arange(len(ids)), trained).astype(np.uint8)
    return Strand(np.array(ids, dtype=np.int32), mask, [Segment(0, len(ids), 0)])


def test_members_are_branches_after_their_common_ids() -> None:
    #         1 2 3 [4 5]  and  1 2 3 [6] : b's first id is predicted from the prefix's last
    pair = Example("p", {"a": strand([1, 2, 3, 4, 5], [3, 4]), "b": strand([1, 2, 3, 6], [3])})

    shared = share(pair)
    (row,) = rows_of(shared)

    assert shared.shared == 3
    assert row.ids.tolist() == [1, 2, 3, 4]  # the last ids of a and b are targets only
    assert row.sources.tolist() == [2, 3, 2]
    assert row.targets.tolist() == [4, 5, 6]
    assert row.owners.tolist() == [0, 0, 1]
    assert row.branches.tolist() == [0, 0, 0, 1]
    assert row.positions.tolist() == [0, 1, 2, 3]
    assert widths([shared]) == [(1, 4)]


def test_no_branch_sees_another_and_nothing_sees_padding() -> None:
    pair = Example(
        "p", {"a": strand([1, 2, 4, 5, 7], [2, 3, 4]), "b": strand([1, 2, 6, 8], [2, 3])}, shared=2
    )
    long = Example("q", {"a": strand([1, 2, 3, 4, 5, 6, 7], [6])})

    sees = collate([pair, long], CPU).sees_B1TT[:, 0].int().tolist()

    assert sees[0] == [
        # 1 2 4 5 6 pad
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert sees[1] == torch.ones(6, 6).tril().int().tolist()


def test_little_in_common_and_rewritten_contexts_stay_apart() -> None:
    apart = Example("p", {"a": strand([1, 2, 3, 4, 5], [3, 4]), "b": strand([1, 9, 8, 6], [3])})
    cut = Strand(
        np.array([1, 2, 3, 4], dtype=np.int32),
        np.array([0, 0, 0, 1], dtype=np.uint8),
        [Segment(0, 2, 0), Segment(2, 2, 2)],
    )
    assert share(apart).shared == 0
    assert share(Example("p", {"a": cut, "b": cut})).shared == 0
    assert share(Example("p", {"a": strand([1, 2, 3], [2])})).shared == 0


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
        examples.append(Example(f"p{i}", strands, shared=len(prefix)))
    return examples


def measured(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """Return the log-probs and the gradients of a loss that treats every id differently."""
    model.zero_grad()
    batch = collate(examples, CPU)
    logps_N = MaskedLogprobs(model, 0.8)(*batch.inputs)
    weights_N = torch.sin(batch.targets_N.double() + batch.owners_N)
    (logps_N.double() * weights_N).sum().square().backward()
    return [logps_N.detach(), *[p.grad.clone() for p in model.parameters()]]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_shared_prefixes_change_no_log_prob_and_no_gradient(
    architecture: str, tie: bool, attn: str
) -> None:
    model = trainables.tiny_model(seed=3, tie=tie) if architecture == "llama" else qwen(tie)
    model.set_attn_implementation(attn)
    for seed in range(3):
        together = forked(seed)
        apart = [Example(e.prompt_id, e.strands) for e in together]
        assert any(e.shared for e in together)
        batch, reference = collate(together, CPU), collate(apart, CPU)
        assert torch.equal(batch.targets_N, reference.targets_N)
        assert torch.equal(batch.owners_N, reference.owners_N)
        assert batch.tokens < reference.tokens

        found, expected = measured(model, together), measured(model, apart)

        assert (found[0] - expected[0]).abs().max() < 1e-5
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9


def test_the_probe_accepts_llama_and_refuses_windows_and_kernels_without_a_mask() -> None:
    policy = MaskedLogprobs(trainables.tiny_model(), 0.8)
    assert why_not_share(ACCELERATOR, policy) is None

    policy.config._attn_implementation = "flash_attention_2"
    assert why_not_share(ACCELERATOR, policy) == "flash_attention_2 takes no mask of branches"

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
    gemma = MaskedLogprobs(Gemma3ForCausalLM(config).eval(), 0.8)
    assert why_not_share(ACCELERATOR, gemma) == "its attention has a sliding window"


def test_the_probe_sees_a_model_that_ignores_positions_and_branches() -> None:
    policy = MaskedLogprobs(trainables.tiny_model(), 0.8)
    backbone = policy.model.model.forward

    def plain(input_ids: torch.Tensor, **_: Any) -> Any:
        return backbone(input_ids=input_ids, use_cache=False)

    policy.model.model.forward = plain

    assert "log-probs differ by" in (why_not_share(ACCELERATOR, policy) or "")
