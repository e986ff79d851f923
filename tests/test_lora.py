"""Adapters train in place of the weights, and a saved model has them merged."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline.adapters import add_adapters, merged
from pipeline.balance import Budget
from pipeline.errors import DataError
from pipeline.logprobs import MaskedLogprobs
from pipeline.losses import refuel
from pipeline.models import gather_weights, write_folder
from pipeline.packing import Layout
from pipeline.preferences import differences
from pipeline.start import TrainConfig, prepare
from pipeline.training import Trainer, train_steps
from stages.refuel import Config, Refuel, Task, main
from tests import trainables

pytest.importorskip("peft", reason="needs the lora extra")

IDS = torch.tensor([[0, 7, 9, 200, 31, 5]])
SOURCES, TARGETS = torch.arange(5), IDS[0, 1:]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def adapted(tie: bool = True, rank: int = 4, targets: str = "all-linear", seed: int = 1) -> Any:
    """Return a tiny model with adapters, moved away from 0 as training would."""
    model = trainables.tiny_model(seed=2, tie=tie)
    add_adapters(model, rank, 16, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def logps(model: Any) -> Tensor:
    with torch.no_grad():
        return MaskedLogprobs(model, 0.8)(IDS, SOURCES, TARGETS)


def prepared(model: Any) -> tuple[Any, Any]:
    accelerator = Accelerator(cpu=True)
    return accelerator, accelerator.prepare(MaskedLogprobs(model, 0.8))


def test_before_its_first_update_the_adapted_policy_is_the_base() -> None:
    base, model = trainables.tiny_model(seed=2), trainables.tiny_model(seed=2)

    assert add_adapters(model, 4, 16, "all-linear", 1) == 14  # 7 layers each of 2 blocks

    assert torch.equal(logps(model), logps(base))
    assert type(model) is type(base)
    assert not torch.equal(logps(adapted()), logps(base))


def test_only_adapters_train() -> None:
    trained = [name for name, p in adapted().named_parameters() if p.requires_grad]

    assert len(trained) == 28
    assert {name.rpartition(".lora_")[2] for name in trained} == {
        "A.default.weight",
        "B.default.weight",
    }


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_is_plain_and_gives_the_adapted_log_probs(tie: bool, tmp_path: Path) -> None:
    model = adapted(tie)
    accelerator, policy = prepared(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    weights = gather_weights(accelerator, policy, torch.float32)
    write_folder(model, weights, trainables.tokenizer(), tmp_path / "saved", torch.float32)

    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values())
    assert (logps(loaded) - logps(model)).abs().max() < 1e-5
    assert (logps(loaded) - logps(trainables.tiny_model(seed=2, tie=tie))).abs().max() > 1e-2
    plain = set(trainables.tiny_model(tie=tie).state_dict()) - (
        {"lm_head.weight"} if tie else set()
    )
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == plain
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "saved").iterdir()}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_adapters_are_merged_in_float32_and_rounded_once() -> None:
    model = adapted(rank=3)
    accelerator, policy = prepared(model)
    layer = model.model.layers[1].mlp.down_proj
    high, low = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    whole = layer.base_layer.weight + 16 / 3 * high @ low

    found = gather_weights(accelerator, policy, torch.bfloat16)

    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], whole.to(torch.bfloat16))
    half = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    assert merged(model, half)[name].dtype == torch.float32


def test_layers_that_are_stored_transposed_are_merged_transposed() -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=280, n_positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    base = logps(model)
    add_adapters(model, 2, 16, "c_fc,c_proj", 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    accelerator, policy = prepared(model)

    plain = GPT2LMHeadModel(config).eval()
    plain.load_state_dict(gather_weights(accelerator, policy, torch.float32), strict=False)

    assert (logps(plain) - logps(model)).abs().max() < 1e-5
    assert (logps(plain) - base).abs().max() > 1e-2


def test_adapters_depend_on_the_seed_only_and_move_no_global_generator() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, same, other = (adapted(seed=s).state_dict() for s in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"

    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert one[name].abs().max() > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_targets_are_names_of_layers() -> None:
    model = adapted(targets="q_proj, mlp.up_proj")

    layers = {name.split(".lora_")[0] for name in model.state_dict() if ".lora_" in name}
    assert layers == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


@pytest.mark.parametrize("targets", ["q_proj,lm_head", "embed_tokens", "norm", "qproj"])
def test_targets_that_cannot_have_adapters_are_refused(targets: str) -> None:
    with pytest.raises(DataError, match="can't have adapters; this model's linear layers are down"):
        add_adapters(trainables.tiny_model(tie=False), 4, 16, targets, 1)


def pairs_trainer(model: Any, layout: Layout) -> Trainer:
    accelerator, policy = prepared(model)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    return Trainer(
        accelerator,
        policy,
        optimizer,
        lambda logps_N, batch: refuel(*differences(logps_N, batch, "old_logprob"), 2.0),
        lambda example: 1.0,
        Budget(128, layout=layout),
        0.0,
    )


def gradients(model: Any, layout: Layout) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the metrics and the gradients of one step over eight pairs."""
    made, found = pairs_trainer(model, layout), {}
    made.optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    )
    (metrics,) = train_steps(made, trainables.examples(8), [range(8)], lambda u: 0.0)
    return metrics, found


