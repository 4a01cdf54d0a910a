"""What a forward keeps, against what autograd saves and against formulas worked out by hand."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from archwright.compiler.blocks import GroupedQueryAttention, Rope
from archwright.compiler.distributed.checkpointing import checkpointing_of
from archwright.compiler.interpreters import cross_entropy
from archwright.compiler.interpreters.cost_ops import Shaped
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees, Program
from archwright.compiler.passes import lower
from archwright.compiler.planning.kept import eager_bytes, kept
from archwright.compiler.planning.layout import Layout, Layouts
from archwright.compiler.planning.min_cut import cheapest_cut
from archwright.compiler.planning.tracing import Traced, TraceOps
from archwright.compiler.planning.work import CHUNK_MULTIPLE, LOGITS_CHUNK_BYTES
from archwright.spec import load
from archwright.spec.models import FullRecompute, KeepAll, Recompute, SelectiveRecompute
from tests.parity.strategies import features, random_spec

NONE, FULL = KeepAll(kind="none"), FullRecompute(kind="full")
S, D, F, N, K, H = 32, 4096, 14336, 32, 8, 128


def layout_of(program: Program, tokens: int = S, **degrees: Any) -> Layout:
    return Layouts(program, sequence=tokens, muon=False).at(Degrees(**degrees))


def llama(**degrees: Any) -> Layout:
    return layout_of(lower(load("preset:llama3.1-8b")), **degrees)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_activation_estimate_is_what_autograd_saves(seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    program = lower(random_spec(seed, tmp_path))
    masters = torch.promote_types(dtype, torch.float32)
    module = TorchProgram(program, TorchOps(dtype=dtype), dtype=masters, device="cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    saved = saved_bytes(module, batch=8, sequence=48)
    e = dtype.itemsize
    looked_up = {"vocab", "positions"}
    cast = [param for param in program.params().values() if not looked_up & set(param.axes)]
    copies = sum(param.size for param in cast) * e if dtype != masters else 0
    head_gradient = program.sites()["lm_head.weight"].param.size * masters.itemsize
    rotated = [b for _, b in program.blocks() if isinstance(b, GroupedQueryAttention) and isinstance(b.position, Rope)]
    merged = sum(attention.q_proj.weight.shape[0] for attention in rotated) * e  # the CPU's copy of the output
    layout = layout_of(program, 48)
    estimate = 8 * (sum(eager_bytes(layout.traces[kind], e) for kind in layout.kinds) + 48 * merged) + layout.masked * e
    assert estimate + copies + head_gradient == pytest.approx(saved, rel=0.01)


def test_the_activation_estimates_cover_every_kind(tmp_path: Path) -> None:
    found = [features(random_spec(seed, tmp_path)) for seed in range(12)]
    assert all(any(has[name] for has in found) for name in ("layernorm with bias", "gelu by tanh", "mixed stack"))
    assert all(any(has[name] for has in found) for name in ("window inside the sequences", "learned positions", "rope"))


def saved_bytes(module: TorchProgram, *, batch: int, sequence: int, rotations: bool = False) -> int:
    """Bytes of the storages that a forward keeps for the backward, but parameters and integers."""
    storages: dict[int, int] = {}
    others = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    keep: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in others and tensor.numel() > 1:
            keep.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def leave_rotations_out(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        others.update(table.untyped_storage().data_ptr() for pair in args[1].rotations.values() for table in pair)

    if not rotations:
        module.layers()[0].register_forward_pre_hook(leave_rotations_out)
    ids_BS = torch.zeros(batch, sequence, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_sum, _ = module(ids_BS, ids_BS)
    del loss_sum
    return sum(storages.values())


def test_the_logits_chunk_is_the_losss() -> None:
    assert (LOGITS_CHUNK_BYTES, CHUNK_MULTIPLE) == (cross_entropy.CHUNK_BYTES, cross_entropy.CHUNK_MULTIPLE)


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_compiled_llama_layer_by_hand(tensor: int, sequence: bool) -> None:
    """Input and middle of the residual stream, both norms' outputs, q, k, v, attention's output twice, gate, up and
    their product; with `sequence` the stream is spread, and the norms' outputs are kept as they are gathered."""
    spread = sequence and tensor > 1
    stream = 2 * D // tensor if spread else 2 * D
    values = stream + 2 * D + (3 * N * H + 2 * K * H + 3 * F) // tensor
    rows = N // tensor + (2 / tensor if spread else 2)
    layer = llama(tensor=tensor, sequence=sequence).traces[1]
    assert kept(layer, NONE, compiled=True, compute_bytes=2).kept_bytes == S * (2 * values + 4 * rows)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # all are torch's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"ffn": {"kind": "gelu", "hidden_size": 96, "bias": True}, "norm": {"kind": "layernorm"}},
        {"ffn": {"kind": "moe", "experts": 4, "experts_per_token": 2, "hidden_size": 96}},
    ],
    ids=["swiglu", "gelu", "moe"],
)
def test_a_compiled_layer_keeps_what_torchs_partitioner_keeps(dtype: torch.dtype, layer: dict[str, Any]) -> None:
    """The partitioner is the one of GPUs; what else inductor does changes no values between forward and backward."""
    found: list[int] = []
    for layers in (2, 4):
        program = lower(load("preset:tiny", {"model.layers": layers, "model.layer": layer}))
        module = TorchProgram(program, TorchOps(dtype=dtype), dtype=torch.float32, device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        module.compile_layers(backend="aot_eager_decomp_partition")
        found.append(saved_bytes(module, batch=4, sequence=64, rotations=True))
    copies = sum(each.size for name, each in program.params().items() if ".layers.0." in name and len(each.shape) > 1)
    e = dtype.itemsize
    planned = 4 * kept(layout_of(program, 64).traces[1], NONE, compiled=True, compute_bytes=e).kept_bytes
    assert planned + (copies * e if e < 4 else 0) == pytest.approx((found[1] - found[0]) / 2, rel=0.01)


def test_a_layer_of_experts_by_hand() -> None:
    """Of each token's X = 2 experts: what it reads, gate, up and their product, and the result for its weight; of
    experts that are spread, which nothing compiles, the activation too.
    """
    layout = layout_of(lower(load("preset:mixtral-8x7b")), expert=8)
    x, f, layer = 2, 14336, layout.traces[1]
    values = 4 * D + 3 * N * H + 2 * K * H + x * (2 * D + 4 * f)
    found = kept(layer, NONE, compiled=True, compute_bytes=2).kept_bytes
    assert found == pytest.approx(S * 2 * values, rel=0.002), "the router's few values besides"
    alone = kept(layout_of(lower(load("preset:mixtral-8x7b"))).traces[1], NONE, compiled=True, compute_bytes=2)
    assert found - alone.kept_bytes == S * 2 * x * f
    assert sum(node.causal_flops for node in layer.nodes if node.op == "expert_linear") == S * x * 3 * 2 * D * f
    sent = [(each.kind, each.elements, each.backward) for each in layer.collectives if each.mesh_axis == "expert"]
    assert sent == 2 * [("all_to_all", S * x * D, False), ("all_to_all", S * x * D, True)]


def test_context_ranks_keep_their_tokens_and_all_keys() -> None:
    values = 4 * D + 3 * N * H + 3 * F + 4 * 2 * K * H
    layer = llama(context=4).traces[1]
    assert kept(layer, NONE, compiled=True, compute_bytes=2).kept_bytes == S // 4 * (2 * values + 4 * (N + 2))
    ring = llama(context=4, ring=True).traces[1]
    values -= 3 * 2 * K * H
    assert kept(ring, NONE, compiled=True, compute_bytes=2).kept_bytes == S // 4 * (2 * values + 4 * (N + 2))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("recompute", "values", "rows"),
    [
        (FULL, 0, 0),
        (SelectiveRecompute(kind="selective", keep=("attention",)), N * H, N),
        (SelectiveRecompute(kind="selective"), 2 * N * H + 2 * K * H + 2 * F + D, N),
    ],
)
def test_what_recomputation_keeps(compiled: bool, recompute: Recompute, values: int, rows: int) -> None:
    """The input, and outputs that are named; compiled, not that of the last matrix, which no backward reads."""
    if not compiled and "linear" in getattr(recompute, "keep", ()):
        values += D
    found = kept(llama().traces[1], recompute, compiled=compiled, compute_bytes=2)
    assert found.kept_bytes == S * (2 * (D + values) + 4 * rows)
    everything = kept(llama().traces[1], NONE, compiled=compiled, compute_bytes=2).kept_bytes
    assert found.kept_bytes + found.peak_bytes >= everything


