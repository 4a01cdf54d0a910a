"""Random legal specs. A seed is a spec, on every machine and in every run."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from archwright.spec import Spec, load
from archwright.spec.models import Layer, MoeFfn

Tree = dict[str, Any]
"""A spec as its YAML file says it."""
Family = Literal["llama", "mistral", "qwen2"]

DEGREES = (1, 2, 4, 8)


def random_spec(seed: int, folder: Path) -> Spec:
    """A small model of any kind that the language knows and tensor degree 2 can split, read from a file as a user's
    would be; see `random_tree`.
    """
    return load_tree(random_tree(seed), folder / f"spec{seed}.yaml")


def load_tree(tree: Tree, path: Path) -> Spec:
    """Write a spec to `path` and load it."""
    with path.open("w") as file:
        YAML().dump(tree, file)
    return load(path)


def random_tree(seed: int) -> Tree:
    """The file of a random model.

    Drawn: the ratio of query to key/value heads (multi-head and multi-query among them), odd widths and an odd
    vocabulary, head sizes that are no powers of two and, without RoPE, odd ones; biases of attention and of the
    feed-forward; RMSNorm and LayerNorm with and without a bias; SwiGLU and both GELUs; windows from one token to more
    than the model has; RoPE with and without Llama 3.1's scaling (whose ramp lies inside the sequences that are
    tried), learned positions, both, and none; tying; in a quarter of the specs two or three runs of different layers;
    and in a quarter of the layers mixtures of experts, of all kinds of routers, with and without a shared one.
    """
    rng = random.Random(seed)
    model: Tree = {
        "vocab_size": rng.randrange(37, 212, 2),
        "hidden_size": rng.randrange(17, 66),
        "max_positions": rng.randrange(48, 120),
    }
    rotary, learned = rng.choice(((0.9, 0.0), (0.9, 0.0), (0.1, 0.9), (0.5, 0.5), (0.0, 0.0)))
    if rng.random() < learned:
        model["positions"] = {"kind": "learned"}
    if rng.random() < 1 / 4:
        runs = [{"repeat": rng.randrange(1, 3), "layer": _layer(rng, rotary)} for _ in range(rng.choice((2, 2, 2, 3)))]
        model["layers"] = runs
    else:
        model |= {"layers": rng.randrange(1, 4), "layer": _layer(rng, rotary)}
        attention = model["layer"]["attention"]
        width = attention["heads"] * attention["head_dim"]
        if rng.random() < 0.2 and width > 16:  # a norm over 2 values is mostly rounding
            model["hidden_size"] = width
            del attention["head_dim"]  # the default
    document = _document(model | {"tied_embeddings": rng.random() < 0.5})
    _add_experts(random.Random(f"experts {seed}"), model)
    return document


def family_spec(family: Family, seed: int, folder: Path) -> Spec:
    """A random spec of a family that `transformers` knows; see `family_tree`."""
    return load_tree(family_tree(family, seed), folder / f"{family}{seed}.yaml")


def family_tree(family: Family, seed: int) -> Tree:
    """A random model of a family that `transformers` knows: equal layers of RMSNorm, RoPE and SwiGLU.

    Llama has biases everywhere or nowhere; Mistral a window, mostly shorter than the sequences; Qwen2 biases on
    queries, keys and values. Llama's hidden size is a multiple of the heads, on which `LlamaConfig` insists.
    """
    rng = random.Random(f"{family} {seed}")
    attention, hidden_size = _heads(rng), rng.randrange(17, 66)
    ffn: Tree = {"kind": "swiglu", "hidden_size": rng.randrange(20, 120, 2)}
    attention |= {"head_dim": rng.randrange(8, 21, 2), "position": _rope(rng)}
    if family == "llama":
        hidden_size = -(-hidden_size // attention["heads"]) * attention["heads"]
        attention["bias"], ffn["bias"] = rng.choice(("none", "all")), rng.random() < 0.3
    elif family == "mistral":
        attention["mask"] = {"kind": "window", "size": rng.choice((1, 2, 3, 5, 8, 13, 64))}
    else:
        attention["bias"] = "qkv"
    norm = {"kind": "rmsnorm", "eps": 10 ** rng.uniform(-6, -3)}
    model = {
        "vocab_size": rng.randrange(37, 212, 2),
        "hidden_size": hidden_size,
        "max_positions": rng.randrange(48, 120),
        "layers": rng.randrange(1, 4),
        "layer": {"norm": norm, "attention": attention, "ffn": ffn},
        "tied_embeddings": rng.random() < 0.5,
    }
    return _document(model)


def _document(model: Tree) -> Tree:
    degree = {"tensor": 2}
    return {"version": 1, "name": "random", "model": model, "parallel": degree, "build": {"parallel": {**degree}}}


def _layer(rng: random.Random, rotary: float) -> Tree:
    """rotary: the chance that attention turns by RoPE."""
    attention = _heads(rng)
    if rng.random() < rotary:
        attention |= {"head_dim": rng.randrange(2, 21, 2), "position": _rope(rng)}
    else:
        attention |= {"head_dim": rng.randrange(1, 21), "position": {"kind": "none"}}
    attention["bias"] = rng.choice(("none", "none", "qkv", "all"))
    if rng.random() < 0.5:
        sizes = (1, rng.randrange(2, 9), rng.randrange(2, 9), rng.randrange(9, 41), rng.randrange(120, 5000))
        attention["mask"] = {"kind": "window", "size": rng.choice(sizes)}
    return {"norm": _norm(rng), "attention": attention, "ffn": _ffn(rng)}


def _heads(rng: random.Random) -> Tree:
    kv_heads = rng.choice((1, 1, 2, 2, 2, 4, 4, 6, 8))
    ratios = {1: (2, 4, 6, 8), 2: (1, 2, 3, 4, 5), 4: (1, 2, 3), 6: (1, 2), 8: (1, 2)}
    heads = kv_heads * rng.choice(ratios[kv_heads])
    given = kv_heads != heads or rng.random() < 0.5
    return {"kind": "gqa", "heads": heads} | ({"kv_heads": kv_heads} if given else {})


def _norm(rng: random.Random) -> Tree:
    eps = 10 ** rng.uniform(-6, -3)
    if rng.random() < 0.5:
        return {"kind": "rmsnorm", "eps": eps}
    return {"kind": "layernorm", "eps": eps, "bias": rng.random() < 0.6}


def _ffn(rng: random.Random) -> Tree:
    size = rng.randrange(24, 120, rng.choice((2, 4, 8)))
    ffn = {"kind": rng.choice(("swiglu", "gelu")), "hidden_size": size, "bias": rng.random() < 0.5}
    return ffn | ({"approximation": rng.choice(("none", "tanh"))} if ffn["kind"] == "gelu" else {})


def _add_experts(rng: random.Random, model: Tree) -> None:
    """Replace some feed-forwards. `rng` is not the one that draws the rest, which stays as it was without experts."""
    runs = model["layers"] if isinstance(model["layers"], list) else [model]
    for run in runs:
        if rng.random() < 1 / 4:
            run["layer"]["ffn"] = _moe(rng)


def _moe(rng: random.Random) -> Tree:
    experts = rng.randrange(2, 9)
    moe: Tree = {
        "kind": "moe",
        "experts": experts,
        "experts_per_token": rng.randrange(1, min(experts, 4) + 1),
        "hidden_size": rng.randrange(8, 49, rng.choice((2, 4, 8))),
        "router": {"score": rng.choice(("softmax", "sigmoid")), "normalize": rng.random() < 0.6},
        "balance_loss": rng.choice((0.0, 0.01, 1.0)),
        "z_loss": rng.choice((0.0, 0.001, 0.1)),
    }
    if rng.random() < 0.5:
        moe["router"]["scale"] = rng.uniform(0.5, 3)
    if rng.random() < 0.5:
        moe["shared"] = {"hidden_size": rng.randrange(8, 49, rng.choice((2, 4, 8)))}
    return moe


def _rope(rng: random.Random) -> Tree:
    rope: Tree = {"kind": "rope", "theta": 10 ** rng.uniform(2, 6)}
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


def layers_of(spec: Spec) -> Iterator[Layer]:
    """One layer of each run."""
    return (run.layer for run in spec.model.runs)


def legal_degrees(spec: Spec) -> tuple[int, ...]:
    """The tensor degrees that the model can be split into."""
    return tuple(degree for degree in DEGREES if all(_splits(layer, degree) for layer in layers_of(spec)))


def _splits(layer: Layer, degree: int) -> bool:
    attention = layer.attention
    kv_heads = attention.kv_heads or attention.heads
    shared = kv_heads % degree == 0 or degree % kv_heads == 0
    return attention.heads % degree == 0 and all(width % degree == 0 for width in _widths(layer)) and shared


def _widths(layer: Layer) -> tuple[int, ...]:
    """What a tensor degree must divide."""
    ffn = layer.ffn
    shared = ffn.shared.hidden_size if isinstance(ffn, MoeFfn) and ffn.shared else 0
    return ffn.hidden_size, shared


def _has_bias(layer: Layer) -> bool:
    return not isinstance(layer.ffn, MoeFfn) and layer.ffn.bias


def features(spec: Spec) -> Mapping[str, bool]:
    """What a spec exercises, by name."""
    model, layers = spec.model, list(layers_of(spec))
    attentions = [layer.attention for layer in layers]
    kv = [(a.heads, a.kv_heads or a.heads) for a in attentions]
    windows = [a.mask.size for a in attentions if a.mask.kind == "window"]
    norms, ffns = [layer.norm for layer in layers], [layer.ffn for layer in layers]
    moes = [ffn for ffn in ffns if isinstance(ffn, MoeFfn)]
    ropes = [a.position for a in attentions if a.position.kind == "rope"]
    return {
        "multi-head": any(heads == few for heads, few in kv),
        "multi-query": any(few == 1 for _, few in kv),
        "grouped heads": any(1 < few < heads for heads, few in kv),
        "a ratio that is no power of two": any(heads // few in (3, 5, 6) for heads, few in kv),
        "odd hidden size": model.hidden_size % 2 == 1,
        "odd head_dim": any(model.head_dim(a) % 2 for a in attentions),
        "head_dim by default": any(a.head_dim is None for a in attentions),
        "no biases": all(layer.attention.bias == "none" and not _has_bias(layer) for layer in layers),
        "biases on q, k, v": any(a.bias == "qkv" for a in attentions),
        "biases on q, k, v, o": any(a.bias == "all" for a in attentions),
        "biases in the feed-forward": any(_has_bias(layer) for layer in layers),
        "rmsnorm": any(n.kind == "rmsnorm" for n in norms),
        "layernorm": any(n.kind == "layernorm" and not n.bias for n in norms),
        "layernorm with bias": any(n.kind == "layernorm" and n.bias for n in norms),
        "swiglu": any(f.kind == "swiglu" for f in ffns),
        "gelu": any(f.kind == "gelu" and f.approximation == "none" for f in ffns),
        "gelu by tanh": any(f.kind == "gelu" and f.approximation == "tanh" for f in ffns),
        "experts": bool(moes),
        "a shared expert": any(moe.shared for moe in moes),
        "one expert a token": any(moe.experts_per_token == 1 for moe in moes),
        "all experts for each token": any(moe.experts_per_token == moe.experts for moe in moes),
        "softmax routers": any(moe.router.score == "softmax" for moe in moes),
        "sigmoid routers": any(moe.router.score == "sigmoid" for moe in moes),
        "weights as they are": any(not moe.router.normalize for moe in moes),
        "scaled weights": any(moe.router.scale != 1 for moe in moes),
        "experts and dense layers": 0 < len(moes) < len(layers),
        "window of one token": 1 in windows,
        "window inside the sequences": any(1 < size < 9 for size in windows),
        "window beyond the sequences": any(size > model.max_positions for size in windows),
        "causal": len(windows) < len(layers),
        "rope": bool(ropes),
        "rope scaling": any(rope.scaling for rope in ropes),
        "learned positions": model.positions is not None,
        "learned positions and rope": model.positions is not None and bool(ropes),
        "no positions": model.positions is None and not ropes,
        "mixed stack": len(set(layers)) > 1,
        "tied": model.tied_embeddings,
        "untied": not model.tied_embeddings,
        "4 ranks": 4 in legal_degrees(spec),
        "8 ranks": 8 in legal_degrees(spec),
    }
