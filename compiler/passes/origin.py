"""The way back from `lower`: where in a spec's YAML a block of the Program comes from."""

from dataclasses import dataclass

from archwright.spec import Spec
from archwright.spec.source import MapNode, Span, Tree, find
from archwright.spec.structure import Path

_WITHIN_LAYER = {
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "self_attn": "attention",
    "position": "position",
    "mlp": "ffn",
    "gate": "router",
    "experts": "experts",
    "shared_experts": "shared",
}
"""Part of a canonical path → key of the spec; parts that have none (q_proj) belong to the key above them."""
_OUTSIDE_LAYERS = {
    "lm_head": ("vocab_size",),
    "model.embed_tokens": ("vocab_size",),
    "model.embed_positions": ("positions",),
    "model.embeddings": ("positions",),
}
_LAYERS = "model.layers."


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A key of a spec and where it is written. path: `model.layer.attention`."""

    path: str
    span: Span

    def __str__(self) -> str:
        return f"{self.span.source.name}:{self.span.line}"


def origin(spec: Spec, tree: MapNode, block_path: str) -> Origin:
    """The key that a block comes from, or the nearest one above it that the YAML spells out.

    spec: whose layers `block_path` counts. tree: of the file, which has the same layer kinds in the same order.
    """
    path, span, node = "", tree.span, tree
    for key in _keys(spec, block_path):
        step = _step(node, key)
        if step is None:
            break
        span, node = step
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else key
    return Origin(path=path, span=span)


def _step(node: Tree, key: str | int) -> tuple[Span, Tree] | None:
    """What stands under a key or at an index, and where the key or the item begins."""
    if isinstance(node, MapNode):
        entry = node.entries.get(str(key))
        return None if entry is None else (entry.key_span, entry.value)
    item = find(node, (key,))
    return None if item is None else (item.span, item)


def _keys(spec: Spec, block_path: str) -> Path:
    if not block_path.startswith(_LAYERS):
        if block_path == "model.norm":
            return (*_layer(spec, None), "norm")
        return ("model", *_OUTSIDE_LAYERS.get(block_path, ()))
    number, *parts = block_path.removeprefix(_LAYERS).split(".")
    return (*_layer(spec, int(number)), *(_WITHIN_LAYER[part] for part in parts if part in _WITHIN_LAYER))


def _layer(spec: Spec, number: int | None) -> Path:
    """The keys of a layer, None for the last one."""
    layers = spec.model.layers
    if isinstance(layers, int):
        return ("model", "layer")
    ends = [sum(run.repeat for run in layers[: index + 1]) for index in range(len(layers))]
    index = len(layers) - 1 if number is None else next(i for i, end in enumerate(ends) if number < end)
    return ("model", "layers", index, "layer")