def test_what_is_recomputed() -> None:
    layer = llama().traces[1]
    ops = {
        kind: {layer.nodes[index].op for index in kept(layer, each, compiled=True, compute_bytes=2).again}
        for kind, each in {
            "none": NONE, "full": FULL, "selective": SelectiveRecompute(kind="selective"),
            "attention": SelectiveRecompute(kind="selective", keep=("attention",)),
        }.items()
    }  # fmt: skip
    assert ops["none"] == set() and {"linear", "attention"} <= ops["full"]
    assert not {"linear", "attention"} & ops["selective"]
    assert "linear" in ops["attention"] and "attention" not in ops["attention"]


def test_an_operation_that_nobody_knows_keeps_what_it_reads_and_makes() -> None:
    ops = TraceOps({}, Degrees())
    with ops.scope("layer"):
        x = ops.begin(Shaped(shape=(1, S, D)))
        y = ops.record("convolve", (x,), Shaped(shape=(1, S, F)))
    assert isinstance(y, Traced)
    ops.segments[0].output = y.node
    for compiled in (False, True):
        assert kept(ops.segments[0], NONE, compiled=compiled, compute_bytes=2).kept_bytes == 2 * S * (D + F)


def test_the_cut_is_the_cheapest() -> None:
    """0 and 1 cannot be made again; 2 = f(0, 1), 3 = g(2), 4 = h(2)."""
    inputs = [(), (), (0, 1), (2,), (2,)]
    assert cheapest_cut(inputs, [5, 5, 4, 9, 9], {0, 1}, {3, 4}) == {2}
    assert cheapest_cut(inputs, [5, 5, 20, 9, 9], {0, 1}, {3, 4}) == {0, 1}
    assert cheapest_cut(inputs, [5, 5, 20, 3, 3], {0, 1}, {3, 4}) == {3, 4}
    assert cheapest_cut(inputs, [5, 5, 20, 3, 3], {0, 1}, {0, 3, 4}) == {0, 1}
    assert cheapest_cut(inputs, [5, 5, 20, 3, 3], {0, 1}, set()) == set()


