"""`plan`: figures that are exact, and what it says of machines."""

import subprocess
import sys
from collections import Counter

import pytest

from archwright.compiler import plan
from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import lower, partition
from archwright.compiler.planning.layout import splits_of
from archwright.compiler.planning.machines import GPUS, parse_cluster
from archwright.compiler.planning.memory import inference_memory, kv_bytes_per_token, total_bytes
from archwright.compiler.planning.text import as_text
from archwright.spec import ArchwrightError, load

ONE_B = {"train": {"kind": "pretrain", "precision": "bfloat16", "batch_size": 2, "sequence_length": 4096}}


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
    ],
)
def test_parameters_are_exact(preset: str, count: int) -> None:
    report = plan(load(f"preset:{preset}"))
    assert report.num_params == count
    assert report.to_json()["parameters"] == {"total": count, "per_rank": count}


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_parameters_per_rank_are_those_of_the_slices(degree: int) -> None:
    spec = load("preset:llama3.1-8b", {"build.parallel.tensor": degree})
    placed = partition(lower(spec), Degrees(tensor=degree))
    assert plan(spec).num_params_per_rank == placed.local.num_params()
    assert plan(spec).degrees == {"tensor": degree} and len(plan(spec).memory) == degree


def test_training_ranks_keep_whole_key_value_weights_where_heads_are_shared() -> None:
    """tiny has 2 key/value heads: over 4 ranks its k and v weights are replicated."""
    spec = load("preset:tiny", {"parallel.tensor": 4})
    layer = (64 * 64 * 2 + 3 * 64 * 176) // 4 + 2 * 64 * 32 + 2 * 64
    assert plan(spec).num_params_per_rank == 2 * layer + 512 * 64 // 4 + 64


def test_flops_are_the_convention_of_the_published_figures() -> None:
    """The hand-written 1.236B model at 56,984 tokens/s on one H100 is given as 52.0% full and 47.4% causal."""
    flops = plan(load("preset:llama3.2-1b", ONE_B)).flops
    peak = GPUS["H100"].flops_per_s["bfloat16"]
    assert round(100 * 56_984 * flops.training / peak, 1) == 52.0
    assert round(100 * 56_984 * flops.training_causal / peak, 1) == 47.4
    assert flops.training == 3 * flops.forward and flops.training_causal == 3 * flops.forward_causal


def test_kv_bytes_per_token() -> None:
    program = lower(load("preset:llama3.1-8b"))
    assert kv_bytes_per_token(program, "bfloat16") == 2 * 32 * 8 * 128 * 2
    assert kv_bytes_per_token(program, "float32") == 2 * 32 * 8 * 128 * 4
    assert kv_bytes_per_token(partition(program, Degrees(tensor=2)).local, "bfloat16") == 32 * 8 * 128 * 2


def test_inference_memory_is_weights_and_cache() -> None:
    overrides = {"build.precision": "bfloat16", "build.max_batch": 4, "build.max_positions": 1000}
    spec = load("preset:llama3.1-8b", overrides)
    memory = inference_memory(partition(lower(spec), Degrees()), spec.build)
    assert memory.weights_bytes == 2 * 8_030_261_248
    assert memory.kv_cache_bytes == 4 * 1000 * 131_072


def test_a_pipeline_shares_weights_and_cache_and_makes_no_token_faster() -> None:
    """The embedding's table is on one rank, the head's on the other, and each has the cache of its own layers."""
    settings = {"build.precision": "bfloat16", "build.max_batch": 4, "build.max_positions": 1000}
    one, two = (
        plan(load("preset:llama3.1-8b", settings | {"build.parallel.pipeline": stages}), gpus=f"{stages}xH100")
        for stages in (1, 2)
    )
    assert one.inference and two.inference and one.step_s and two.step_s
    first, last = two.inference.memory
    assert first.weights_bytes + last.weights_bytes == one.inference.memory[0].weights_bytes
    assert first.kv_cache_bytes + last.kv_cache_bytes == one.inference.memory[0].kv_cache_bytes
    assert two.memory == (first, last) and two.degrees == {"pipeline": 2, "tensor": 1}
    assert two.num_params_per_rank * 2 == max(first.weights_bytes, last.weights_bytes)
    stages = [stage.decode_s or 0 for stage in two.inference.stages]
    assert sum(stages) == pytest.approx(one.step_s, rel=1e-9) and two.step_s > sum(stages)
    assert two.inference.decode_hand_off_bytes == 4 * 4096 * 2
    content = two.to_json()
    assert [each["pipeline"] for each in content["memory"]["per_rank"]] == [0, 1]  # type: ignore[index]
    assert content["pipeline"]["prefill_hand_off_bytes"] == 1000 * 4096 * 2  # type: ignore[index]
    assert "stages" in as_text(two) and "pipeline 1" in as_text(two)


