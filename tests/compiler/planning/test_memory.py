"""Memory of a training rank: states against what torch allocates, moments and pipelines by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from archwright.compiler import plan
from archwright.compiler.distributed.apply import Options, apply_plan
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import TRAINING_TABLE, run_passes
from archwright.compiler.planning.memory import TrainingMemory, parts, total_bytes
from archwright.compiler.planning.report import PlanReport
from archwright.compiler.planning.training import Estimate
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import Spec, load
from archwright.trainers.optimizer import make_optimizer

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLUMNS = ("o_proj", "down_proj")


def allocated(spec: Spec, *, tensor: int, shard: int) -> dict[str, int]:
    """Bytes that torch allocates for the parameters, gradients and states of one rank, cut by torch.chunk: rows or
    columns over the tensor ranks, then rows over FSDP's, where the last ranks have room for as much as the first."""
    assert spec.train is not None
    whole = run_passes(spec, Degrees(), TRAINING_TABLE)
    options = Options(dtype=torch.float32, compute_dtype=torch.float32, device=torch.device("cpu"))
    model = apply_plan(whole, GeneratedWeights(params=whole.program.params(), seed=0), None, options)
    cut: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.parameters.items():
        value, owner = parameter.detach(), name.split(".")[-2]
        if owner in ROWS + COLUMNS:
            value = value.chunk(tensor, dim=0 if owner in ROWS else 1)[0]
        cut[name] = torch.nn.Parameter(value.chunk(shard, dim=0)[0].clone())
        cut[name].grad = torch.zeros_like(cut[name])
    gradients = sum(parameter.grad.nbytes for parameter in cut.values() if parameter.grad is not None)
    optimizer = make_optimizer(replace(model, parameters=cut), spec.train.optimizer)
    names = [(name, state) for name in cut for state in optimizer.state_names(model.layouts[name].param)]
    if spec.train.optimizer.kind == "adamw":
        optimizer.step(1.0)
        states = [optimizer.state(name, state) for name, state in names]
    else:  # Muon's step needs ranks to gather from
        states = [torch.zeros_like(cut[name]) for name, _ in names]
    weights = sum(parameter.nbytes for parameter in cut.values())
    optimizer_bytes = sum(each.nbytes for each in states)
    return {"weights_bytes": weights, "gradients_bytes": gradients, "optimizer_bytes": optimizer_bytes}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "shard"), [(1, 1), (2, 1), (1, 4), (2, 4), (1, 3)])
def test_states_are_what_torch_allocates(tensor: int, shard: int, tied: bool, optimizer: str) -> None:
    settings = {
        "parallel.tensor": tensor, "parallel.data_shard": shard, "model.tied_embeddings": tied, "train.batch_size": 12,
        "train.optimizer": {"kind": optimizer},
    }  # fmt: skip
    spec = load("preset:tiny", settings)
    states = estimate_of(plan(spec)).states[0]
    found = allocated(spec, tensor=tensor, shard=shard)
    assert {name: getattr(states, name) for name in found} == found


def estimate_of(report: PlanReport) -> Estimate:
    assert report.training is not None
    return report.training


def planned(settings: dict[str, Any], gpus: str = "8xH100") -> PlanReport:
    train = {"kind": "pretrain", "precision": "bfloat16", "batch_size": 64, "sequence_length": 2048}
    return plan(load("preset:llama3.2-1b", {"train": train, **settings}), gpus=gpus)


def fullest(settings: dict[str, Any], gpus: str = "8xH100") -> TrainingMemory:
    memory = max(planned(settings, gpus).memory, key=total_bytes)
    assert isinstance(memory, TrainingMemory)
    return memory


def test_gradients_and_activations_are_full_at_different_moments() -> None:
    """With one micro-batch the activations are there before the gradients; later ones find those of the first."""
    one = fullest({"train.batch_size": 8}, "1xH100")
    assert one.moment in ("loss", "backward") and one.gradients_bytes == 0 and one.activations_bytes > 0
    two = fullest({"train.batch_size": 16, "train.micro_batches": 2}, "1xH100")
    assert two.moment in ("loss", "backward") and two.gradients_bytes == 4 * 1_235_814_400
    assert two.activations_bytes == one.activations_bytes
    short = fullest({"train.batch_size": 1, "train.sequence_length": 128}, "1xH100")
    assert short.moment == "end" and short.activations_bytes == 0


LAYER, ENDS = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2 * 2048, 128_256 * 2048 + 2048


def test_fsdp_keeps_the_ends_and_a_layer_or_two_unsharded() -> None:
    loss = fullest({"train.micro_batches": 2})
    assert loss.moment == "loss" and loss.compute_weights_bytes == 2 * (LAYER + ENDS)
    short = {"train.micro_batches": 2, "train.sequence_length": 512, "train.activation_checkpointing": {"kind": "full"}}
    first = fullest({**short, "model.vocab_size": 4096, "model.tied_embeddings": False})
    assert first.moment in ("backward", "first layer")
    assert first.compute_weights_bytes == 2 * (2 * LAYER + 2 * 4096 * 2048 + 2048)
    assert first.unsharded_gradients_bytes == LAYER * (2 + 2 * 4)


