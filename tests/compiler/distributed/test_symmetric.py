"""Exchanges of tokens by copies between the ranks' memories: with a thread for each rank, and on two GPUs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx

from archwright.compiler.distributed import symmetric
from archwright.compiler.distributed.collectives import gather_from, scatter_to
from archwright.compiler.distributed.early_copies import EarlyCopies
from archwright.compiler.distributed.symmetric import FETCH, GATHER, WAIT
from archwright.compiler.passes import degrees_of
from archwright.spec import ArchwrightError, load
from archwright.trainers import loop
from tests.compiler.distributed.lent import open_in_threads
from tests.compiler.distributed.ranks import Rank

Tensor = torch.Tensor
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def in_threads() -> Iterator[Callable[[int, Callable[[Any], Any]], list[Any]]]:
    """Call a function of its group for each rank."""

    def run(degree: int, work: Callable[[Any], Any]) -> list[Any]:
        ranks = [Rank(number, degree) for number in range(degree)]
        open_in_threads(ranks)
        with ThreadPoolExecutor(degree) as pool:
            return list(pool.map(work, ranks))

    yield run
    symmetric._WINDOWS.clear()


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_and_sums_travel_with_their_gradients(in_threads: Any, degree: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = [(3 * degree, 5, 2), (3, 5 * degree, 2)][dim]
    parts = torch.randn(degree, *shape, generator=generator, dtype=torch.float64)  # of a sum, one of each rank
    weights = torch.randn(degree, *shape, generator=generator, dtype=torch.float64)
    total = parts.sum(0)

    def work(rank: Rank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        piece = total.chunk(degree, dim)[rank.number].clone().requires_grad_()
        whole = gather_from(piece, rank, dim)  # pyright: ignore[reportArgumentType]
        (whole * weights[rank.number]).sum().backward()
        part = parts[rank.number].clone().requires_grad_()
        own = scatter_to(part, rank, dim)  # pyright: ignore[reportArgumentType]
        (own * total.chunk(degree, dim)[rank.number]).sum().backward()
        assert piece.grad is not None and part.grad is not None
        return whole.detach(), piece.grad, own.detach(), part.grad

    for number, (whole, piece_grad, own, part_grad) in enumerate(in_threads(degree, work)):
        assert torch.equal(whole, total)
        torch.testing.assert_close(piece_grad, weights.sum(0).chunk(degree, dim)[number], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(own, total.chunk(degree, dim)[number], rtol=1e-14, atol=1e-14)
        assert torch.equal(part_grad, total)


def test_ranks_that_run_ahead_overwrite_nothing(in_threads: Any) -> None:
    """Copies are made at the last moment, and each rank is late in turn; sizes grow, shrink and change their type."""
    kinds = [(4, torch.float64), (6, torch.bfloat16), (400, torch.float32), (2, torch.float64), (402, torch.float32)]

    def work(rank: Rank) -> None:
        for turn in range(40):
            size, dtype = kinds[turn % len(kinds)]
            if turn % 3 == rank.number:
                time.sleep(0.002)
            value = torch.full((size, 3), float(turn + 100 * rank.number), dtype=dtype)
            whole = symmetric.all_gather(value, rank)  # pyright: ignore[reportArgumentType]
            assert [part.unique().tolist() for part in whole.chunk(3)] == [[turn], [turn + 100], [turn + 200]]
            rows = torch.arange(3, dtype=dtype).repeat_interleave(size)[:, None].expand(-1, 3) + turn
            own = symmetric.reduce_scatter(rows.contiguous(), rank)  # pyright: ignore[reportArgumentType]
            assert own.shape == (size, 3)
            assert own.unique().tolist() == [3 * (rank.number + turn)]

    in_threads(3, work)


def test_sums_of_bfloat16_are_rounded_once(in_threads: Any) -> None:
    values = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)  # one by one, 256 + 1 = 256 in bfloat16

    def work(rank: Rank) -> float:
        whole = values[rank.number].expand(4, 1).contiguous()
        return symmetric.reduce_scatter(whole, rank).item()  # pyright: ignore[reportArgumentType]

    assert in_threads(4, work) == [260.0] * 4


@pytest.fixture
def of_two() -> Iterator[str]:
    """The name of a group of two, for graphs that are traced and not run."""
    ranks = [Rank(number, 2) for number in range(2)]
    symmetric._WINDOWS[ranks[0].group_name] = _Unused(ranks[0])  # pyright: ignore[reportArgumentType]
    yield ranks[0].group_name
    symmetric._WINDOWS.clear()


class _Unused(symmetric.Window):
    def _open(self) -> None:
        pass


def _backward(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The products of a layer's backward: gradients of inputs, which are added up over ranks, and of weights."""

    def run(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        whole = WAIT(GATHER(grad, name))
        inner, of_down = whole @ down, whole.T @ y
        outer, of_up = inner @ up, inner.T @ x
        mine = outer.chunk(2)[0] + WAIT(FETCH(outer, name))[0]
        again = WAIT(GATHER(mine, name))
        return of_down, of_up, again @ down

    return run


def _graph(name: str, tokens: int, width: int) -> torch.fx.GraphModule:
    sizes = [(tokens // 2, width), (tokens, width), (width, width), (width, width), (tokens, width)]
    return make_fx(_backward(name), tracing_mode="fake")(*(torch.empty(size) for size in sizes))


def _order(graph: torch.fx.Graph) -> list[str]:
    short = {GATHER: "gather", FETCH: "fetch", WAIT: "wait", torch.ops.aten.mm.default: "product"}
    return [short[node.target] for node in graph.nodes if node.target in short]  # pyright: ignore[reportArgumentType]


def test_copies_start_early_and_products_fill_their_time(of_two: str) -> None:
    traced = _graph(of_two, 4096, 4096)
    assert _order(traced.graph) == [
        "gather", "wait", "product", "product", "product", "product", "fetch", "wait", "gather", "wait", "product",
    ]  # fmt: skip
    results = len(traced.graph.nodes)
    EarlyCopies()(traced.graph)
    traced.graph.lint()
    assert len(traced.graph.nodes) == results
    # Each gradient of a weight takes longer than a copy: one stands beside the first, one beside the second.
    assert _order(traced.graph) == [
        "gather", "wait", "product", "product", "fetch", "product", "wait", "gather", "product", "wait", "product",
    ]  # fmt: skip


def test_small_products_stand_beside_one_copy(of_two: str) -> None:
    traced = _graph(of_two, 64, 32)
    EarlyCopies()(traced.graph)
    assert _order(traced.graph) == [
        "gather", "wait", "product", "product", "fetch", "product", "product", "wait", "gather", "wait", "product",
    ]  # fmt: skip


def test_a_graph_without_copies_stays_as_it_is() -> None:
    traced = make_fx(lambda x, w: ((x @ w).relu(), w + 1), tracing_mode="fake")(torch.empty(2, 3), torch.empty(3, 4))
    before = [node.name for node in traced.graph.nodes]
    EarlyCopies()(traced.graph)
    assert [node.name for node in traced.graph.nodes] == before


def test_ranks_say_why_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: (own, other) != (0, 2))
    here = ("a", 0)
    assert symmetric._obstacle(here, [here, ("a", 1)]) is None
    assert symmetric._obstacle(here, [here, ("b", 1)]) == "they are on several hosts, a and b"
    assert symmetric._obstacle(here, [here, ("a", 1), ("a", 2)]) == "GPU 0 cannot read the memory of GPU 2"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """A world of one process, which takes its GPU for the first one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()
    symmetric._WINDOWS.clear()


def test_a_window_that_cannot_be_opened_leaves_none(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("pidfd_getfd: not permitted\nat some line")

    monkeypatch.setattr(symmetric, "Window", _Unused)
    assert symmetric.open_window(alone) is None
    assert symmetric.has_window(alone)
    monkeypatch.setattr(symmetric, "Window", refuse)
    assert symmetric.open_window(alone) == "pidfd_getfd: not permitted"
    assert not symmetric.has_window(alone)


@pytest.mark.parametrize("problem", [None, "they are far apart"])
def test_a_run_says_how_tokens_travel(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    opened = list[str]()

    def open_window(group: Rank) -> str | None:
        opened.append(group.group_name)
        return problem

    def notes(device: str = "cuda", **parallel: object) -> tuple[str, ...]:
        overrides = {f"parallel.{name}": value for name, value in {"tensor": 2, **parallel}.items()}
        spec = load("preset:tiny", overrides)
        opened.clear()
        return loop._share_memory(spec, degrees_of(spec.parallel), mesh, torch.device(device))  # pyright: ignore

    monkeypatch.setattr(loop, "open_window", open_window)
    mesh = SimpleNamespace(groups={"tensor": Rank(0, 2)})
    assert notes() == notes(sequence=True, symmetric_memory=False) == notes("cpu", sequence=True) == ()
    assert not opened
    copies = "tensor ranks exchange tokens by copies between their memories"
    nccl = "tensor ranks exchange tokens by NCCL, and not by copies between their memories: they are far apart"
    assert notes(sequence=True) == (copies if problem is None else nccl,)
    assert opened == ["thread 0 of 2"]
    if problem is None:
        assert notes(sequence=True, symmetric_memory=True) == (copies,)
    else:
        with pytest.raises(ArchwrightError, match=r"TRAIN018.*they are far apart"):
            notes(sequence=True, symmetric_memory=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_exchange_what_nccl_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("symmetric_worker.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *worker], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2, done.stdout
