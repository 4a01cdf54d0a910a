"""Ring attention (Liu et al. 2023): context ranks pass keys and values on to their neighbour instead of gathering them.

Causal, with the split of `context.py`: a rank has an early and a late chunk, so each block that arrives takes the same
work: half of the rank's own queries times keys.

    from rank    keys that are seen           by queries
    itself       both chunks, causally        of both chunks
    an earlier   the early chunk              of both chunks
    a later      both chunks                  of the late chunk

Blocks are joined by their logsumexp l: out = Σ exp(l_i - l) out_i with l = log Σ exp(l_i). The backward forms each
block again from l (Dao 2023) while the gradients of keys and values travel with them, once around and home.

B batch, N query heads, K key/value heads, S tokens of a rank, T keys of a block, H head_dim, G = N / K.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from archwright.compiler.distributed.context import fill_for_flash

Tensor = torch.Tensor
_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
# torch's own way back from the name that an operator can carry; its type stubs leave it out.
_group_called: Callable[[str], ProcessGroup] = getattr(distributed_c10d, "_resolve_process_group")  # noqa: B009


def ring_attention(q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, group: ProcessGroup) -> Tensor:
    """Causal attention [B, N, S, H] of a rank's tokens to those of the whole group."""
    q, k, v = (fill_for_flash(x) for x in (q_BNSH, k_BKSH, v_BKSH))
    return _attend(q, k, v, scale, group.group_name)[0][..., : q_BNSH.shape[-1]]


# One operator to torch.compile, which cannot see into messages between two ranks.
@torch.library.custom_op("archwright::ring_attention", mutates_args=())
def _attend(
    q_BNSH: torch.Tensor, k_BKSH: torch.Tensor, v_BKSH: torch.Tensor, scale: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, N, S, H], logsumexp [B, N, S] in at least float32)."""
    ranks = _group_called(group)
    half, kv = q_BNSH.shape[2] // 2, torch.stack([k_BKSH, v_BKSH])
    out, lse = q_BNSH, None
    for turn in range(ranks.size()):
        arriving = _pass_on(kv, ranks) if turn + 1 < ranks.size() else None
        owner = (ranks.rank() - turn) % ranks.size()
        queries, keys = _seen(owner, ranks.rank(), half)
        part, part_lse = _block(q_BNSH[:, :, queries], *kv[:, :, :, keys], scale, causal=lse is None)
        if lse is None:
            out, lse = part.to(_wide(q_BNSH)), part_lse
        else:
            joined = torch.logaddexp(lse[:, :, queries], part_lse)
            old, new = (lse[:, :, queries] - joined).exp()[..., None], (part_lse - joined).exp()[..., None]
            out[:, :, queries] = out[:, :, queries] * old + part * new
            lse[:, :, queries] = joined
        kv = kv if arriving is None else arriving()
    assert lse is not None
    # As the fake says: kernels return theirs in the order of the queries' dimensions in memory, whatever that is.
    return out.to(q_BNSH.dtype).contiguous(), lse.contiguous()


@torch.library.custom_op("archwright::ring_attention_backward", mutates_args=())
def _attend_backward(
    grad_BNSH: torch.Tensor,
    q_BNSH: torch.Tensor,
    k_BKSH: torch.Tensor,
    v_BKSH: torch.Tensor,
    out_BNSH: torch.Tensor,
    lse_BNS: torch.Tensor,
    scale: float,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v. Those of k and v are sums over the group, in at least float32 on the way."""
    ranks = _group_called(group)
    half, kv, wide = q_BNSH.shape[2] // 2, torch.stack([k_BKSH, v_BKSH]), _wide(q_BNSH)
    grad_q = torch.zeros(q_BNSH.shape, dtype=wide, device=q_BNSH.device)
    grad_kv = torch.zeros(kv.shape, dtype=wide, device=kv.device)
    coming: Callable[[], Tensor] | None = None
    for turn in range(ranks.size()):
        arriving = _pass_on(kv, ranks) if turn + 1 < ranks.size() else None
        owner = (ranks.rank() - turn) % ranks.size()
        queries, keys = _seen(owner, ranks.rank(), half)
        grad, q, out, lse = (tensor[:, :, queries] for tensor in (grad_BNSH, q_BNSH, out_BNSH, lse_BNS))
        k, v = kv[:, :, :, keys]
        grads = _block_backward(grad, q, out, lse, k, v, scale, causal=turn == 0)
        grad_q[:, :, queries] += grads[0]
        if coming is not None:  # what the ranks before have added for these keys
            grad_kv = coming()
        grad_kv[:, :, :, keys] += torch.stack(grads[1:])
        coming = _pass_on(grad_kv, ranks)
        kv = kv if arriving is None else arriving()
    assert coming is not None
    grad_k, grad_v = coming().to(q_BNSH.dtype)
    return grad_q.to(q_BNSH.dtype), grad_k.clone(), grad_v.clone()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _seen(owner: int, rank: int, half: int) -> tuple[slice, slice]:
    """(queries of `rank`, keys of `owner`) that meet."""
    everything = slice(None)
    if owner == rank:
        return everything, everything
    return (everything, slice(half)) if owner < rank else (slice(half, None), everything)


