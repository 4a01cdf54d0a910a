"""When two rank graphs are the same network with other weights.

All ranks of a stage have one structure (names count, so stages do not share theirs). TensorRT reads the weights of
each and writes them into its engine, so engines are never shared; what is shared is what depends on the structure
alone: the check of the parsed network, and for TensorRT itself the timings of kernels (`build.engine.timing_cache`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto


def structural_hash(model: onnx.ModelProto, config: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of a graph's nodes, names, types, shapes and small constants, and of how it is built.

    What does not count: metadata (the rank stands there), and of external weights where they lie and what they are.
    config: what else decides about the engine, as plain JSON values.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    for tensor in bare.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            del tensor.external_data[:]
    digest = hashlib.sha256(bare.SerializeToString(deterministic=True))
    digest.update(json.dumps(dict(config or {}), sort_keys=True, allow_nan=False).encode())
    return digest.hexdigest()


def by_structure(graphs: Iterable[Path], config: Mapping[str, Any] | None = None) -> dict[str, list[Path]]:
    """Structural hash → the graph files that have it, in their order."""
    found: dict[str, list[Path]] = {}
    for graph in graphs:
        model = onnx.load(graph, load_external_data=False)
        found.setdefault(structural_hash(model, config), []).append(graph)
    return found
