"""Numeric parity with `transformers`: implementations of Llama, Mistral and Qwen2 that share nothing with ours but the
names."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from archwright.compiler import compile_module
from archwright.compiler.blocks import Rope
from archwright.compiler.ir import RopeTable
from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.huggingface import config_json
from archwright.spec import Spec, load
from tests.parity.cases import Case, make_case
from tests.parity.strategies import Family, family_spec, layers_of, random_spec
from tests.parity.targets import torch_module

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
MODELS: dict[Family, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
}
SEEDS = range(10)
EACH = [(family, seed) for family in MODELS for seed in SEEDS]
FOLDERS = [(family, seed) for family in MODELS for seed in range(3)]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(family: Family, spec: Spec, case: Case, dtype: torch.dtype) -> PreTrainedModel:
    """`transformers`' model with the same weights, matched by name."""
    model_class = MODELS[family]
    config = config_json(spec, "float64")
    assert config is not None and config["architectures"] == [model_class.__name__]
    model = model_class(model_class.config_class(**config, attn_implementation="eager")).to(dtype)
    tensors = {name: torch.from_numpy(value) for name, value in case.weights.tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def widen(model: PreTrainedModel, table: RopeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a float64 model of `transformers` be float64 throughout.

    Whatever the model's dtype, it rounds RoPE's angles, the norms and the softmax to float32, which moves logits by up
    to 7e-6 here. Its own frequencies are checked before they are replaced by the same ones in float64.
    """
    frequencies = torch.tensor(table.frequencies(), dtype=torch.float64)
    rotary = model.get_submodule("model.rotary_emb")
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=1e-6, atol=0)

    def rotate(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    def norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    monkeypatch.setattr(rotary, "forward", rotate)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(module, "forward", norm(module))
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


@pytest.mark.parametrize(("family", "seed"), EACH)
def test_logits_loss_and_gradients_equal_those_of_transformers(
    family: Family, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = family_spec(family, seed, tmp_path)
    program = lower(spec)
    case = make_case(program, seed)
    ours, theirs = torch_module(case, torch.float64), reference(family, spec, case, torch.float64)
    widen(theirs, next(block.table for _, block in program.blocks() if isinstance(block, Rope)), monkeypatch)
    ids_BS, targets_BS = torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS)
    logits_BSV = theirs(input_ids=ids_BS).logits
    torch.testing.assert_close(ours(ids_BS), logits_BSV, **TOLERANCE)

    # Not their own loss, which rounds the logits to float32.
    their_loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=-100)
    loss_sum, num_tokens = ours(ids_BS, targets_BS)
    loss = loss_sum / num_tokens
    torch.testing.assert_close(loss, their_loss, **TOLERANCE)

    loss.backward()
    their_loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, **TOLERANCE, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(("family", "seed"), FOLDERS)
def test_float32_logits_equal_those_of_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    spec = family_spec(family, seed, tmp_path)
    case = make_case(lower(spec), seed)
    ids_BS = torch.from_numpy(case.ids_BS)
    with torch.no_grad():
        theirs = reference(family, spec, case, torch.float32)(input_ids=ids_BS).logits
        torch.testing.assert_close(torch_module(case, torch.float32)(ids_BS), theirs, rtol=1e-4, atol=1e-4)


def test_the_seeds_cover_scaling_ties_groups_windows_and_biases(tmp_path: Path) -> None:
    specs = {family: [family_spec(family, seed, tmp_path) for seed in SEEDS] for family in MODELS}
    models = [spec.model for some in specs.values() for spec in some]
    attentions = [layer.attention for some in specs.values() for spec in some for layer in layers_of(spec)]
    assert {True, False} == {model.tied_embeddings for model in models}
    assert {True, False} == {attention.position.scaling is not None for attention in attentions}
    assert any(attention.kv_heads == 1 for attention in attentions)
    assert any(1 < (attention.kv_heads or attention.heads) < attention.heads for attention in attentions)
    assert {"none", "qkv", "all"} == {attention.bias for attention in attentions}
    assert {True, False} == {layer.ffn.bias for spec in specs["llama"] for layer in layers_of(spec)}
    hides = [make_case(lower(spec), seed).ids_BS.shape[1] > next(layers_of(spec)).attention.mask.size
             for seed, spec in enumerate(specs["mistral"])]  # fmt: skip
    assert sum(hides) >= 5, "sequences that are longer than the window"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "seed"), FOLDERS)
def test_a_model_folder_loads_in_transformers(family: Family, seed: int, precision: str, tmp_path: Path) -> None:
    spec = family_spec(family, seed, tmp_path)
    program = lower(spec)
    case = make_case(program, seed)
    folder = tmp_path / "model"
    write_model_folder(folder, spec, weight_tensors(program, case.weights, precision), [], details={})
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(theirs) is MODELS[family]
    assert str(theirs.dtype) == f"torch.{precision}"
    assert theirs.config.tie_word_embeddings == spec.model.tied_embeddings
    ids_BS = torch.from_numpy(case.ids_BS)
    with torch.no_grad():
        ours = compile_module(folder, dtype="float32")(ids_BS)
        torch.testing.assert_close(ours, theirs.float()(input_ids=ids_BS).logits, rtol=1e-3, atol=1e-3)


def test_what_transformers_cannot_load_has_no_config(tmp_path: Path) -> None:
    """A Llama of a hidden size that `LlamaConfig` refuses, and everything of no family."""
    llama = load("preset:tiny", {"model.hidden_size": 66, "model.layer.attention.head_dim": 16})
    assert config_json(llama, "float32") is None
    folder = tmp_path / "model"
    program = lower(llama)
    weights = make_case(program, 0).weights
    write_model_folder(folder, llama, weight_tensors(program, weights, "float32"), [], details={})
    assert not (folder / "config.json").exists() and (folder / "spec.yaml").exists()
    compile_module(folder)
    for change in (
        {"model.positions": {"kind": "learned"}},
        {"model.layer.norm": {"kind": "layernorm"}},
        {"model.layer.attention.position": {"kind": "none"}},
        {"model.layer.ffn": {"kind": "gelu", "hidden_size": 176}},
        {"model.layer.ffn.bias": True, "model.layer.attention.bias": "qkv"},
    ):
        assert config_json(load("preset:tiny", change), "float32") is None
    mixed = [spec for spec in (random_spec(seed, tmp_path) for seed in range(40)) if len(set(layers_of(spec))) > 1]
    assert mixed and all(config_json(spec, "float32") is None for spec in mixed)
