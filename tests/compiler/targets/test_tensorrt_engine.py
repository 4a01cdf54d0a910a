"""TensorRT for RTX parses and builds the rank graphs. It needs no GPU; without its wheel these tests are skipped."""

from types import ModuleType, SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from archwright.compiler.targets.network_check import check_network
from archwright.compiler.targets.tensorrt_engine import build_engine, default_profiles, parse_graph
from archwright.spec import ArchwrightError
from archwright.spec.models import Build, Profile
from archwright.spec.models.deployment import Engine, Range

PRECISIONS = ["float32", "float16", "bfloat16"]


@pytest.fixture(scope="session")
def trt():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]"
    )


def profiles(capacity: int) -> tuple[Profile, ...]:
    return default_profiles(Build(max_batch=4), capacity)


def edit(path, change):
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def attention_of(graph):
    return next(node for node in graph.node if node.op_type == "Attention")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_rank_graph_parses_and_builds(trt, make_spec, export, tensor, precision):
    model = export(make_spec(tied=tensor == 2), tensor=tensor, precision=precision)
    summary = build_engine(model.graph, profiles(model.capacity), Engine(), model.planned, library=trt)
    assert summary.path.name == "stage0.engine"
    assert summary.path.stat().st_size == summary.num_bytes > 0
    assert "info " in summary.path.with_suffix(".log").read_text()
    assert sorted(path.name for path in model.graph.parent.iterdir()) == [
        "stage0.data",
        "stage0.engine",
        "stage0.log",
        "stage0.onnx",
    ]
    assert summary.library.startswith("TensorRT for RTX")
    assert summary.layers["KV_CACHE_UPDATE"] == 4
    assert summary.layers["ATTENTION_INPUT"] == 2
    assert summary.layers.get("DIST_COLLECTIVE", 0) == (4 if tensor > 1 else 0)


@pytest.mark.parametrize(("precision", "head_dim"), [("float32", 64), ("float16", 20), ("bfloat16", 128)])
def test_head_sizes_without_a_fused_kernel_build_too(trt, make_spec, export, precision, head_dim):
    """With two layers: on one layer with float16 heads of 20 the compiler of TensorRT for RTX 1.7.1 fails."""
    model = export(make_spec(head_dim=head_dim), precision=precision)
    assert build_engine(model.graph, profiles(model.capacity), Engine(), model.planned, library=trt).num_bytes > 0


def test_an_input_that_tensorrt_ignores_is_found(trt, make_spec, export):
    """TensorRT accepts `nonpad_kv_seqlen` and computes as if it were not there."""

    def add_lengths(graph):
        graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]))
        attention_of(graph).input.extend(["", "", "lengths"])

    model = export(make_spec(layers=1))
    edit(model.graph, add_lengths)
    with pytest.raises(ArchwrightError, match="BUILD031 input `lengths` has no effect on any output"):
        build_engine(model.graph, profiles(model.capacity), Engine(), model.planned, library=trt)
    assert not model.graph.with_suffix(".engine").exists()


def test_a_refused_node_is_named_with_the_reason(trt, make_spec, export):
    def be_causal(graph):
        attention_of(graph).attribute.append(helper.make_attribute("is_causal", 1))

    model = export(make_spec(layers=1))
    edit(model.graph, be_causal)
    with pytest.raises(ArchwrightError) as raised:
        build_engine(model.graph, profiles(model.capacity), Engine(), model.planned, library=trt)
    assert raised.value.code == "BUILD030"
    assert "`model.layers.0.self_attn/attention` (Attention): " in raised.value.message


def test_a_profile_that_tensorrt_refuses_is_reported(trt, make_spec, export):
    model = export(make_spec(layers=1))
    one, falling = Range(min=1, opt=1, max=1), Range(min=9, opt=9, max=1)
    with pytest.raises(ArchwrightError, match=r"BUILD032 TensorRT for RTX .* cannot build the engine: "):
        build_engine(
            model.graph, [Profile(batch=one, sequence=one, positions=falling)], Engine(), model.planned, library=trt
        )
    assert not model.graph.with_suffix(".engine").exists()


def parsed(trt, model):
    """The network of a graph, and the graph."""
    network = parse_graph(trt, trt.Builder(trt.Logger(trt.Logger.ERROR)), model.graph)
    return network, onnx.load(model.graph, load_external_data=False).graph


