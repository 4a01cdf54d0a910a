"""One of two ranks on GPUs: exchanges of changing sizes, with ranks that are late in turn, against NCCL's.

torchrun --nproc-per-node 2 tests/compiler/distributed/symmetric_worker.py
"""

import os

import torch
import torch.distributed as dist

from archwright.compiler.distributed import symmetric
from archwright.compiler.distributed.collectives import gather_from, scatter_to

ROUNDS = 300


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    assert (problem := symmetric.open_window(group)) is None, problem
    assert symmetric.has_window(group)
    generator = torch.Generator("cuda").manual_seed(rank)
    for turn in range(ROUNDS):
        rows, dtype = [(64, torch.float32), (4096, torch.bfloat16), (1, torch.float64)][turn % 3]
        if turn % 5 == rank:
            torch.cuda._sleep(2_000_000)  # a millisecond
        piece = torch.randn(rows, 512, device="cuda", generator=generator).to(dtype)
        whole = torch.empty(2 * rows, 512, device="cuda", dtype=dtype)
        dist.all_gather_into_tensor(whole, piece, group=group)
        assert torch.equal(gather_from(piece, group, 0), whole), f"gather {turn}"
        part = whole + rank
        own = torch.empty_like(piece)
        dist.reduce_scatter_tensor(own, part, group=group)
        assert torch.equal(scatter_to(part, group, 0), own), f"scatter {turn}"
    symmetric.close_window(group)
    assert not symmetric.has_window(group)
    print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
