"""Random legal specs. A seed is a spec, on every machine and in every run."""

import random
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from archwright.spec import Spec, load

HEAD_DIMS = (8, 10, 12, 14, 16, 18, 20)


def random_spec(seed: int, folder: Path) -> Spec:
    """A small Llama-shaped model that tensor degree 2 can split, read from a file as a user's would be.

    Drawn: the ratio of query to key/value heads (multi-head and multi-query among them), odd widths, head sizes that
    are no powers of two, depth, tying, an odd vocabulary, eps, and RoPE with and without Llama 3.1's scaling, whose
    ramp lies inside the sequences that are tried.
    """
    path = folder / f"spec{seed}.yaml"
    with path.open("w") as file:
        YAML().dump(_tree(random.Random(seed)), file)
    return load(path)


def _tree(rng: random.Random) -> dict[str, Any]:
    kv_heads = rng.choice((1, 2, 4))
    heads = kv_heads * rng.choice((2, 3, 4) if kv_heads == 2 else (2, 4) if kv_heads == 1 else (1, 2))
    head_dim = rng.choice(HEAD_DIMS)
    attention: dict[str, Any] = {"kind": "gqa", "heads": heads, "position": _rope(rng)}
    if kv_heads != heads or rng.random() < 0.5:
        attention["kv_heads"] = kv_heads
    hidden_size = rng.randrange(17, 66)
    if rng.random() < 0.2:
        hidden_size = heads * head_dim
    else:
        attention["head_dim"] = head_dim
    return {
        "version": 1,
        "name": "random",
        "model": {
            "vocab_size": rng.randrange(37, 212, 2),
            "hidden_size": hidden_size,
            "max_positions": rng.randrange(48, 120),
            "layers": rng.randrange(1, 4),
            "layer": {
                "norm": {"kind": "rmsnorm", "eps": 10 ** rng.uniform(-6, -3)},
                "attention": attention,
                "ffn": {"kind": "swiglu", "hidden_size": rng.randrange(20, 120, rng.choice((2, 4)))},
            },
            "tied_embeddings": rng.random() < 0.5,
        },
        "parallel": {"tensor": 2},
        "build": {"parallel": {"tensor": 2}},
    }


def _rope(rng: random.Random) -> dict[str, Any]:
    rope: dict[str, Any] = {"kind": "rope", "theta": 10 ** rng.uniform(2, 6)}
    if rng.random() < 0.4:
        low = rng.uniform(0.5, 1.5)
        rope["scaling"] = {
            "kind": "llama3",
            "factor": rng.uniform(2, 32),
            "low_frequency_factor": low,
            "high_frequency_factor": low + rng.uniform(0.5, 4),
            "original_max_positions": rng.randrange(16, 65),
        }
    return rope


def legal_degrees(spec: Spec) -> tuple[int, ...]:
    """The tensor degrees that the model can be split into."""
    attention, inner = spec.model.layer.attention, spec.model.layer.ffn.hidden_size
    kv_heads = attention.kv_heads or attention.heads
    return tuple(
        degree
        for degree in (1, 2, 4)
        if attention.heads % degree == 0 and inner % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)
    )
