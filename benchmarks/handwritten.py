"""A Llama and its training step as one writes them by hand for one GPU: what a compiled spec is measured against.

The numerics are those of `archwright train` under bfloat16: float32 masters, gradients and AdamW states; every weight
is cast where it is used; rotation, moments of the norms and the loss in at least float32; the gradient of the loss is
formed with the loss, in chunks of tokens. Names of parameters are Hugging Face's, so that both start from one state.

B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, F feed-forward, V vocabulary, T = B · S.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The default is Llama 3.2 1B: 1,235,814,400 parameters.

    fused: q, k, v and gate, up are each one product, their masters being joined where they are cast.
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    ffn_size: int = 8192
    eps: float = 1e-5
    theta: float = 500_000.0
    rope_factor: float | None = 32.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = 8192
    chunk_tokens: int = 4096
    fused: bool = False


class Linear(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def joined(x: torch.Tensor, *linears: Linear) -> tuple[torch.Tensor, ...]:
    """One product for several matrices that read the same input."""
    weight = torch.cat([linear.weight for linear in linears]).to(x.dtype)
    return F.linear(x, weight).split([linear.weight.shape[0] for linear in linears], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        wide_BSD = x_BSD.to(at_least_float32(x_BSD.dtype))
        normed_BSD = wide_BSD * torch.rsqrt(wide_BSD.square().mean(-1, keepdim=True) + self.eps)
        return normed_BSD.to(x_BSD.dtype) * self.weight.to(x_BSD.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)

    def forward(self, x_BSD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        split = joined(x_BSD, *projections) if self.config.fused else [project(x_BSD) for project in projections]
        q_BNSH, k_BKSH, v_BKSH = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in split)
        y_BNSH = F.scaled_dot_product_attention(
            rotate(q_BNSH, rotation),
            rotate(k_BKSH, rotation),
            v_BKSH,
            is_causal=True,
            enable_gqa=self.config.num_heads != self.config.num_kv_heads,
        )
        return self.o_proj(y_BNSH.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fused = config.fused
        self.gate_proj = Linear(config.hidden_size, config.ffn_size)
        self.up_proj = Linear(config.hidden_size, config.ffn_size)
        self.down_proj = Linear(config.ffn_size, config.hidden_size)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        pair = (self.gate_proj, self.up_proj)
        gate_BSF, up_BSF = joined(x_BSD, *pair) if self.fused else (pair[0](x_BSD), pair[1](x_BSD))
        return self.down_proj(F.silu(gate_BSF) * up_BSF)


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BSD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotation)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class Llama(nn.Module):
    """model(ids_BS, targets_BS, scale) → scale · Σ -log p(target). The head is the embedding's table."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        """dtype: of the computation."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, ids_BS: torch.Tensor, targets_BS: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rotation = rotation_table(self.config, ids_BS.shape[1], ids_BS.device, at_least_float32(self.dtype))
        x_BSD = self.model.embed_tokens(ids_BS).to(self.dtype)
        for layer in self.model.layers:
            x_BSD = layer(x_BSD, rotation)
        x_TD = self.model.norm(x_BSD).flatten(0, 1)
        head_VD, chunk = self.model.embed_tokens.weight, self.config.chunk_tokens
        return LinearCrossEntropy.apply(x_TD, head_VD, targets_BS.flatten(), scale, chunk)

    def compile_layers(self) -> None:
        """In place, one by one: equal layers share their code. The last norm stands alone between them and the loss."""
        for module in (*self.model.layers, self.model.norm):
            module.compile(fullgraph=True)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@cache
