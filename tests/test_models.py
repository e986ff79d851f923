"""A policy that was saved is the policy that loads, in transformers and here."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from pipeline.errors import DataError
from pipeline.logprobs import MaskedLogprobs
from pipeline.models import gather_weights, load_policy, untied, without_dropout, write_folder
from tests import trainables

IDS = torch.tensor([[0, 7, 9, 200, 31]])


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    accelerator = Accelerator(cpu=True)
    policy = accelerator.prepare(MaskedLogprobs(model, 0.8))
    weights = gather_weights(accelerator, policy, dtype)
    write_folder(model, weights, trainables.tokenizer(), folder, dtype)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_policy_gives_identical_logits_in_plain_transformers(
    tie: bool, tmp_path: Path
) -> None:
    model = trainables.tiny_model(seed=2, tie=tie)
    save(model, tmp_path / "policy")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")

    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.dtype == torch.float32
    assert tokenizer.chat_template == trainables.tokenizer().chat_template
    assert tokenizer.encode("guess 7") == trainables.tokenizer().encode("guess 7")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    stored = load_file(tmp_path / "policy" / "model.safetensors").keys()
    assert model.state_dict().keys() - stored == ({"lm_head.weight"} if tie else set())
    assert stored <= model.state_dict().keys()
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


def test_bf16_is_stored_and_declared(tmp_path: Path) -> None:
    model = trainables.tiny_model(seed=2)
    save(model, tmp_path / "policy", torch.bfloat16)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")

    assert loaded.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    expected = model.get_input_embeddings().weight.to(torch.bfloat16)
    assert torch.equal(loaded.get_input_embeddings().weight, expected)


def test_load_policy_reads_what_was_saved(tmp_path: Path) -> None:
    model = trainables.tiny_model(seed=4)
    save(model, tmp_path / "policy")

    loaded, tokenizer = load_policy(str(tmp_path / "policy"), attn_implementation="eager")

    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    assert loaded.config._attn_implementation == "eager"
    assert tokenizer.eos_token == "<|eot_id|>"


def test_load_policy_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't load a causal language model"):
        load_policy(str(tmp_path / "nothing"))
    model, tokenizer = trainables.tiny_model(), trainables.tokenizer()
    tokenizer.chat_template = None
    write_folder(model, untied(model, model.state_dict()), tokenizer, tmp_path / "p", torch.float32)
    with pytest.raises(DataError, match="no chat template"):
        load_policy(str(tmp_path / "p"))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save(trainables.tiny_model(), tmp_path / "p")
    weights = tmp_path / "p" / "model.safetensors"
    weights.rename(tmp_path / "p" / "pytorch_model.bin")

    with pytest.raises(DataError, match="safetensors"):
        load_policy(str(tmp_path / "p"))


def test_every_dropout_is_zero() -> None:
    config = without_dropout(GPT2Config(resid_pdrop=0.3, attn_pdrop=0.2))

    assert (config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (0.0, 0.0, 0.0)


def test_tiny_llama_depends_on_its_seed_only_and_moves_no_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, same, other = (trainables.tiny_model(seed=s)(IDS).logits for s in (1, 1, 2))

    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