def _pass_on(tensor: Tensor, ranks: ProcessGroup) -> Callable[[], Tensor]:
    """Start to send a tensor to the next rank and to receive the previous one's, which the result waits for."""
    rank, degree = ranks.rank(), ranks.size()
    # Both are held until the result has been waited for: their memory must not be used for something else before.
    held = tensor.contiguous(), torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    to, source = (dist.get_global_rank(ranks, each % degree) for each in (rank + 1, rank - 1))
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, held[0], to, ranks), dist.P2POp(dist.irecv, held[1], source, ranks)]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return held[1]

    return wait


def _flashes(x: Tensor) -> bool:
    """Whether FlashAttention takes the tensor; torch's own functions do the work otherwise, with all scores at hand."""
    return x.is_cuda and x.dtype.itemsize == 2


def _block(q_BNSH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, logsumexp) of the queries and these keys alone."""
    if _flashes(q_BNSH):
        out, lse, *_ = _flash(q_BNSH, k_BKTH, v_BKTH, 0.0, causal, scale=scale)
        return out, lse
    scores_BKGST = _scores(q_BNSH, k_BKTH, scale, causal)
    lse_BKGS = scores_BKGST.logsumexp(-1)
    out = torch.einsum("bkgst,bkth->bkgsh", (scores_BKGST - lse_BKGS[..., None]).exp(), v_BKTH.to(_wide(q_BNSH)))
    return out.flatten(1, 2), lse_BKGS.flatten(1, 2)


def _block_backward(
    grad_BNSH: Tensor, q_BNSH: Tensor, out_BNSH: Tensor, lse_BNS: Tensor, k_BKTH: Tensor, v_BKTH: Tensor,
    scale: float, *, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A block's part of the gradients of q, k and v; out and logsumexp are those of all blocks."""
    if _flashes(q_BNSH):
        random = torch.empty(2, dtype=torch.uint64, device=q_BNSH.device)  # of dropout, which there is none of
        # The kernel finds a row's logsumexp by its number, without strides. It brings other tensors into order itself.
        return _flash_backward(
            grad_BNSH, q_BNSH, k_BKTH, v_BKTH, out_BNSH, lse_BNS.contiguous(), None, None,
            q_BNSH.shape[2], k_BKTH.shape[2], 0.0, causal, random, random, scale=scale,
        )  # fmt: skip
    wide, groups = _wide(q_BNSH), (k_BKTH.shape[1], -1)
    grad, q, out = (x.to(wide).unflatten(1, groups) for x in (grad_BNSH, q_BNSH, out_BNSH))
    k, v = k_BKTH.to(wide), v_BKTH.to(wide)
    weights_BKGST = (_scores(q_BNSH, k_BKTH, scale, causal) - lse_BNS.unflatten(1, groups)[..., None]).exp()
    rising_BKGST = torch.einsum("bkgsh,bkth->bkgst", grad, v) - (grad * out).sum(-1, keepdim=True)
    score_grad = weights_BKGST * rising_BKGST * scale
    grad_q = torch.einsum("bkgst,bkth->bkgsh", score_grad, k).flatten(1, 2)
    grad_k = torch.einsum("bkgst,bkgsh->bkth", score_grad, q)
    return grad_q, grad_k, torch.einsum("bkgst,bkgsh->bkth", weights_BKGST, grad)


def _scores(q_BNSH: Tensor, k_BKTH: Tensor, scale: float, causal: bool) -> Tensor:
    """[B, K, G, S, T] in at least float32."""
    wide = _wide(q_BNSH)
    grouped_BKGSH = q_BNSH.to(wide).unflatten(1, (k_BKTH.shape[1], -1))
    scores = torch.einsum("bkgsh,bkth->bkgst", grouped_BKGSH, k_BKTH.to(wide)) * scale
    if not causal:
        return scores
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, float("-inf"))


@_attend.register_fake
def _(q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, group: str) -> tuple[Tensor, Tensor]:
    return q_BNSH.new_empty(q_BNSH.shape), q_BNSH.new_empty(q_BNSH.shape[:3], dtype=_wide(q_BNSH))


@_attend_backward.register_fake
def _(grad_BNSH: Tensor, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in (q_BNSH, k_BKSH, v_BKSH))
    return q, k, v


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, ctx.group = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad_BNSH: Tensor, _: Tensor | None) -> Any:
    return *_attend_backward(grad_BNSH, *ctx.saved_tensors, ctx.scale, ctx.group), None, None


_attend.register_autograd(_backward, setup_context=_keep)
RING_ATTENTION = torch.ops.archwright.ring_attention.default
"""The operator as graphs have it, for what says which values are kept."""
