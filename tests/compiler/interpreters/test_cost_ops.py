"""FLOPs against torch's own counter, shapes against what torch returns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archwright.compiler.interpreters.cost_ops import ProgramCost, Shaped, run_cost
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import INFERENCE_TABLE, TRAINING_TABLE, lower, partition
from archwright.spec import load
from tests.parity.strategies import random_spec

BATCH, SEQUENCE = 3, 19


def meta_module(program: object, device: str = "meta") -> TorchProgram:
    module = TorchProgram(program, TorchOps(dtype=torch.float32), dtype=torch.float32, device=device)  # type: ignore[arg-type]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def counted(call: object) -> int:
    """FLOPs by torch, attention as the two matrix products that it is: the default back end on CPUs counts none. Nor
    does torch know that `addmm_` is `addmm`."""
    in_place = {torch.ops.aten.addmm_: lambda sum_, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        call()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("seed", range(16))
def test_forward_and_backward_equal_torchs_count(seed: int, tmp_path: Path) -> None:
    program = lower(random_spec(seed, tmp_path))
    module = meta_module(program, "cpu")
    ids_BS = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    forward = run_cost(program, batch=BATCH, sequence=SEQUENCE).flops
    with torch.no_grad():
        assert counted(lambda: module(ids_BS)) == forward
        assert (
            counted(lambda: module(ids_BS, ids_BS))
            == run_cost(program, batch=BATCH, sequence=SEQUENCE, targets=True).flops
        )
    assert run_cost(program, batch=BATCH, sequence=SEQUENCE, targets=True).flops == forward
    assert counted(lambda: module(ids_BS, ids_BS)[0].backward()) == 3 * forward
    assert counted(lambda: module(ids_BS).sum().backward()) == 3 * forward


@pytest.mark.parametrize("seed", range(8))
def test_decode_through_a_cache_equals_torchs_count(seed: int, tmp_path: Path) -> None:
    program = lower(random_spec(seed, tmp_path))
    module = meta_module(program, "cpu")
    module.bind_cache(module.make_cache(batch=BATCH, positions=40))
    ids_B1 = torch.zeros(BATCH, 1, dtype=torch.int64)
    index_B = torch.tensor([5, 9, 20])

    def decode() -> None:
        module(ids_B1, positions_BS=index_B[:, None], write_index_B=index_B, visible=32)

    with torch.no_grad():
        assert counted(decode) == run_cost(program, batch=BATCH, sequence=1, visible=32).flops


def test_an_8b_model_is_counted_on_meta() -> None:
    program = lower(load("preset:llama3.1-8b"))
    module = TorchProgram(program, TorchOps(dtype=torch.bfloat16), dtype=torch.bfloat16, device="meta")
    ids_BS = torch.zeros(1, 512, dtype=torch.int64, device="meta")
    with torch.no_grad():
        assert counted(lambda: module(ids_BS)) == run_cost(program, batch=1, sequence=512).flops


@pytest.mark.parametrize("preset", ["tiny", "llama3.2-1b", "llama3.1-8b"])
def test_the_count_is_the_convention_of_mfu_figures(preset: str) -> None:
    """6 · multiplying parameters + 12 (causal: 6) · layers · heads · head_dim · sequence, for each token."""
    spec = load(f"preset:{preset}")
    program, sequence = lower(spec), 128
    params = {place: site.param.size for place, site in program.sites().items()}
    multiply = sum(size for place, size in params.items() if "norm" not in place and "embed_tokens" not in place)
    attention = spec.model.layer.attention
    width = attention.heads * (attention.head_dim or spec.model.hidden_size // attention.heads)
    cost = run_cost(program, batch=2, sequence=sequence)
    tokens = 2 * sequence
    assert 3 * cost.flops == tokens * (6 * multiply + 12 * spec.model.layers * width * sequence)
    assert 3 * cost.causal_flops == tokens * (6 * multiply + 6 * spec.model.layers * width * sequence)


@pytest.mark.parametrize("sequence", [1, 7, 19])
@pytest.mark.parametrize("past", [0, 5, 40])
@pytest.mark.parametrize("size", [None, 1, 4, 7, 13, 30, 59, 1000])
def test_causal_flops_count_the_visible_pairs(size: int | None, past: int, sequence: int) -> None:
    """Up to half a pair a query: the convention counts the diagonal of each triangle half."""
    mask = {"kind": "causal"} if size is None else {"kind": "window", "size": size}
    spec = load("preset:tiny", {"model.layer.attention.mask": mask})
    attention = spec.model.layer.attention
    costs = run_cost(lower(spec), batch=1, sequence=sequence, visible=past + sequence).costs
    measured = next(cost.causal_flops for cost in costs if cost.op == "attention")
    per_pair = 4 * attention.heads * spec.model.head_dim(attention)
    visible = sum(min(past + new + 1, size or past + sequence) for new in range(sequence))
    assert 0 <= visible - measured / per_pair <= sequence / 2
    assert all(cost.causal_flops <= cost.flops for cost in costs)


def test_shapes_are_torchs(tmp_path: Path) -> None:
    program = lower(random_spec(1, tmp_path))
    module = meta_module(program, "cpu")
    logits = run_cost(program, batch=BATCH, sequence=SEQUENCE).output
    assert isinstance(logits, Shaped)
    assert logits.shape == tuple(module(torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)).shape)


def cost_of_rank(degrees: Degrees, table: Any, *, targets: bool = False) -> ProgramCost:
    plan = partition(lower(load("preset:tiny")), degrees, table)
    splits = {name: site.param.splits for name, site in plan.program.sites().items()}
    return run_cost(plan.local, batch=BATCH, sequence=SEQUENCE, targets=targets, splits=splits)


def test_a_rank_sums_twice_a_layer_and_does_its_part_of_the_work() -> None:
    program = lower(load("preset:tiny"))
    whole = run_cost(program, batch=BATCH, sequence=SEQUENCE)
    rank = cost_of_rank(Degrees(tensor=2), INFERENCE_TABLE)
    summed = [each.elements for each in rank.collectives if not each.backward]
    assert {(each.kind, each.mesh_axis) for each in rank.collectives} == {("all_reduce", "tensor")}
    assert sum(summed) == 2 * 2 * BATCH * SEQUENCE * 64
    assert sum(each.elements for each in rank.collectives if each.backward) == sum(summed)
    assert whole.collectives == ()
    head = 2 * BATCH * SEQUENCE * 64 * 512
    assert 2 * (rank.flops - head) == whole.flops - head, "all but the head is split"


HIDDEN = BATCH * SEQUENCE * 64
"""Elements of what passes between the layers."""


def exchanged(cost: ProgramCost) -> dict[tuple[str, bool], int]:
    """(kind, backward) → elements."""
    found: dict[tuple[str, bool], int] = {}
    for each in cost.collectives:
        assert each.mesh_axis == "tensor"
        key = (each.kind, each.backward)
        found[key] = found.get(key, 0) + each.elements
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_what_training_ranks_exchange(sequence: bool) -> None:
    """Two sums a layer and one of the looked-up rows, one entry of the head; three numbers a token for the loss.

    With sequence parallelism each sum is a reduce-scatter and an all-gather: the same elements, half the traffic each.
    """
    found = exchanged(cost_of_rank(Degrees(tensor=2, sequence=sequence), TRAINING_TABLE, targets=True))
    entries, sums, numbers = 2 * 2 + 1, 2 * 2 + 1, 3 * BATCH * SEQUENCE
    if sequence:
        assert found == {
            ("all_gather", False): entries * HIDDEN,
            ("reduce_scatter", True): entries * HIDDEN,
            ("reduce_scatter", False): sums * HIDDEN,
            ("all_gather", True): sums * HIDDEN,
            ("all_reduce", False): numbers,
        }
    else:
        assert found == {("all_reduce", False): sums * HIDDEN + numbers, ("all_reduce", True): entries * HIDDEN}


def test_logits_of_a_cut_vocabulary_are_gathered() -> None:
    gathered = [each for each in cost_of_rank(Degrees(tensor=2), TRAINING_TABLE).collectives if "gather" in each.kind]
    # Of the filled-up vocabulary; each rank has half of it.
    assert [(each.kind, each.backward) for each in gathered] == [("all_gather", False)]
    assert cost_of_rank(Degrees(tensor=2), TRAINING_TABLE).output.shape[:2] == (BATCH, SEQUENCE)  # type: ignore[union-attr]


def test_training_ranks_share_all_the_work() -> None:
    """The head too, whose rows are cut."""
    whole = run_cost(lower(load("preset:tiny")), batch=BATCH, sequence=SEQUENCE, targets=True)
    for sequence in (False, True):
        rank = cost_of_rank(Degrees(tensor=2, sequence=sequence), TRAINING_TABLE, targets=True)
        assert 2 * rank.flops == whole.flops


def test_costs_name_their_blocks() -> None:
    costs = run_cost(lower(load("preset:tiny")), batch=1, sequence=4).costs
    assert [cost.path for cost in costs if cost.op == "attention"] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert costs[-1].path == "lm_head" and costs[-1].flops == 2 * 4 * 64 * 512