def rotation_table(config: Config, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """cos and sin [S, H/2], with the frequencies of Llama 3.1 where `rope_factor` is set."""
    half = torch.arange(config.head_dim // 2, dtype=torch.float64, device=device)
    frequency_H = config.theta ** (-2 * half / config.head_dim)
    if config.rope_factor is not None:
        turns_H = config.rope_original * frequency_H / (2 * math.pi)
        smooth_H = ((turns_H - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
        frequency_H = frequency_H * (smooth_H + (1 - smooth_H) / config.rope_factor)
    angle_SH = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency_H)
    return angle_SH.cos().to(dtype), angle_SH.sin().to(dtype)


def rotate(x_BNSH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    cos_SH, sin_SH = rotation
    first, second = x_BNSH.to(cos_SH.dtype).chunk(2, dim=-1)
    rotated = torch.cat([first * cos_SH - second * sin_SH, second * cos_SH + first * sin_SH], dim=-1)
    return rotated.to(x_BNSH.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """scale · Σ -log softmax(x · weightᵀ)[target]; the gradients are formed here, so the logits need not be kept.

    The loss is the root of the backward: the gradient that comes from above is taken to be 1.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, scale: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        matrix_VD = weight_VD.to(x_TD.dtype)
        loss = torch.zeros((), dtype=at_least_float32(x_TD.dtype), device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD)
        grad_weight_VD = torch.zeros_like(weight_VD)
        form = compiled_loss_and_gradient() if x_TD.is_cuda else loss_and_gradient
        for start in range(0, x_TD.shape[0], chunk):
            x_tD, targets_t = x_TD[start : start + chunk], targets_T[start : start + chunk]
            part, grad_tV = form(x_tD @ matrix_VD.T, targets_t, scale)
            loss += part
            torch.mm(grad_tV, matrix_VD, out=grad_x_TD[start : start + chunk])
            add_product(grad_weight_VD, grad_tV.T, x_tD)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return grad_x_TD, grad_weight_VD, None, None, None


def loss_and_gradient(
    logits_tV: torch.Tensor, targets_t: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale · Σ -log softmax(logits)[target], and its gradient in the dtype of the logits."""
    wide_tV = logits_tV.to(at_least_float32(logits_tV.dtype))
    total_t1 = torch.logsumexp(wide_tV, dim=-1, keepdim=True)
    weight_t1 = (targets_t != IGNORED)[:, None] * scale
    picked_t1 = targets_t.clamp(min=0)[:, None]
    loss = ((total_t1 - wide_tV.gather(1, picked_t1)) * weight_t1).sum()
    columns_V = torch.arange(logits_tV.shape[1], device=logits_tV.device)
    grad_tV = ((wide_tV - total_t1).exp() - (columns_V == picked_t1).to(wide_tV.dtype)) * weight_t1
    return loss, grad_tV.to(logits_tV.dtype)


@cache
def compiled_loss_and_gradient() -> Any:
    return torch.compile(loss_and_gradient, dynamic=False)


def add_product(sum_: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """sum_ += a · b, in one kernel where the matrix product can add to a wider sum."""
    if sum_.dtype == a.dtype:
        sum_.addmm_(a, b)
    elif wide_product(sum_.device, sum_.dtype, a.dtype):
        torch.addmm(sum_, a, b, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_ += a @ b


@cache
def wide_product(device: torch.device, wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether torch adds a narrow product to a wide sum in place here."""
    sum_ = torch.ones(64, 64, dtype=wide, device=device)
    factor = torch.ones(64, 64, dtype=narrow, device=device)
    try:
        torch.addmm(sum_, factor, factor, out_dtype=wide, out=sum_)
    except (RuntimeError, TypeError):
        return False
    return bool((sum_ == 65).all())


def make_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], eps: float, decay: float
) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def train_step(
    model: Llama, optimizer: torch.optim.AdamW, ids_BS: torch.Tensor, targets_BS: torch.Tensor, micro_batches: int
) -> torch.Tensor:
    """One step; the mean loss, on the device: nothing here waits for it."""
    scale = 1 / (targets_BS != IGNORED).sum().clamp(min=1).to(at_least_float32(model.dtype))
    loss = torch.zeros_like(scale)
    for ids_bS, targets_bS in zip(ids_BS.chunk(micro_batches), targets_BS.chunk(micro_batches), strict=True):
        part = model(ids_bS, targets_bS, scale)
        part.backward()
        loss += part.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