@pytest.mark.parametrize("layout", ["apart", "chains", "dense"])
def test_the_gradient_of_an_adapter_is_that_of_the_merged_weight(layout: Layout) -> None:
    """W' = W + s B A, so dL/dB = s dL/dW' Aᵀ and dL/dA = s Bᵀ dL/dW'."""
    model = adapted()
    plain = trainables.tiny_model(seed=2)
    plain.load_state_dict(merged(model, model.state_dict()))

    ours, of_adapters = gradients(model, layout)
    theirs, of_weights = gradients(plain, layout)

    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert len(of_adapters) == 28
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            low, high = (getattr(layer, f"lora_{k}")["default"].weight for k in "AB")
            whole = of_weights[f"{name}.weight"]
            for k, expected in (("A", 4 * high.T @ whole), ("B", 4 * whole @ low.T)):
                found = of_adapters[f"{name}.lora_{k}.default.weight"]
                assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("layout", ["apart", "chains", "dense"])
def test_recomputed_activations_give_the_same_gradients(layout: Layout, lora: bool) -> None:
    kept, recomputed = ((adapted() if lora else trainables.tiny_model(seed=2)) for _ in range(2))
    calls = []
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    passes = []
    recomputed.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))

    one, expected = gradients(kept, layout)
    two, found = gradients(recomputed, layout)

    assert len(calls) == 2 * len(passes) > 0  # once more in each backward pass
    assert two["loss"] == one["loss"]
    assert two["grad_norm"] == one["grad_norm"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_optimizer_holds_adapters_only(tmp_path: Path) -> None:
    base = trainables.policy_folder(tmp_path / "base")

    ready = prepare(TrainConfig(base_model=base, output_dir=str(tmp_path / "o"), lora_r=4), 0.8)

    held = {id(p) for group in ready.optimizer.param_groups for p in group["params"]}
    named = {name for name, p in ready.policy.named_parameters() if id(p) in held}
    assert len(held) == len(named) == 28
    assert all(".lora_" in name for name in named)


def test_a_stage_trains_adapters_from_the_base_and_writes_a_plain_model(tmp_path: Path) -> None:
    base = trainables.policy_folder(tmp_path / "base")
    config = Config(
        base_model=base,
        output_dir=str(tmp_path / "out"),
        task=Task(query_dataset=trainables.pairs_repo(tmp_path / "pairs", train=8)),
        refuel=Refuel(eta=2.0),
        lr=1e-2,
        total_episodes=16,
        gradient_accumulation_steps=8,
        lora_r=4,
    )
    main(config)
    AcceleratorState._reset_state(True)
    main(dataclasses.replace(config, lora_r=0, output_dir=str(tmp_path / "full")))

    lora, full = (trainables.metrics(tmp_path / name) for name in ("out", "full"))
    assert lora[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-6)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
