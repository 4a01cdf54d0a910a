"""Each block of a Program leads back to the key of the YAML that it was lowered from."""

from pathlib import Path

import pytest

from archwright.compiler.passes import lower
from archwright.compiler.passes.origin import origin
from archwright.spec.load import resolve

PLAIN = """\
version: 1
name: plain
model:
  vocab_size: 64
  hidden_size: 16
  max_positions: 32
  layers: 2
  layer:
    norm: {kind: rmsnorm}
    attention:
      kind: gqa
      heads: 2
      position: {kind: rope}
    ffn: {kind: swiglu, hidden_size: 32}
"""
MIXED = """\
version: 1
name: mixed
model:
  vocab_size: 64
  hidden_size: 16
  max_positions: 32
  positions: {kind: learned}
  layers:
    - repeat: 2
      layer:
        attention: {kind: gqa, heads: 2, position: {kind: none}}
        ffn: {kind: gelu, hidden_size: 32}
    - layer:
        norm: {kind: layernorm}
        attention: {kind: gqa, heads: 2, position: {kind: none}}
        ffn: {kind: gelu, hidden_size: 16}
"""


def origins(text: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Block path → key and its line of the file."""
    (folder / "spec.yaml").write_text(text)
    resolved = resolve(folder / "spec.yaml")
    places = {path: origin(resolved.spec, resolved.tree, path) for path, _ in lower(resolved.spec).blocks()}
    lines = text.splitlines()
    for place in places.values():
        assert str(place) == f"{folder / 'spec.yaml'}:{place.span.line}"
    return {path: (place.path, lines[place.span.line - 1].strip()) for path, place in places.items()}


@pytest.mark.parametrize("layer", [0, 1])
def test_every_block_of_equal_layers(tmp_path: Path, layer: int) -> None:
    found = origins(PLAIN, tmp_path)
    path = f"model.layers.{layer}"
    attention, ffn = (
        ("model.layer.attention", "attention:"),
        ("model.layer.ffn", "ffn: {kind: swiglu, hidden_size: 32}"),
    )
    assert found[path] == ("model.layer", "layer:")
    assert found[f"{path}.self_attn"] == found[f"{path}.self_attn.q_proj"] == attention
    assert found[f"{path}.self_attn.position"] == ("model.layer.attention.position", "position: {kind: rope}")
    assert found[f"{path}.mlp"] == found[f"{path}.mlp.down_proj"] == ffn
    norm = ("model.layer.norm", "norm: {kind: rmsnorm}")
    assert found[f"{path}.input_layernorm"] == found[f"{path}.post_attention_layernorm"] == found["model.norm"] == norm
    assert found["lm_head"] == found["model.embed_tokens"] == ("model.vocab_size", "vocab_size: 64")
    assert found[""] == ("model", "model:")


def test_a_mixed_stack_counts_its_runs(tmp_path: Path) -> None:
    found = origins(MIXED, tmp_path)
    first, second = "ffn: {kind: gelu, hidden_size: 32}", "ffn: {kind: gelu, hidden_size: 16}"
    assert found["model.layers.0.mlp"] == found["model.layers.1.mlp.fc1"] == ("model.layers[0].layer.ffn", first)
    assert found["model.layers.2.mlp"] == ("model.layers[1].layer.ffn", second)
    assert found["model.norm"] == ("model.layers[1].layer.norm", "norm: {kind: layernorm}")
    assert found["model.embed_positions"] == ("model.positions", "positions: {kind: learned}")


def test_a_default_leads_to_the_nearest_key_that_is_written(tmp_path: Path) -> None:
    found = origins(MIXED, tmp_path)
    assert found["model.layers.0.input_layernorm"] == ("model.layers[0].layer", "layer:")
    assert origins(PLAIN.replace("    norm: {kind: rmsnorm}\n", ""), tmp_path)["model.norm"] == (
        "model.layer",
        "layer:",
    )
