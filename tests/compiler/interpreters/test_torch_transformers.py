"""Numeric parity with `transformers`: an implementation of Llama that shares nothing with ours but the names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from archwright.compiler import compile_module
from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.huggingface import config_json
from archwright.spec import Spec
from tests.parity.cases import Case, make_case
from tests.parity.strategies import random_spec
from tests.parity.targets import torch_module

# `transformers` forms RoPE's angles in float32, whatever the model's dtype; ours are float64 here.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SEEDS = range(12)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(seed: int, folder: Path) -> Spec:
    """A random spec of a hidden size that `LlamaConfig` accepts: it insists on a multiple of the heads."""
    spec = random_spec(seed, folder)
    heads = spec.model.layer.attention.heads
    hidden_size = -(-spec.model.hidden_size // heads) * heads
    return spec.model_copy(update={"model": spec.model.model_copy(update={"hidden_size": hidden_size})})


def reference(spec: Spec, case: Case) -> LlamaForCausalLM:
    """`transformers`' model with the same weights, matched by name."""
    config = LlamaConfig(**config_json(spec, "float64"), attn_implementation="eager")
    model = LlamaForCausalLM(config).double()
    tensors = {name: torch.from_numpy(value) for name, value in case.weights.tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_loss_and_gradients_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    spec = llama(seed, tmp_path)
    case = make_case(lower(spec), seed)
    ours, theirs = torch_module(case, torch.float64), reference(spec, case)
    ids_BS = torch.from_numpy(case.ids_BS)
    labels_BS = torch.from_numpy(case.targets_BS)
    answer = theirs(input_ids=ids_BS)
    torch.testing.assert_close(ours(ids_BS), answer.logits, **TOLERANCE)

    # Their labels are shifted inside: the target of position s is label s + 1.
    targets_BS = torch.cat([labels_BS[:, 1:], torch.full_like(labels_BS[:, :1], -100)], dim=1)
    loss_sum, num_tokens = ours(ids_BS, targets_BS)
    their_loss = theirs(input_ids=ids_BS, labels=labels_BS).loss
    loss = loss_sum / num_tokens
    torch.testing.assert_close(loss, their_loss.double(), **TOLERANCE)

    loss.backward()
    their_loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, **TOLERANCE, msg=lambda t, n=name: f"{n}: {t}")


def test_the_seeds_cover_scaling_ties_and_groups(tmp_path: Path) -> None:
    models = [random_spec(seed, tmp_path).model for seed in SEEDS]
    attentions = [model.layer.attention for model in models]
    assert {True, False} == {model.tied_embeddings for model in models}
    assert {True, False} == {attention.position.scaling is not None for attention in attentions}
    assert any(attention.kv_heads == 1 for attention in attentions)
    assert any(1 < (attention.kv_heads or attention.heads) < attention.heads for attention in attentions)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_model_folder_loads_in_transformers(seed: int, precision: str, tmp_path: Path) -> None:
    spec = llama(seed, tmp_path)
    program = lower(spec)
    case = make_case(program, seed)
    folder = tmp_path / "model"
    write_model_folder(folder, spec, weight_tensors(program, case.weights, precision), [], details={})
    theirs = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert str(theirs.dtype) == f"torch.{precision}"
    assert theirs.config.tie_word_embeddings == spec.model.tied_embeddings
    ids_BS = torch.from_numpy(case.ids_BS)
    with torch.no_grad():
        ours = compile_module(folder, dtype="float32")(ids_BS)
        torch.testing.assert_close(ours, theirs.float()(input_ids=ids_BS).logits, rtol=1e-3, atol=1e-3)
