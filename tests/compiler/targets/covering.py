"""A pairwise covering set of builds: any two choices of different axes stand together in one of them, where that is
legal (Cohen et al. 1997). Few builds find what goes wrong between two choices, which most faults do.
"""

from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

from archwright.compiler.reduced import reduced
from archwright.spec import Spec, load

Row = tuple[str, ...]
"""A choice for each of AXES, in their order."""
ROPE: dict[str, Any] = {"kind": "rope", "theta": 500_000.0}
WINDOW = {"kind": "window", "size": 256}
GPT2_FFN = {"kind": "gelu", "bias": True, "approximation": "tanh"}


def layer(ffn: str | dict[str, Any], norm: str | dict[str, Any], **attention: Any) -> dict[str, Any]:
    return {
        "norm": {"kind": norm} if isinstance(norm, str) else norm,
        "attention": {"kind": "gqa", "heads": 12, "head_dim": 64, "position": ROPE, **attention},
        "ffn": {"hidden_size": 3072, **({"kind": ffn} if isinstance(ffn, str) else ffn)},
    }


MOE = {"kind": "moe", "experts": 16, "experts_per_token": 3, "shared": {"hidden_size": 3072}}
SIGMOID = {"score": "sigmoid", "scale": 2.5}
SIZES: dict[str, Any] = {"vocab_size": 2000, "hidden_size": 768, "max_positions": 2048}
MODELS: dict[str, dict[str, Any]] = {
    "gpt-2": {
        "layers": 12,
        "layer": layer(GPT2_FFN, "layernorm", bias="all", position={"kind": "none"}),
        "positions": {"kind": "learned"},
        "tied_embeddings": True,
    },
    "qkv biases, window": {"layers": 4, "layer": layer("swiglu", "rmsnorm", kv_heads=4, bias="qkv", mask=WINDOW)},
    "experts": {"layers": 4, "layer": layer({**MOE, "router": SIGMOID}, "rmsnorm", kv_heads=4)},
    "mixed stack": {
        "layers": [
            {"repeat": 5, "layer": layer("swiglu", {"kind": "layernorm", "bias": False}, kv_heads=1, mask=WINDOW)},
            {"repeat": 1, "layer": layer("gelu", "rmsnorm", kv_heads=4, position={"kind": "none"})},
        ]
    },
}
PRESETS = ("llama3.1-8b", "llama3.2-1b", "mixtral-8x7b")
WEIGHTS: Mapping[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
    "int4": {
        "precision": "float16",
        "quantize": {"rules": [{"kind": "int8", "match": "*.o_proj"}, {"kind": "int4", "group_size": 32}]},
    },
    "fp8": {
        "precision": "bfloat16",
        "quantize": {"rules": [{"kind": "keep", "match": "*.experts"}, {"kind": "fp8"}]},
        "engine": {"compute_capabilities": [8.9, 12.0]},
    },
}
AXES: Mapping[str, tuple[str, ...]] = {
    "model": (*PRESETS, *MODELS),
    "weights": tuple(WEIGHTS),
    "target": ("portable", "tensorrt"),
    "tensor": ("1", "2", "4"),
    "pipeline": ("1", "2"),
    "expert": ("1", "2"),
    "experts": ("dense", "gathered"),
    "fuse": ("none", "all"),
    "logits": ("all", "last"),
}


def is_legal(row: Row) -> bool:
    """Experts are chosen about where there are any, and a single layer in half precision is not built by TensorRT."""
    chosen = dict(zip(AXES, row, strict=True))
    has_experts = chosen["model"] in ("mixtral-8x7b", "experts")
    return has_experts or (chosen["expert"], chosen["experts"]) == ("1", "dense")


def spec_of(row: Row) -> Spec:
    """The reduced spec of a row."""
    chosen = dict(zip(AXES, row, strict=True))
    parallel = {axis: int(chosen[axis]) for axis in ("tensor", "pipeline", "expert")}
    build: dict[str, Any] = {
        **WEIGHTS[chosen["weights"]],
        "parallel": parallel,
        "moe": {"kind": chosen["experts"]},
        **{key: chosen[key] for key in ("target", "fuse", "logits")},
    }
    if build.get("quantize") and chosen["model"] not in ("mixtral-8x7b", "experts"):
        rules = [rule for rule in build["quantize"]["rules"] if rule.get("match") != "*.experts"]
        build["quantize"] = {"rules": rules}
    if chosen["model"] in PRESETS:
        return reduced(load(f"preset:{chosen['model']}", {"build": build}))
    fields = {"version": 1, "name": "covering", "model": SIZES | MODELS[chosen["model"]]}
    return reduced(Spec.model_validate(fields | {"build": build}))


def pairs(row: Row) -> set[tuple[int, str, int, str]]:
    return {(a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2)}


def covering_set() -> list[Row]:
    """Rows until every pair that any legal row has is in one; greedily the row with most that are missing."""
    legal = [row for row in product(*AXES.values()) if is_legal(row)]
    missing = set[tuple[int, str, int, str]]().union(*map(pairs, legal))
    chosen: list[Row] = []
    while missing:
        # The row is grown from the first missing pair, so that not all rows need to be weighed each time.
        a, x, b, y = min(missing)
        candidates = (row for row in legal if row[a] == x and row[b] == y)
        best = max(candidates, key=lambda row: (len(pairs(row) & missing), row))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
