"""Log-probs of the trained ids equal the float64 reference, in value, gradient and memory."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from pipeline.errors import DataError
from pipeline.logprobs import MaskedLogprobs, _logit_shaper, check_head, chunked_logps
from pipeline.microbatches import collate
from tests import trainables

CPU = torch.device("cpu")


def reference(model: torch.nn.Module, strand: object, temperature: float) -> torch.Tensor:
    """Return log-probs from all logits of one unpadded row, in float64."""
    ids = torch.from_numpy(strand.ids.astype(np.int64))
    logits = model.double()(input_ids=ids[None]).logits[0].double()
    logps = torch.log_softmax(logits[:-1] / temperature, -1)
    chosen = logps.gather(-1, ids[1:, None])[:, 0]
    model.float()
    return chosen[torch.from_numpy(strand.mask[1:].astype(bool))]


def ours(policy: MaskedLogprobs, examples: list) -> torch.Tensor:
    return policy(*collate(examples, "apart", CPU).inputs)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_padded_rows_equal_the_float64_reference(tie: bool, temperature: float) -> None:
    model = trainables.tiny_model(seed=3, tie=tie)
    examples = trainables.examples(8)
    strands = [s for e in examples for s in e.strands.values()]

    found = ours(MaskedLogprobs(model, temperature), examples)

    expected = torch.cat([reference(model, s, temperature) for s in strands])
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kept", [0, 10_000])
def test_chunks_change_neither_values_nor_gradients(kept: int) -> None:
    examples = trainables.examples(6)
    results = []
    for chunk in (10_000, 7):
        model = trainables.tiny_model(seed=1)
        logps = ours(MaskedLogprobs(model, 0.8, chunk, kept), examples)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append([logps.detach(), *[p.grad for p in model.parameters()]])

    assert len(results[0][0]) > 3 * 7
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kept", "elements"), [(64, 64 * 1000), (63, 0)])
def test_no_more_logits_than_asked_for_are_kept_for_the_backward_pass(
    kept: int, elements: int
) -> None:
    head = torch.nn.Linear(8, 1000)
    hidden = torch.randn(64, 8, requires_grad=True)
    targets = torch.zeros(64, dtype=torch.long)
    seen: dict[int, int] = {}

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (16, 1000):
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    def logps_of(hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(head(hidden_CD), targets_C, reduction="none")

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        logps = chunked_logps(hidden, targets, 16, kept, logps_of)
        held = sum(seen.values())
    assert held == elements
    logps.sum().backward()
    assert hidden.grad is not None


def test_the_peak_of_memory_is_a_few_chunks_of_logits() -> None:
    # 4096 predictions over 32,000 ids are 524 MB of logits; a chunk of 128 is 16 MB.
    script = """
import resource, torch
from pipeline.logprobs import chosen_logps, chunked_logps
torch.set_num_threads(1)
head = torch.nn.Linear(8, 32_000, bias=False)
hidden = torch.randn(4096, 8, requires_grad=True)
targets = torch.zeros(4096, dtype=torch.long)
def logps_of(h, t):
    return chosen_logps(head(h).div_(0.8), t)
def pass_over(count):
    chunked_logps(hidden[:count], targets[:count], 128, 0, logps_of).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(pass_over(128), pass_over(4096))
"""
    # glibc would keep freed chunks that a small allocation has split.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env
    ).stdout
    one_chunk, all_chunks = map(float, printed.split())
    assert all_chunks - one_chunk < 80  # MB


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SimpleNamespace(), 8.0),
        (SimpleNamespace(logit_scale=0.25), 2.0),
        (SimpleNamespace(logits_scaling=4.0), 2.0),
        (SimpleNamespace(final_logit_softcapping=4.0), 4 * np.tanh(2.0)),
    ],
)
def test_what_architectures_do_to_logits(config: SimpleNamespace, expected: float) -> None:
    assert _logit_shaper(config)(torch.tensor(8.0)).item() == pytest.approx(expected)


def gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.05,
    )
    return Gemma2ForCausalLM(config).eval()


def test_check_head_accepts_what_it_knows_and_refuses_what_it_does_not() -> None:
    policy = MaskedLogprobs(gemma(), 1.0)
    check_head(policy)

    policy.shape_logits = lambda logits: logits
    with pytest.raises(DataError, match="Gemma2ForCausalLM"):
        check_head(policy)
