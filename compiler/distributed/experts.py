"""Expert parallelism: rows travel to the ranks that hold their experts, and back (Lepikhin et al. 2021). Dropless.

rank 0:  rows of experts 0 0 1 2 3 3            0 0 1 | 0 1          experts 0 and 1 compute, rows travel back
rank 1:  rows of experts 0 1 2 2 3 3     ──▶    2 3 3 | 2 2 3 3      experts 2 and 3

N rows of this rank, M rows that it receives, R ranks, E experts of all ranks, L = E / R of each, D hidden.
"""

from collections.abc import Callable

import torch
from torch.distributed import ProcessGroup, all_to_all_single

from archwright.compiler.distributed.collectives import all_to_all
from archwright.compiler.interpreters.sorting import permute, sort_by_expert

Tensor = torch.Tensor


@torch.compiler.disable(reason="sizes that travel are known at run time only")
def through_experts(
    x_ND: Tensor, ends_E: Tensor, group: ProcessGroup, compute: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What the experts of all ranks make of this rank's rows, which are sorted by expert.

    ends_E: the rows before the end of each expert's. compute: (rows sorted by local expert [M, D], their ends [L]) →
    the rows' results. The host waits for the counts, since the sizes of what travels depend on them.
    """
    sent_RL = ends_E.diff(prepend=ends_E.new_zeros(1)).unflatten(0, (group.size(), -1))
    received_RL = torch.empty_like(sent_RL)
    all_to_all_single(received_RL, sent_RL.contiguous(), group=group)
    to_ranks, from_ranks = torch.stack([sent_RL, received_RL]).sum(dim=2).tolist()
    x_MD = all_to_all(x_ND, to_ranks, from_ranks, group)
    local_RL = torch.arange(sent_RL.shape[1], device=x_ND.device).expand(sent_RL.shape)
    by_expert = sort_by_expert(local_RL.flatten().repeat_interleave(received_RL.flatten()), sent_RL.shape[1])
    y_MD = compute(permute(x_MD, by_expert.order_N, by_expert.inverse_N), by_expert.ends_E)
    return all_to_all(permute(y_MD, by_expert.inverse_N, by_expert.order_N), from_ranks, to_ranks, group)