def test_without_reshard_every_layer_stays_gathered_and_is_gathered_once() -> None:
    apart, kept = ({"parallel.reshard": reshard} for reshard in (True, False))
    assert fullest(kept).compute_weights_bytes == 2 * (16 * LAYER + ENDS)
    assert fullest(kept).activations_bytes == fullest(apart).activations_bytes
    sent = [planned(each).exchanges()["data_shard"].bytes for each in (apart, kept)]
    assert sent[0] - sent[1] == pytest.approx(7 / 8 * 2 * 16 * LAYER)
    times = [planned(each).step_s or 0 for each in (apart, kept)]
    assert times[1] < times[0]


def test_each_micro_batch_in_flight_has_copies_of_the_weights() -> None:
    """On one GPU one copy; on the first of two ranks of 1F1B two, of its ten layers' matrices."""
    matrices = LAYER - 2 * 2048
    one = fullest({"train.batch_size": 4}, "1xH100")
    assert one.compute_weights_bytes == pytest.approx(16 * 2 * matrices, rel=1e-3)
    first = planned({"parallel.pipeline": 2, "train.batch_size": 16, "train.micro_batches": 8}, "2xH100").memory[0]
    assert isinstance(first, TrainingMemory)
    assert first.compute_weights_bytes == pytest.approx(2 * 10 * 2 * matrices, rel=1e-3)


def test_layers_that_are_computed_again_copy_their_weights_again() -> None:
    found = fullest({"train.batch_size": 4, "train.activation_checkpointing": {"kind": "selective"}}, "1xH100")
    assert found.moment == "loss" and found.compute_weights_bytes == 2 * 2048  # the last norm's


def test_a_pipeline_of_1f1b_holds_fewer_activations_on_later_ranks() -> None:
    settings = {"parallel": {"pipeline": 4, "data_shard": 2}, "train.micro_batches": 16}
    held = {kind: activations(settings, kind) for kind in ("1f1b", "gpipe")}
    layers = [stop - start for start, stop in estimate_of(planned(settings)).layout.stages]
    assert layers == [6, 5, 5, 2], "the head weighs as much as several layers"
    one = held["1f1b"][2] / (2 * 5)
    assert held["1f1b"][:3] == [4 * 5 * one, 3 * 5 * one, 2 * 5 * one]
    assert held["gpipe"][:3] == [16 * 5 * one, 16 * 5 * one, 16 * 5 * one]
    ranks = planned(settings).memory
    assert [ranks[i] is ranks[0] for i in (1, 2)] == [True, False], "pipeline is the outermost axis"


def activations(settings: dict[str, Any], kind: str) -> list[int]:
    report = planned({**settings, "parallel": {**settings["parallel"], "schedule": {"kind": kind}}})
    return [each.activations_bytes for each in estimate_of(report).memory]


def test_a_pipeline_gathers_and_reduces_once() -> None:
    """Every stage's weights stay gathered, and whole wide gradients are added up."""
    report = planned({"parallel": {"pipeline": 4, "data_shard": 2}, "train.micro_batches": 16})
    layer = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2 * 2048
    memory = report.memory[2]
    assert isinstance(memory, TrainingMemory) and memory.gradients_bytes == 0
    assert memory.compute_weights_bytes == 2 * 5 * layer and memory.unsharded_gradients_bytes == 4 * 5 * layer
    first = 5 * layer + 128_256 * 2048
    assert report.exchanges()["data_shard"].bytes == pytest.approx((2 + 4) / 2 * first)


def test_a_tied_matrix_lies_on_the_first_and_the_last_stage() -> None:
    report = planned({"parallel": {"pipeline": 4, "data_shard": 2}, "train.micro_batches": 16})
    layer, table = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2 * 2048, 128_256 * 2048
    sizes = [5 * layer + table, 5 * layer, 5 * layer, layer + table + 2048]
    assert [each.num_params for each in estimate_of(report).states] == [size // 2 for size in sizes]
    assert report.num_params == 1_235_814_400 and "pipeline" in report.exchanges()


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_recomputation_trades_memory_for_time(kind: str) -> None:
    report = planned({"train.activation_checkpointing": {"kind": kind}})
    plain = planned({})
    assert report.step_s is not None and plain.step_s is not None
    layer_flops = 16 * 2 * 8 * 2048 * (2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2048 * 2048 / 2 * 2)
    more = estimate_of(report).flops - estimate_of(plain).flops  # type: ignore[operator]
    assert more == pytest.approx(layer_flops if kind == "full" else 0)
    if kind == "full":
        assert report.memory[0].activations_bytes < plain.memory[0].activations_bytes / 5  # type: ignore[union-attr]
        assert report.step_s > 1.1 * plain.step_s


def test_parts_add_up_and_constants_are_the_tables() -> None:
    """Two communicators, the world's and FSDP's; the streams of the group of embedding and head."""
    memory = fullest({})
    constants = planned({}).cluster.constants  # type: ignore[union-attr]
    assert memory.context_bytes == constants["context_bytes"] and memory.nccl_bytes == 2 * constants["nccl_bytes"]
    others = total_bytes(memory) - memory.context_bytes - memory.nccl_bytes - memory.allocator_bytes
    streams = (2 + 4) * 128_256 * 2048 * 9 / 8
    assert memory.allocator_bytes == pytest.approx(constants["allocator_slack"] * others + streams, rel=1e-6)
    assert total_bytes(memory) == sum(parts(memory).values())
