"""What each of two ranks of FSDP2 holds; tests/test_distributed.py starts it with torchrun."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pipeline.logprobs import MaskedLogprobs
from pipeline.models import gather_weights
from pipeline.strategy import distribute, start, stop
from pipeline.training import gradients_sync
from tests import trainables

IDS = torch.tensor([[0, 7, 9, 200, 31, 5, 60, 61]])
SOURCES, TARGETS = torch.arange(7), IDS[0, 1:]


def main() -> None:
    """Assert each claim on this rank."""
    accelerator = start("bf16")
    model = trainables.tiny_model(seed=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    policy = MaskedLogprobs(model, 0.8)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy, optimizer = distribute(accelerator, policy, optimizer)

    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    assert {type(part).__name__ for part in parts} == {
        "FSDPMaskedLogprobs",
        "FSDPLlamaDecoderLayer",
    }
    assert len(parts) == 3, "the wrapper and its two layers"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for key, parameter in policy.named_parameters():
        whole = before[key.removeprefix("model.")]
        assert abs(2 * len(parameter.to_local()) - len(whole)) <= 1, key
        assert parameter.dtype == torch.float32

    outputs: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    logps_N = policy(IDS, SOURCES, TARGETS)
    assert outputs[0].dtype == torch.bfloat16
    assert logps_N.dtype == torch.float32
    assert not torch.equal(logps_N, logps_N.bfloat16().float()), "rounded to bf16"
    norm = passes(accelerator, policy)
    assert isinstance(norm, DTensor)

    weights = gather_weights(accelerator, policy, torch.float32)
    expected = set(before) - {"lm_head.weight"} if accelerator.is_main_process else set()
    assert set(weights) == expected
    assert all(torch.equal(weights[key], before[key]) for key in expected)
    assert torch.equal(policy(IDS, SOURCES, TARGETS), logps_N)
    print("every claim holds", flush=True)
    stop(accelerator)


def passes(accelerator: Any, policy: Any) -> Any:
    """Run two passes of one step; return the gradient norm. Gradients are sharded after each."""
    sums = []
    for last in (False, True):
        with gradients_sync(accelerator, policy, last):
            accelerator.backward(policy(IDS, SOURCES, TARGETS).sum())
        gradients = [parameter.grad for parameter in policy.parameters()]
        assert all(isinstance(gradient, DTensor) for gradient in gradients)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        sums.append([gradient.to_local().clone() for gradient in gradients])
    for one, two in zip(*sums, strict=True):
        torch.testing.assert_close(two, 2 * one)
    return accelerator.clip_grad_norm_(policy.parameters(), 1e9)


if __name__ == "__main__":
    main()
