"""torch: the same Program as `nn.Module`s that train and run.

B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, V vocabulary, L visible positions,
P cache capacity, T = B · S tokens.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from archwright.compiler.distributed.collectives import all_gather, copy_to, gather_from, join, reduce_from, scatter_to
from archwright.compiler.distributed.context import causal_chunks, gather_sequence
from archwright.compiler.distributed.ring import ring_attention
from archwright.compiler.interpreters.cross_entropy import LinearCrossEntropy, Rows
from archwright.compiler.interpreters.torch_moe import TorchMoe
from archwright.compiler.ir import Boundary, Causal, Mask, Param, RopeTable, Step, Window

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TorchStep(Step[Tensor]):
    """A step with what many layers share, computed once.

    rotations: cos and sin [B, 1, S, H/2] by the table's key.
    masks: what is added to the scores [B, 1, S, L], 0 or -inf, by the mask's key; one that is not there is plainly
    causal. Not boolean, since torch would then make and keep such a tensor for each layer.
    """

    rotations: Mapping[str, tuple[Tensor, Tensor]]
    masks: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TorchOps(TorchMoe):
    """Ops over torch tensors.

    dtype: of the computation; parameters may be wider (float32 masters under bfloat16), each use casts them.
    groups, ranks: mesh axis → process group and this rank's coordinate on it; axes of one rank are left out.
    vocab_size: rows of the whole vocabulary, where ranks share them.
    sequence: whether tensor ranks share the tokens between the matrices. token_dim: along which dim of [B, S, D]; the
    pieces of whole sequences (0) are joined without a copy, and routers need pieces of each sequence (1).
    ring: context ranks pass keys and values on instead of gathering them; masks are causal then.
    """

    dtype: torch.dtype
    vocab_size: int = 0
    sequence: bool = False
    token_dim: int = 1
    ring: bool = False
    groups: Mapping[str, ProcessGroup] = field(default_factory=dict[str, ProcessGroup])
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])

    def enter(self, x: Tensor, boundary: Boundary) -> Tensor:
        group = self.groups[boundary.mesh_axis]
        if not x.is_floating_point():
            return all_gather(x, group, self.token_dim) if boundary.tokens else x
        return gather_from(x, group, self.token_dim) if boundary.tokens else copy_to(x, group)

    def reduce(self, y: Tensor, boundary: Boundary) -> Tensor:
        """Add up the ranks' parts; with `tokens` each goes on with its piece."""
        group = self.groups[boundary.group]
        return scatter_to(y, group, self.token_dim) if boundary.tokens else reduce_from(y, group)

    def param(self, value: Tensor, param: Param) -> Tensor:
        """The part of a parameter that this rank computes with."""
        if not isinstance(value, DTensor):
            return value
        local, split = value.to_local(), param.split
        if param.partial is not None:
            return copy_to(local, self.groups[param.partial])
        if split is None or split.parts == split.degree:
            return local
        # Fewer key/value heads than ranks: the weight is replicated, each rank uses one head and adds its gradient.
        return copy_to(local, self.groups[split.mesh_axis])[split.slices(param.shape, self.ranks[split.mesh_axis])]

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        reduce: Boundary | None,
        gather: Boundary | None = None,
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if reduce is not None:
            y = self.reduce(F.linear(x, weight.to(x.dtype)), reduce)
            return y if bias is None else y + bias
        y = F.linear(x, weight.to(x.dtype), bias)
        return y if gather is None else join(y, self.groups[gather.mesh_axis], -1)[..., : self.vocab_size]

    def dequantize(self, weight: Tensor, scale: Tensor) -> Tensor:
        groups = weight.to(self.dtype).unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale.to(self.dtype)[..., None]).flatten(-2)

    def round_to_float8(self, x: Tensor, scale_11: Tensor) -> Tensor:
        scale = scale_11.to(x.dtype)[0, 0]
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale

    def embed(self, ids_BS: Tensor, weight_VD: Tensor, *, reduce: Boundary | None) -> Tensor:
        if reduce is None:
            return F.embedding(ids_BS, weight_VD).to(self.dtype)
        local_BS = ids_BS - self.ranks[reduce.mesh_axis] * weight_VD.shape[0]
        here_BS = (local_BS >= 0) & (local_BS < weight_VD.shape[0])
        rows_BSD = F.embedding(local_BS.where(here_BS, 0), weight_VD).to(self.dtype)
        return self.reduce(rows_BSD * here_BS[..., None], reduce)

    def rms_norm(self, x_BSD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_BSD = x_BSD.to(_at_least_float32(x_BSD.dtype))
        normed_BSD = wide_BSD * torch.rsqrt(wide_BSD.square().mean(-1, keepdim=True) + eps)
        return normed_BSD.to(x_BSD.dtype) * weight_D.to(x_BSD.dtype)

    def layer_norm(self, x_BSD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        wide = _at_least_float32(x_BSD.dtype)
        bias_D = None if bias_D is None else bias_D.to(wide)
        return F.layer_norm(x_BSD.to(wide), weight_D.shape, weight_D.to(wide), bias_D, eps).to(x_BSD.dtype)

    def take_token(self, x_BSD: Tensor, index_B: Tensor) -> Tensor:
        return x_BSD[torch.arange(len(index_B), device=x_BSD.device), index_B][:, None]

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def gelu(self, x: Tensor, approximation: str) -> Tensor:
        return F.gelu(x, approximate=approximation)

    def channels(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def rope(self, x_BNSH: Tensor, table: RopeTable, step: TorchStep) -> Tensor:
        cos_B1SH, sin_B1SH = step.rotations[table.key]
        first, second = x_BNSH.to(cos_B1SH.dtype).chunk(2, dim=-1)
        rotated = torch.cat([first * cos_B1SH - second * sin_B1SH, second * cos_B1SH + first * sin_B1SH], dim=-1)
        return rotated.to(x_BNSH.dtype)

    def kv_update(self, m: Any, name: str, x_BKSH: Tensor, step: TorchStep) -> Tensor:
        if step.write_index_B is None or step.kv_positions_L is None:
            return x_BKSH
        cache_BKPH = m.cache[name]
        batch, _, length, _ = x_BKSH.shape
        rows_BS = step.write_index_B[:, None] + torch.arange(length, device=x_BKSH.device)
        cache_BKPH[torch.arange(batch, device=x_BKSH.device)[:, None], :, rows_BS] = x_BKSH.transpose(1, 2)
        return cache_BKPH[:, :, : step.kv_positions_L.shape[0]]

    def attention(
        self, q_BNSH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *, mask: Mask, scale: float, step: TorchStep
    ) -> Tensor:
        if "context" in self.groups:
            group = self.groups["context"]
            if self.ring:
                assert mask == Causal(), "the language refuses other masks"
                return ring_attention(q_BNSH, k_BKLH, v_BKLH, scale, group)
            k_BKLH, v_BKLH = gather_sequence(k_BKLH, group), gather_sequence(v_BKLH, group)
            if not self.reads_mask(mask, q_BNSH.device):
                return causal_chunks(q_BNSH, k_BKLH, v_BKLH, scale, group)
        mask_B1SL = step.masks.get(mask.key)
        return F.scaled_dot_product_attention(
            q_BNSH,
            k_BKLH,
            v_BKLH,
            attn_mask=mask_B1SL,
            is_causal=mask_B1SL is None,
            scale=scale,
            enable_gqa=q_BNSH.shape[1] != k_BKLH.shape[1],
        )

    def reads_mask(self, mask: Mask, device: torch.device) -> bool:
        """Whether attention needs the mask as a tensor; without it, context ranks need no S x S values."""
        chunks = device.type == "cuda" and self.dtype.itemsize == 2
        return not ("context" in self.groups and mask == Causal() and (self.ring or chunks))

    def linear_cross_entropy(
        self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, *, gather: Boundary | None
    ) -> tuple[Tensor, Tensor]:
        targets_T = targets_BS.flatten()
        if not torch.is_grad_enabled():
            # An autograd.Function cannot see `no_grad`, and would form gradients that nobody asks for.
            x_BSD, weight_VD = x_BSD.detach(), weight_VD.detach()
        loss_sum = LinearCrossEntropy.apply(x_BSD.flatten(0, 1), weight_VD, targets_T, self._rows(weight_VD, gather))
        return loss_sum, (targets_T != -100).sum()

    def _rows(self, weight_VD: Tensor, gather: Boundary | None) -> Rows | None:
        """Which rows of the vocabulary this rank has, where ranks share them."""
        if gather is None:
            return None
        size = weight_VD.shape[0]
        first = self.ranks[gather.mesh_axis] * size
        return Rows(group=self.groups[gather.mesh_axis], first=first, real=max(0, min(size, self.vocab_size - first)))


def make_step(
    tables: Mapping[str, RopeTable],
    masks: Iterable[Mask],
    dtype: torch.dtype,
    *,
    positions_BS: Tensor,
    keys: int | None = None,
    write_index_B: Tensor | None = None,
    targets_BS: Tensor | None = None,
    penalized: bool = True,
) -> TorchStep:
    """The step of a forward. positions_BS: of its tokens; one row serves the whole batch.

    keys: attention meets the keys of the positions 0..keys-1, in a cache or of all context ranks; by default those of
    the tokens themselves.
    """
    device = positions_BS.device
    keys_L = None if keys is None else torch.arange(keys, device=device)
    shown = _visible(masks, positions_BS, keys_L)
    return TorchStep(
        positions_BS=positions_BS,
        write_index_B=write_index_B,
        kv_positions_L=None if write_index_B is None else keys_L,
        targets_BS=targets_BS,
        penalized=penalized,
        rotations={key: _rotation(table, positions_BS, dtype) for key, table in tables.items()},
        masks={
            key: torch.zeros(shown_B1SL.shape, dtype=dtype, device=device).masked_fill_(~shown_B1SL, -math.inf)
            for key, shown_B1SL in shown.items()
        },
    )


def _visible(masks: Iterable[Mask], positions_BS: Tensor, keys_L: Tensor | None) -> dict[str, Tensor]:
    """Boolean masks [B, 1, S, L] by key, of those that are not plainly causal: FlashAttention takes no boolean mask."""
    length = positions_BS.shape[1]
    if keys_L is None:
        masks = [mask for mask in masks if isinstance(mask, Window) and mask.size < length]
    keys_BL = positions_BS if keys_L is None else keys_L[None]
    distance_B1SL = positions_BS[:, None, :, None] - keys_BL[:, None, None, :]
    causal_B1SL = distance_B1SL >= 0
    return {
        mask.key: causal_B1SL & (distance_B1SL < mask.size) if isinstance(mask, Window) else causal_B1SL
        for mask in masks
    }


def _rotation(table: RopeTable, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, H/2]. The angle is formed in float64, since float32 is off by 4e-3 at position 131,071."""
    frequencies = _frequencies(table, positions_BS.device)
    angle_B1SH = positions_BS[:, None, :, None] * frequencies
    wide = _at_least_float32(dtype)
    return angle_B1SH.cos().to(wide), angle_B1SH.sin().to(wide)


def _frequencies(table: RopeTable, device: torch.device) -> Tensor:
    """[H/2], sent without waiting for the device."""
    values = torch.tensor(table.frequencies(), dtype=torch.float64)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
