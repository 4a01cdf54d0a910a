"""The ring's operators, with a thread for each rank: on a CPU, and FlashAttention's way on one GPU."""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from archwright.compiler.distributed import ring
from archwright.compiler.distributed.context import fill_for_flash, positions_of
from tests.compiler.distributed.ranks import Rank

Tensor = torch.Tensor
LENGTH = 64
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CASES = [
    pytest.param("cpu", torch.float64, 1e-12),
    pytest.param("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.float32, 1e-5, marks=GPU),
    pytest.param("cuda", torch.bfloat16, 2e-2, marks=GPU),
]


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[int, str], Any]], list[Any]]:
    """Call a function of (rank, name of its group) for each rank; messages between them go through queues."""

    def run(degree: int, work: Callable[[int, str], Any]) -> list[Any]:
        arrived: list[queue.Queue[Tensor]] = [queue.Queue() for _ in range(degree)]

        def pass_on(tensor: Tensor, ranks: Rank) -> Callable[[], Tensor]:
            arrived[(ranks.number + 1) % degree].put(tensor.contiguous().clone())
            return lambda: arrived[ranks.number].get(timeout=60)

        monkeypatch.setattr(ring, "_group_called", lambda name: Rank(int(name), degree))
        monkeypatch.setattr(ring, "_pass_on", pass_on)
        with ThreadPoolExecutor(degree) as pool:
            return list(pool.map(lambda rank: work(rank, str(rank)), range(degree)))

    return run


def whole(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """(out, gradients of q, k, v) of plain causal attention in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("order", ["heads first", "tokens first"])
@pytest.mark.parametrize("device, dtype, tolerance", CASES)
def test_ring_is_whole_attention(
    in_threads: Any, device: str, dtype: torch.dtype, tolerance: float, degree: int, head_dim: int, order: str
) -> None:
    """Also of tensors that lie in memory as matrices give them (tokens first), and with heads that kernels do not take
    as they are. Results lie in memory as torch.compile was told."""
    generator, scale = torch.Generator().manual_seed(0), 0.2
    tensors: list[Tensor] = []
    for heads in (4, 2, 2, 4):  # q, k, v and the gradient of what comes out
        drawn_BSNH = torch.randn(2, LENGTH, heads, head_dim, generator=generator, dtype=torch.float64)
        tensors.append(drawn_BSNH.to(device, dtype).transpose(1, 2))
    own = [positions_of(LENGTH, degree, rank, torch.device(device)) for rank in range(degree)]

    def attend(rank: int, name: str) -> list[Tensor]:
        mine = [x.transpose(1, 2)[:, own[rank]].transpose(1, 2) for x in tensors]
        q, k, v, grad = (fill_for_flash(x if order == "tokens first" else x.contiguous()) for x in mine)
        out, lse = ring._attend(q, k, v, scale, name)
        found = [out, *ring._attend_backward(grad, q, k, v, out, lse, scale, name)]
        assert lse.is_contiguous() and lse.shape == q.shape[:3] and lse.dtype == ring._wide(q)
        for each, like in zip(found, (q, q, k, v), strict=True):
            assert each.is_contiguous() and each.shape == like.shape and each.dtype == dtype
        return [each[..., :head_dim] for each in found]

    parts = in_threads(degree, attend)
    order_S = torch.cat(own).argsort()
    for found, wanted in zip(zip(*parts, strict=True), whole(*tensors, scale), strict=True):
        joined = torch.cat(found, dim=2).index_select(2, order_S).double()
        assert (joined - wanted).abs().max() <= tolerance * wanted.abs().max()
