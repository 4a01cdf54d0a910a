"""Context parallelism: which tokens of a sequence each rank has, and attention over the keys of all of them.

Under a causal mask a token's work grows with its position. Each of c ranks takes two chunks of S / 2c tokens, one early
and one late, so that all have the same (the split of Llama 3's training, Grattafiori et al. 2024):

    c = 2     position  0 ─ S/4 ─ S/2 ─ 3S/4 ─ S
              rank      |  0  |  1  |  1   |  0  |
"""

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from archwright.compiler.distributed.collectives import gather_from

Tensor = torch.Tensor
FLASH_MULTIPLE = 8
"""Of the channels of a head that the operator of FlashAttention takes."""


def positions_of(length: int, degree: int, rank: int, device: torch.device) -> Tensor:
    """Positions [S / c] of the tokens of a rank, in its order."""
    chunk = length // (2 * degree)
    late = 2 * degree - 1 - rank
    return torch.cat([torch.arange(start * chunk, (start + 1) * chunk, device=device) for start in (rank, late)])


def gathered_order(length: int, degree: int, device: torch.device) -> Tensor:
    """Place [S] in the concatenation of all ranks' tokens of each position: what puts them in order again."""
    return torch.cat([positions_of(length, degree, rank, device) for rank in range(degree)]).argsort()


def gather_sequence(x_BKSH: Tensor, group: ProcessGroup) -> Tensor:
    """[B, heads, S / c, H] of each rank → [B, heads, S, H] in the order of positions."""
    whole = gather_from(x_BKSH, group, 2)
    return whole.index_select(2, gathered_order(whole.shape[2], group.size(), whole.device))


def causal_chunks(q_BNSH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, scale: float, group: ProcessGroup) -> Tensor:
    """Causal attention of a rank's two chunks, each with the keys up to its own end, by FlashAttention.

    This operator aligns its causal mask to the lower right (torch.nn.attention.bias says so): the last query sees all
    keys. A mask tensor would lose the kernel.
    """
    chunk = q_BNSH.shape[2] // 2
    ends = ((group.rank() + 1) * chunk, (2 * group.size() - group.rank()) * chunk)
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    q, k, v = (fill_for_flash(x) for x in (q_BNSH, k_BKLH, v_BKLH))
    parts = [
        flash(q_BNcH, k[:, :, :end], v[:, :, :end], 0.0, True, scale=scale)[0]
        for q_BNcH, end in zip(q.chunk(2, dim=2), ends, strict=True)
    ]
    return torch.cat(parts, dim=2)[..., : q_BNSH.shape[-1]]


def fill_for_flash(x: Tensor) -> Tensor:
    """Zeros after the channels of each head, up to a multiple of 8: products with them add nothing."""
    missing = -x.shape[-1] % FLASH_MULTIPLE
    return F.pad(x, (0, missing)) if missing and x.is_cuda and x.dtype.itemsize == 2 else x