class Alive(TorchDispatchMode):
    """Remembers every storage that an operation made, and says how many bytes of them are still there."""

    def __init__(self, module: torch.nn.Module) -> None:
        """module: whose parameters do not count."""
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.others = {StorageWeakRef(parameter.untyped_storage()).cdata for parameter in module.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.others:
                    self.made[reference.cdata] = reference, storage.nbytes()
        return result

    def count(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize(
    "recompute",
    [NONE, FULL, SelectiveRecompute(kind="selective"), SelectiveRecompute(kind="selective", keep=("attention",))],
    ids=["none", "full", "selective", "attention"],
)
@pytest.mark.parametrize(
    "preset", [{}, {"model.layer.ffn": {"kind": "gelu", "hidden_size": 96}}], ids=["swiglu", "gelu"]
)
def test_checkpointing_keeps_what_stays_alive_in_torch(recompute: Recompute, preset: dict[str, Any]) -> None:
    """Uncompiled: the bytes that two layers more leave after the forward, the loss still waiting for its backward."""
    found: list[int] = []
    for layers in (2, 4):
        program = lower(load("preset:tiny", {"model.layers": layers, **preset}))
        module = TorchProgram(program, TorchOps(dtype=torch.float32), dtype=torch.float32, device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for layer in module.layers():
            layer.checkpointing = checkpointing_of(recompute)
        ids_BS = torch.zeros(4, 64, dtype=torch.int64)
        with Alive(module) as alive:
            loss_sum, _ = module(ids_BS, ids_BS)
            gc.collect()
            found.append(alive.count())
        del loss_sum
    layer = layout_of(lower(load("preset:tiny", preset)), 64).traces[1]
    planned = 4 * kept(layer, recompute, compiled=False, compute_bytes=4).kept_bytes
    if recompute.kind == "none":
        planned += 4 * 64 * 64 * 4  # the CPU's copy of attention's output
    assert planned == pytest.approx((found[1] - found[0]) / 2, rel=0.03)