def test_the_network_check_sees_lost_collectives_and_changed_types(trt, make_spec, export):
    model = export(make_spec(layers=1), tensor=2, precision="float16")
    network, graph = parsed(trt, model)
    assert check_network(network, graph, model.planned) == []
    graph.node.append(next(node for node in graph.node if node.op_type == "DistCollective"))
    graph.output[1].type.tensor_type.elem_type = TensorProto.FLOAT
    graph.input[0].name = "tokens"
    assert check_network(network, graph, model.planned) == [
        "input `tokens` is not in the network",
        "output `present.0.key` is HALF, not FLOAT",
        "3 DistCollective became 2 DIST_COLLECTIVE layers",
    ]


def test_the_plan_is_read_off_the_program(make_spec, export):
    model = export(make_spec(), tensor=4, precision="bfloat16")
    planned = model.planned
    names = [f"{layer}.{state}" for layer in range(2) for state in ("key", "value")]
    assert planned.inputs == {
        **dict.fromkeys(("input_ids", "position_ids", "write_index", "kv_positions"), "INT64"),
        **{f"past.{name}": "BF16" for name in names},
    }
    assert planned.outputs == {"logits": "FLOAT", **{f"present.{name}": "BF16" for name in names}}
    # Two key/value heads on four ranks: each has one.
    assert planned.caches == dict.fromkeys(names, (None, 1, 32, 8))
    assert (planned.collectives, planned.attentions) == (4, 2)


def drop_a_reduction(graph):
    """The graph that a forgotten `reduce` would give: whole in itself, and wrong."""
    lost = next(node for node in graph.node if node.op_type == "DistCollective")
    for node in graph.node:
        node.input[:] = [lost.input[0] if name == lost.output[0] else name for name in node.input]
    graph.node.remove(lost)


def widen_the_logits(graph):
    cast = next(node for node in graph.node if node.output[0] == "logits")
    cast.attribute[0].i = graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def swap_caches(graph):
    """Keys and values change their places behind the update: present.0.key is then made of past.0.value."""
    key, value = (
        next(each for each in graph.node if each.output[0] == f"present.0.{state}") for state in ("key", "value")
    )
    key.input[0], value.input[0] = value.input[0], key.input[0]


def lengthen_a_cache(graph):
    for value in (*graph.input, *graph.output):
        if value.name.endswith(".0.key"):
            value.type.tensor_type.shape.dim[2].dim_value = 64


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop_a_reduction, "there are 1 DIST_COLLECTIVE layers, planned are 2"),
        (widen_the_logits, "output `logits` is HALF, planned is FLOAT"),
        (swap_caches, "cache `past.0.value` is not updated in place (its result is `present.0.key`)"),
        (lengthen_a_cache, "`past.0.key` is [-1, 1, 64, 8], planned is [-1, 1, 32, 8]"),
    ],
)
def test_a_graph_that_is_not_the_plan_is_refused(trt, make_spec, export, change, problem):
    model = export(make_spec(layers=1), tensor=2, precision="float16")
    edit(model.graph, change)
    network, graph = parsed(trt, model)
    assert problem in check_network(network, graph, model.planned)
    with pytest.raises(ArchwrightError, match="BUILD031"):
        build_engine(model.graph, profiles(model.capacity), Engine(), model.planned, library=trt)
    assert not model.graph.with_suffix(".engine").exists()


def test_the_default_profiles_are_prefill_and_decode():
    prefill, decode = default_profiles(Build(max_batch=8), 4096)
    assert (decode.sequence.min, decode.sequence.max) == (1, 1)
    assert prefill.sequence.max == 2048
    assert prefill.positions.max == decode.positions.max == 4096
    assert prefill.batch.max == decode.batch.max == 8
    (small, _) = default_profiles(Build(max_batch=1), 1)
    assert (small.sequence.max, small.positions.opt) == (1, 1)
    assert default_profiles(Build(profiles=(prefill,)), 4096) == (prefill,)


def test_a_library_that_does_not_start_is_reported(tmp_path, make_spec, export):
    planned = export(make_spec()).planned

    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal"

    def refuse(logger):
        logger.log("error", "no CUDA driver")
        raise TypeError("factory function returned nullptr")

    library = ModuleType("tensorrt")
    library.__dict__.update(vars(SimpleNamespace(ILogger=Logger, Builder=refuse, __version__="11.2")))
    with pytest.raises(ArchwrightError, match=r"BUILD033 TensorRT 11\.2 does not start: no CUDA driver"):
        build_engine(tmp_path / "stage0.onnx", (), Engine(), planned, library=library)