def test_ranks_that_share_experts_add_up_once() -> None:
    """Of a layer: attention over the tensor ranks, the experts over all ranks of the stage."""
    settings = {"build.precision": "bfloat16", "build.parallel": {"tensor": 2, "expert": 4}}
    whole, shared = (plan(load("preset:mixtral-8x7b", each), gpus="8xH100") for each in ({}, settings))
    experts = 32 * 8 * 3 * 4096 * 14336
    rest = whole.num_params - experts
    tables = 2 * 32000 * 4096
    routers, norms = 32 * 8 * 4096, 65 * 4096
    attention = rest - tables - routers - norms
    assert shared.num_params_per_rank == experts // 8 + attention // 2 + tables + routers + norms
    assert shared.degrees == {"expert": 4, "tensor": 2} and len(shared.memory) == 8
    placed = partition(lower(load("preset:mixtral-8x7b", settings)), Degrees(tensor=2, expert=4))
    cost = run_cost(placed.local, batch=1, sequence=1, visible=1, splits=splits_of(placed))
    found = Counter(each.mesh_axis for each in cost.collectives if not each.backward)
    assert found == {"tensor": 32, "expert+tensor": 32}


def test_the_last_logits_alone_cost_less_of_a_prefill() -> None:
    settings = {"build.precision": "bfloat16", "build.max_positions": 4096}
    times = [
        plan(load("preset:llama3.2-1b", settings | {"build.logits": logits}), gpus="H100").inference
        for logits in ("all", "last")
    ]
    assert times[0] and times[1] and times[0].prefill_s and times[1].prefill_s
    assert times[1].prefill_s < 0.95 * times[0].prefill_s and times[1].decode_s == times[0].decode_s


