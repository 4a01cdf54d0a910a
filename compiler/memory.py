"""What a rank keeps in memory, from the Plan alone: plain Python, exact for parameters, derived for activations."""

from dataclasses import dataclass
from math import prod

from archwright.compiler.blocks import (
    DecoderLayer,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
    Norm,
    RMSNorm,
    SwiGLU,
)
from archwright.compiler.ir import Param, Plan, Program, Window
from archwright.spec.models import Build, Train

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LOGITS_CHUNK_BYTES = 64 << 20
"""Of one chunk's logits in the loss; equal to `cross_entropy.CHUNK_BYTES`, which cannot be imported without torch."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one rank at the fullest moment of a training step (the end of the forward).

    weights: masters (float32 under bfloat16). compute_weights: copies of them in the computation's dtype, made where
    they are used and kept for the backward; with `data_shard`, two gathered layers instead.
    """

    weights_bytes: int
    compute_weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes on one rank of a deployment. The few MB of activations and the back end's own workspace are not counted."""

    weights_bytes: int
    kv_cache_bytes: int


def training_memory(plan: Plan, train: Train, *, data_shard: int, sequences: int) -> TrainingMemory:
    """sequences: of one micro-batch on one rank; data_shard: ranks that share masters, gradients and states.

    Weights and gradients take one master value a parameter, AdamW's moments two, Muon's momentum one.
    """
    compute, master = BYTES[train.precision], max(4, BYTES[train.precision])
    params = plan.program.params()
    sizes = {name: stored_size(param) for name, param in params.items()}
    num_stored = sum(-(-size // data_shard) for size in sizes.values())
    muon = train.optimizer.kind == "muon"
    num_states = sum(
        -(-size // data_shard) * (1 if muon and params[name].is_projection else 2) for name, size in sizes.items()
    )
    if data_shard > 1:
        largest = max(_segment_sizes(plan.program))
        copies = 2 * largest * compute
    else:
        cast = sum(sizes[name] for name, param in params.items() if not {"vocab", "positions"} & set(param.axes))
        copies = 0 if compute == master else cast * compute
    tokens = sequences * train.sequence_length
    return TrainingMemory(
        weights_bytes=num_stored * master,
        compute_weights_bytes=copies,
        gradients_bytes=num_stored * master,
        optimizer_bytes=num_states * master,
        activations_bytes=tokens * activation_bytes_per_token(plan.local, compute)
        + mask_bytes(plan.program, train.sequence_length, compute),
        logits_bytes=_loss_bytes(plan.program, tokens, compute),
    )


def inference_memory(plan: Plan, build: Build) -> InferenceMemory:
    """Local weights in the precision of the build, and a cache of max_batch rows of max_positions tokens."""
    size = BYTES[build.precision]
    rows = build.max_batch * cache_positions(plan.program, build)
    return InferenceMemory(
        weights_bytes=plan.local.num_params() * size,
        kv_cache_bytes=rows * kv_bytes_per_token(plan.local, build.precision),
    )


def cache_positions(program: Program, build: Build) -> int:
    return build.max_positions or program.max_positions


def kv_bytes_per_token(program: Program, precision: str) -> int:
    """Bytes that one token adds to all caches: per layer 2 · kv_heads · head_dim values."""
    values = (
        prod(size or 1 for size in state.sizes) for states in program.states().values() for state in states.values()
    )
    return sum(values) * BYTES[precision]


def stored_size(param: Param) -> int:
    """Elements of a parameter that a rank stores in training: its piece, or all of it where ranks share pieces."""
    size = param.size
    for split in param.splits:
        size //= split.parts if split.parts == split.degree else 1
    return size


def activation_bytes_per_token(local: Program, compute_bytes: int) -> int:
    """Bytes that the forward keeps for the backward, for one token: eager, no recompute, a fused attention.

    Of each layer, with e bytes a value and w = max(4, e) where the mathematics is at least float32, local sizes:

        RMSNorm      w·D its input widened, w the root, e·D the normalised value, e·D its output (a matrix's input)
        LayerNorm    w·D its input widened, 2·w its moments, e·D its output
        attention    e·H·(N + K + K) q, k, v after the rotation; e·H·N its output; w·N the softmax's logarithm
        SwiGLU       e·F·4: gate, up, silu(gate), their product
        GELU         e·F·2: its input, its output
        experts      of each of a token's X experts e·(D + 4·F + D): its input, as of SwiGLU, its output; e·X weights
        router       see `_router_bytes`

    A layer has two norms. Residual sums keep nothing. After the layers comes the final norm; its output gives way to
    its gradient, which the loss forms in the forward. A test holds this against what autograd saves. Compiled layers
    keep less; on CPUs the attention's output is copied once more.
    """
    e, w = compute_bytes, max(4, compute_bytes)
    total, norm = 0, 0
    for segment in local.segments:
        layer = segment.block
        if not isinstance(layer, DecoderLayer):
            continue
        norm = _norm_bytes(layer.input_layernorm, e, w)
        q_width, kv_width = layer.self_attn.q_proj.weight.shape[0], layer.self_attn.k_proj.weight.shape[0]
        heads = q_width // layer.self_attn.head_dim
        mlp = layer.mlp
        inner = _moe_bytes(mlp, e, w) if isinstance(mlp, MixtureOfExperts) else e * _inner(mlp)
        total += 2 * norm + e * (2 * q_width + 2 * kv_width) + w * heads + inner
    return total + norm


def _inner(mlp: FeedForward) -> int:
    return 4 * mlp.up_proj.weight.shape[0] if isinstance(mlp, SwiGLU) else 2 * mlp.fc1.weight.shape[0]


def _moe_bytes(moe: MixtureOfExperts, e: int, w: int) -> int:
    """For one token. Where experts are spread over ranks, what a rank gets is taken to be what it gives."""
    _, inner, hidden = moe.experts.gate_proj.shape
    chosen = moe.routing.experts_per_token
    shared = _inner(moe.shared_experts) if moe.shared_experts else 0
    return e * (chosen * (2 * hidden + 4 * inner + 1) + shared) + _router_bytes(moe, e, w)


def _router_bytes(moe: MixtureOfExperts, e: int, w: int) -> int:
    """w·(3·E + 2): the logits, the scores of the weights and of the penalty, their sum, logsumexp; normalised weights
    keep what they were before, and its sum."""
    experts, chosen = moe.gate.weight.shape[0], moe.routing.experts_per_token
    return w * (3 * experts + 2 + (chosen + 1 if moe.routing.normalize else 0))


def mask_bytes(program: Program, sequence: int, compute_bytes: int) -> int:
    """Bytes of the masks of a forward: S² values for each kind of window that hides something; causal ones are none."""
    masks = {block.mask for _, block in program.blocks() if isinstance(block, GroupedQueryAttention)}
    return sum(sequence**2 * compute_bytes for mask in masks if isinstance(mask, Window) and mask.size < sequence)


def _norm_bytes(norm: Norm, e: int, w: int) -> int:
    hidden = norm.weight.size
    return hidden * (w + 2 * e) + w if isinstance(norm, RMSNorm) else hidden * (w + e) + 2 * w


def _loss_bytes(program: Program, tokens: int, compute_bytes: int) -> int:
    """One chunk of logits (in the computation's dtype, widened, and their log-softmax) and the head's gradient.

    The gradient, V · D wide values, is formed with the loss and waits for the backward; under bfloat16 the head's copy
    in that dtype is there as well.
    """
    wide = max(4, compute_bytes)
    head = program.sites()["lm_head.weight"].param
    chunk = min(tokens, max(1, LOGITS_CHUNK_BYTES // (program.vocab_size * wide)))
    narrow = 0 if compute_bytes == wide else compute_bytes
    return chunk * program.vocab_size * (2 * wide + narrow) + head.size * (wide + narrow)


def _segment_sizes(program: Program) -> list[int]:
    sites = program.sites()
    return [
        sum(
            stored_size(site.param)
            for place, site in sites.items()
            if segment.path and place.startswith(f"{segment.path}.")
        )
        for segment in program.segments
    ]
