"""The matrices of a model that may be quantized, by name, and the rule that decides for each."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from archwright.spec.models import Layer, Model, Quantize, QuantizeRule

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MAX_LAYERS = 4096
"""Of each run of layers that `matrices` lists: a mistyped number of layers must be answered at once, too."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix, or the matrices of a layer's experts, under the canonical name of its block.

    columns: the input channels of one output channel. cut: whether tensor ranks share them. scalable: whether the
    scales of AWQ have a place in what comes before. suffix: the name within its layer, equal for equal matrices.
    """

    path: str
    suffix: str
    columns: int
    cut: bool = False
    scalable: bool = True
    is_linear: bool = True


def deciding(quantize: Quantize, path: str) -> int | None:
    """The number of the first rule that matches."""
    return next((number for number, rule in enumerate(quantize.rules) if fnmatchcase(path, rule.match)), None)


def rule_for(quantize: Quantize | None, path: str) -> QuantizeRule | None:
    """The rule that quantizes a matrix, None where it is kept."""
    number = None if quantize is None else deciding(quantize, path)
    rule = None if quantize is None or number is None else quantize.rules[number]
    return None if rule is None or rule.kind == "keep" else rule


def matrices(model: Model) -> Iterator[Matrix]:
    """Every matrix but those of positions and routers, in the order of the model; a tied head has no own name."""
    hidden, tied = model.hidden_size, model.tied_embeddings
    yield Matrix(path=EMBEDDING, suffix=EMBEDDING, columns=hidden, scalable=False, is_linear=False)
    number = 0
    for run in model.runs:
        within = tuple(_layer(model, run.layer))
        for _ in range(min(run.repeat, MAX_LAYERS)):
            for suffix, columns, cut, scalable in within:
                yield Matrix(
                    path=f"model.layers.{number}.{suffix}", suffix=suffix, columns=columns, cut=cut, scalable=scalable,
                    is_linear=not suffix.endswith(".experts"),
                )  # fmt: skip
            number += 1
        number += max(0, run.repeat - MAX_LAYERS)
    if not tied:
        yield Matrix(path=HEAD, suffix=HEAD, columns=hidden)


def _layer(model: Model, layer: Layer) -> Iterator[tuple[str, int, bool, bool]]:
    """(name, columns, whether they are cut, whether AWQ can scale them)."""
    hidden, attention, ffn = model.hidden_size, layer.attention, layer.ffn
    for name in ("q_proj", "k_proj", "v_proj"):
        yield f"self_attn.{name}", hidden, False, True
    yield "self_attn.o_proj", attention.heads * model.head_dim(attention), True, True
    if ffn.kind == "moe":
        if ffn.hidden_size == hidden:
            yield "mlp.experts", hidden, True, False
        else:
            yield from (
                ("mlp.experts", columns, cut, False) for columns, cut in ((hidden, False), (ffn.hidden_size, True))
            )
        if ffn.shared is not None:
            for name in ("gate_proj", "up_proj"):
                yield f"mlp.shared_experts.{name}", hidden, False, False
            yield "mlp.shared_experts.down_proj", ffn.shared.hidden_size, True, False
        return
    widen, narrow = (("gate_proj", "up_proj"), "down_proj") if ffn.kind == "swiglu" else (("fc1",), "fc2")
    for name in widen:
        yield f"mlp.{name}", hidden, False, True
    # A gelu stands between fc1 and fc2, and its input cannot be scaled in place of its output.
    yield f"mlp.{narrow}", ffn.hidden_size, True, ffn.kind == "swiglu"