def test_training_states_of_the_1b_model() -> None:
    """float32 masters, gradients and two moments take 16 bytes a parameter."""
    spec = load("preset:llama3.2-1b", ONE_B)
    states = [plan(spec, gpus=gpus).training.states[0] for gpus in (None, "8xH100")]  # type: ignore[union-attr]
    sums = [each.weights_bytes + each.gradients_bytes + each.optimizer_bytes for each in states]
    assert sums[0] == 16 * 1_235_814_400 and sums[1] == sums[0] // 8
    assert [each.num_params for each in states] == [1_235_814_400, 1_235_814_400 // 8]


def test_a_split_model_keeps_less_on_each_rank() -> None:
    reports = [plan(load("preset:tiny", {"parallel.tensor": degree})) for degree in (1, 2, 4)]
    totals = [total_bytes(report.memory[0]) for report in reports]
    assert totals[0] > totals[1] > totals[2]
    assert [len(report.memory) for report in reports] == [1, 2, 4]
    assert len({report.num_params for report in reports}) == 1
    assert len({report.flops for report in reports}) == 1


def test_a_vocabulary_is_filled_up_in_bytes_only() -> None:
    """Over 4 ranks 510 rows are 128 on each: rank 0 stores and counts 128, and the model has 510."""
    settings = {"parallel.tensor": 4, "model.vocab_size": 510, "tokenizer": None, "data": None}
    report = plan(load("preset:tiny", settings))
    full = plan(load("preset:tiny", {"parallel.tensor": 4}))
    assert report.num_params == full.num_params - 2 * 64
    assert report.training is not None and full.training is not None
    assert report.training.states[0].weights_bytes == full.training.states[0].weights_bytes


def test_json_has_the_documented_keys() -> None:
    answer = plan(load("preset:tiny", {"parallel.tensor": 2}), gpus="2xH100").to_json()
    assert isinstance(answer["parameters"], dict) and isinstance(answer["parameters"]["total"], int)
    ranks = answer["memory"]["per_rank"]  # type: ignore[index]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        parts = {key: value for key, value in rank.items() if key.endswith("_bytes") and key != "total_bytes"}
        assert rank["total_bytes"] == sum(parts.values())
        names = ("weights", "gradients", "optimizer", "activations", "logits", "context", "nccl", "allocator")
        assert {f"{name}_bytes" for name in names} <= set(parts)
    assert answer["fits"] is True and answer["time"]["step_s"] > 0  # type: ignore[index]
    assert answer["kv_cache"]["bytes_per_token"] == 512 and answer["flops"]["per_token"] > 0  # type: ignore[index]
    without = plan(load("preset:llama3.2-1b")).to_json()
    assert without["fits"] is None and without["gpus"] is None and without["time"]["step_s"] is None  # type: ignore[index]
    assert set(without["memory"]["per_rank"][0]) == {
        "rank",
        "pipeline",
        "weights_bytes",
        "kv_cache_bytes",
        "context_bytes",
        "nccl_bytes",
        "total_bytes",
    }  # type: ignore[index]


def test_it_fits_or_not() -> None:
    spec = load("preset:llama3.1-8b", {"build.precision": "bfloat16", "build.max_positions": 8192})
    assert plan(spec, gpus="1xH100").fits is True
    assert plan(load("preset:llama3.1-8b"), gpus="1xH100").fits is False
    train = {"train": {**ONE_B["train"], "batch_size": 1}}
    assert plan(load("preset:llama3.1-8b", train), gpus="H100").fits is False, "16 bytes a parameter are 128 GB"
    assert plan(load("preset:llama3.1-8b", train), gpus="8xH100").fits is True


def test_auto_data_shard_fills_the_cluster() -> None:
    report = plan(load("preset:llama3.2-1b", {**ONE_B, "parallel.tensor": 4}), gpus="512xH100")
    assert {axis: degree for axis, degree in report.degrees.items() if degree > 1} == {"data_shard": 128, "tensor": 4}
    assert len(report.memory) == 512
    assert any("batch_size (2)" in note for note in report.notes)


def test_the_bound_is_a_bound_and_expectations_are_above_it() -> None:
    """Measured: 56,984 tokens/s at batch 2 on one H100, and 155.8 tokens/s in decode of an 8B model."""
    report = plan(load("preset:llama3.2-1b", ONE_B), gpus="1xH100")
    assert report.bound_s is not None and 0.4 * 8192 / 56_984 < report.bound_s < 8192 / 56_984
    assert report.step_s is not None and report.bound_s < report.step_s
    decode = {"build.precision": "bfloat16", "build.max_batch": 1, "build.max_positions": 2048}
    report = plan(load("preset:llama3.1-8b", decode), gpus="1xH100")
    assert report.bound_s is not None and 0.5 / 155.8 < report.bound_s < 1 / 155.8
    assert report.step_s is not None and report.bound_s < report.step_s < 1 / 155.8


def test_largest_batches_fill_the_memory() -> None:
    report = plan(load("preset:llama3.1-8b", {"build.precision": "bfloat16", "build.max_positions": 8192}), gpus="H100")
    assert report.inference is not None and report.inference.largest_batch is not None
    room = report.cluster.capacity_bytes - (  # type: ignore[union-attr]
        total_bytes(report.memory[0]) - report.inference.memory[0].kv_cache_bytes
    )
    for positions, batch in report.inference.largest_batch.items():
        assert batch * positions * 131_072 <= room < (batch + 1) * positions * 131_072
    assert list(report.inference.largest_batch) == [8192, 4096, 2048, 1024]


@pytest.mark.parametrize(
    "text", ["", "x", "0xH100", "8xC300", "-1xH100", "8", "8 H100", "H100x8", "8xH100x2", "1000000xH100"]
)
def test_an_unknown_machine_is_refused(text: str) -> None:
    with pytest.raises(ArchwrightError, match="PLAN001"):
        parse_cluster(text)


def test_a_mesh_that_is_not_the_cluster_is_refused() -> None:
    with pytest.raises(ArchwrightError, match="PLAN002") as caught:
        plan(load("preset:tiny", {"parallel.tensor": 4}), gpus="6xH100")
    assert caught.value.help == "use --gpus 8xH100"
    with pytest.raises(ArchwrightError, match="PLAN002"):
        plan(load("preset:tiny", {"parallel.data_shard": 1}), gpus="2xH100")
    with pytest.raises(ArchwrightError, match="PLAN002"):
        plan(load("preset:llama3.1-8b", {"build.parallel.tensor": 2}), gpus="1xH100")
    assert plan(load("preset:llama3.1-8b", {"build.parallel.tensor": 2}), gpus="8xH100").replicas == 4


def test_planning_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from archwright.compiler import plan; from archwright.spec import load;"
        "plan(load('preset:llama3.1-8b'), gpus='8xH100');"
        "plan(load('preset:llama3.1-8b', {'train': {'kind': 'pretrain'}}), gpus='8xH100');"
        "from archwright.compiler.planning import check_plan, write_plan;"
        "assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("parallel", "code"),
    [
        ({"pipeline": "auto", "data_shard": 1, "schedule": {"kind": "interleaved"}}, "SPEC044"),
        ({"tensor": "auto", "data_shard": 1}, "SPEC021"),
        ({"pipeline": "auto", "data_shard": 1}, "SPEC043"),
    ],
)
def test_what_auto_becomes_keeps_the_rules(parallel: dict[str, object], code: str) -> None:
    settings = {"parallel": parallel, "train.micro_batches": 2}
    gpus = {"SPEC021": "3xH100", "SPEC043": "7xH100", "SPEC044": "3xH100"}[code]
    with pytest.raises(ArchwrightError, match=code):
        plan(load("preset:tiny", {**settings, "model.layers": 6}), gpus=gpus)
