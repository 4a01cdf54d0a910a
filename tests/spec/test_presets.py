from collections.abc import Callable

import pytest

from archwright.spec import dump, load, spec_digest
from archwright.spec.load import resolve
from archwright.spec.merge import preset_names
from archwright.spec.models import Spec
from archwright.spec.parameters import num_parameters

PARAMETERS = {
    "tiny": 125_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
}


@pytest.mark.parametrize("name", preset_names())
def test_preset(name: str, golden: Callable[[str, str], None]):
    spec = load(f"preset:{name}")
    assert spec.name == name
    assert num_parameters(spec) == PARAMETERS[name]
    golden(f"preset_{name}.yaml", dump(spec))


def test_tiny_carries_every_section():
    tree = resolve("preset:tiny").tree
    assert set(tree.entries) == Spec.model_fields.keys() - {"extends"}


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_kind_alone_makes_a_train_section(kind: str):
    train = load("preset:tiny", {"train": {"kind": kind}}).train
    assert train is not None and train.kind == kind


def test_the_digest_is_of_what_the_model_computes():
    digest = spec_digest(load("preset:tiny"))
    same: dict[str, object] = {
        "name": "other", "train.steps": 60, "model.init.std": 0.1, "model.layer.attention.head_dim": 16,
        "build.parallel.tensor": 2, "model.layer.attention.position.theta": 1e4,
    }  # fmt: skip
    assert spec_digest(load("preset:tiny", same)) == digest
    others: dict[str, object] = {
        "model.layers": 3, "model.layer.norm.eps": 1e-6, "model.tied_embeddings": False,
        "model.layer.attention.kv_heads": 4,
        "model.layer.attention.head_dim": 8, "model.layer.attention.position.scaling": {"kind": "llama3"},
    }  # fmt: skip
    moe = {"kind": "moe", "experts": 4, "hidden_size": 32}
    trained_otherwise = {**moe, "balance_loss": 1.0, "z_loss": 0.0}
    first, second = (spec_digest(load("preset:tiny", {"model.layer.ffn": ffn})) for ffn in (moe, trained_otherwise))
    assert first == second != digest
    digests = {spec_digest(load("preset:tiny", {path: value})) for path, value in others.items()}
    assert len(digests | {digest}) == len(others) + 1
