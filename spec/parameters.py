"""The number of parameters of an architecture, from its sizes alone; the compiler's own count must agree."""

from archwright.spec.models import Ffn, Layer, Model, Norm, Spec


def num_parameters(spec: Spec) -> int:
    """Embedding (and one of positions), layers, final norm, and a head unless it is tied."""
    model = spec.model
    embeddings = model.vocab_size * (1 if model.tied_embeddings else 2)
    if model.positions is not None:
        embeddings += model.max_positions
    layers = sum(run.repeat * _layer(model, run.layer) for run in model.runs)
    return embeddings * model.hidden_size + layers + _norm(model, model.runs[-1].layer.norm)


def _layer(model: Model, layer: Layer) -> int:
    """q and o are hidden x heads · head_dim, k and v hidden x kv_heads · head_dim; a bias has the size of its matrix's
    output."""
    hidden, attention = model.hidden_size, layer.attention
    queries = attention.heads * model.head_dim(attention)
    keys = (attention.kv_heads or attention.heads) * model.head_dim(attention)
    total = 2 * hidden * (queries + keys) + _ffn(hidden, layer.ffn)
    total += 0 if attention.bias == "none" else queries + 2 * keys
    total += hidden if attention.bias == "all" else 0
    return total + 2 * _norm(model, layer.norm)


def _ffn(hidden: int, ffn: Ffn) -> int:
    """Two or three matrices hidden x ffn, with biases; of a mixture of experts three for each expert and for the shared
    one, and the router, hidden x experts."""
    if ffn.kind == "moe":
        shared = ffn.shared.hidden_size if ffn.shared else 0
        return hidden * ffn.experts + 3 * hidden * (ffn.experts * ffn.hidden_size + shared)
    inner_matrices = 2 if ffn.kind == "swiglu" else 1
    biases = inner_matrices * ffn.hidden_size + hidden if ffn.bias else 0
    return (inner_matrices + 1) * hidden * ffn.hidden_size + biases


def _norm(model: Model, norm: Norm) -> int:
    return model.hidden_size * (2 if norm.kind == "layernorm" and norm.bias else 1)
