"""The identity of an architecture."""

import hashlib
import json
from typing import Any

from archwright.spec.models import Layer, Model, Spec


def spec_digest(spec: Spec) -> str:
    """SHA-256 of the model section's canonical JSON, in hexadecimal: equal for specs whose models compute the same.

    Defaults are written out (`kv_heads`, `head_dim` too), keys sorted, and the stack is the list of its layers, however
    it is written. Name, paths, training and build do not count, nor do `init`, which says how weights begin and not
    what they mean, and the penalties of routers, which say how weights are trained.
    """
    model = spec.model
    section = model.model_dump(mode="json", exclude={"init", "layer", "layers"})
    section["stack"] = [[repeat, _canonical(model, layer)] for repeat, layer in _merged(model)]
    text = json.dumps(section, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _merged(model: Model) -> list[tuple[int, Layer]]:
    """The runs of the stack, equal neighbours as one."""
    merged: list[tuple[int, Layer]] = []
    for run in model.runs:
        if merged and merged[-1][1] == run.layer:
            merged[-1] = (merged[-1][0] + run.repeat, run.layer)
        else:
            merged.append((run.repeat, run.layer))
    return merged


def _canonical(model: Model, layer: Layer) -> dict[str, Any]:
    section = layer.model_dump(mode="json")
    for penalty in ("balance_loss", "z_loss"):
        section["ffn"].pop(penalty, None)
    attention = section["attention"]
    attention["kv_heads"] = attention["kv_heads"] or attention["heads"]
    attention["head_dim"] = model.head_dim(layer.attention)
    return section
