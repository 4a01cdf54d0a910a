"""Pipeline stages as graphs: what goes in and out of each, what each stores, and that together they are the model.

B batch, S sequence, L visible positions, V vocabulary.
"""

from typing import Any

import numpy as np
import onnx
import pytest

from archwright.compiler.ir import Causal, Degrees
from archwright.compiler.passes import partition
from archwright.compiler.targets.linter import lint
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.stages import stage_of, stages_of
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.spec import ArchwrightError

TOLERANCE = TOLERANCES["onnxruntime", "float32"]
ONNX_TYPES = {"INT64": "int64", "FLOAT": "float32", "BFLOAT16": "bfloat16", "FLOAT16": "float16"}


def graph_of(model: Any, rank: int) -> onnx.GraphProto:
    return onnx.load(model.graph_at(rank), load_external_data=False).graph


def described(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    sizes = tuple(dim.dim_value or dim.dim_param for dim in tensor.shape.dim)
    return ONNX_TYPES[onnx.TensorProto.DataType.Name(tensor.elem_type)], sizes


def test_each_stage_takes_and_gives_what_is_declared(make_spec, export):
    model = export(make_spec(layers=4), pipeline=3, tensor=2, precision="bfloat16", logits="last")
    files = {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*.onnx")}
    assert files == {f"rank{rank}/stage{rank // 2}.onnx" for rank in range(6)}
    layers: list[str] = []
    for stage in stages_of(model.plan):
        facts = {"precision": "bfloat16", "capacity": 32, "options": model.options}
        for rank in model.plan.stage_ranks(stage.number):
            graph = graph_of(model, rank)
            for values, declared in ((graph.input, stage.inputs(**facts)), (graph.output, stage.outputs(**facts))):
                assert [value.name for value in values] == list(declared)
                assert [described(value) for value in values] == [(s.dtype, s.shape) for s in declared.values()]
            onnx.checker.check_model(str(model.graph_at(rank)), full_check=True)
            assert lint(onnx.load(model.graph_at(rank), load_external_data=False), model.graph_at(rank).parent) == []
        layers += [value.name for value in graph.input if value.name.endswith(".key")]
    assert layers == [f"past.{layer}.key" for layer in range(4)], "counted through the whole model"
    ends = [(graph_of(model, rank).input[0].name, graph_of(model, rank).output[0].name) for rank in (0, 2, 4)]
    assert ends == [("input_ids", "hidden"), ("hidden", "hidden.next"), ("hidden", "logits")]
    tables = [[t.name for t in graph_of(model, rank).initializer if "embed" in t.name or "lm_head" in t.name]
              for rank in (0, 2, 4)]  # fmt: skip
    assert tables == [["model.embed_tokens.weight"], [], ["lm_head.weight.T"]]


def test_a_stage_may_be_the_head_alone(make_spec, export):
    """A head of 997 rows is more work than the two layers. It takes what it reads, and has no cache."""
    model = export(make_spec(vocab_size=997), pipeline=2, logits="last", precision="bfloat16")
    assert model.plan.stages == ((0, 3), (3, 4))
    graph = graph_of(model, 1)
    assert [value.name for value in graph.input] == ["hidden", "logit_index"]
    assert [value.name for value in graph.output] == ["logits"]
    assert lint(onnx.load(model.graph_at(1), load_external_data=False), model.graph_at(1).parent) == []
    assert not model.planned_at(1).caches and model.planned_at(1).attentions == 0
    ids_BS = np.arange(9)[None]
    assert largest_error(model.backend().whole(ids_BS), model.oracle(ids_BS)) < TOLERANCE


def test_a_tied_table_is_stored_at_both_ends(make_spec, export):
    model = export(make_spec(tied=True), pipeline=2)
    stored = [[t.name for t in graph_of(model, rank).initializer if "embed_tokens" in t.name] for rank in range(2)]
    assert stored == [["model.embed_tokens.weight"]] * 2
    ids_BS = np.arange(9)[None]
    assert largest_error(model.backend().whole(ids_BS), model.oracle(ids_BS)) < TOLERANCE


@pytest.mark.parametrize("logits", ["all", "last"])
def test_sizes_are_symbolic_in_every_stage(make_spec, export, running, logits):
    """One session a stage, for batches, lengths and visible positions of any size."""
    model = export(make_spec(layers=3, tied=True, positions={"kind": "learned"}), pipeline=3, logits=logits)
    rng = np.random.default_rng(0)
    sessions = [running(model.graph_at(rank), batch=1).session for rank in range(3)]
    for batch, length, visible in ((1, 1, 1), (3, 7, 7), (2, 5, 32)):
        ids_BS = rng.integers(0, 61, (batch, length))
        index_B = rng.integers(0, length, batch)
        value: Any = ids_BS
        for session in sessions:
            names = {item.name: item.shape for item in session.get_inputs()}
            feeds = {
                next(iter(names)): value,
                "position_ids": np.broadcast_to(np.arange(length), ids_BS.shape),
                "write_index": np.zeros(batch, np.int64),
                "kv_positions": np.arange(visible),
                **{name: np.zeros((batch, *shape[1:]), np.float32) for name, shape in names.items() if "past" in name},
            }
            if "logit_index" in names:
                feeds["logit_index"] = index_B
            value = session.run([session.get_outputs()[0].name], feeds)[0]
        expected = model.oracle(ids_BS)
        if logits == "last":
            expected = expected[np.arange(batch), index_B][:, None]
        assert largest_error(value, expected) < TOLERANCE


def test_the_stages_carry_one_generation_through_their_own_caches(make_spec, export):
    model = export(make_spec(layers=3), pipeline=2, tensor=2, logits="last")
    backend = model.backend()
    ids_BS = np.random.default_rng(1).integers(0, 61, (3, 20))
    expected_BSV, lengths_B = model.oracle(ids_BS), np.array([12, 5, 9])
    cache = backend.new_cache(3, 32)
    assert {name.partition("/")[2] for name in cache.values} == {
        f"past.{layer}.{state}" for layer in range(3) for state in ("key", "value")
    }
    prompts_BS = np.where(np.arange(12) < lengths_B[:, None], ids_BS[:, :12], 0)
    rows = np.arange(3)
    found = [backend.prefill(cache, prompts_BS, lengths_B)]
    expected = [expected_BSV[rows, lengths_B - 1]]
    for step in range(8):
        at_B = lengths_B + step
        found.append(backend.decode(cache, ids_BS[rows, at_B], at_B))
        expected.append(expected_BSV[rows, at_B])
    assert largest_error(np.stack(found), np.stack(expected)) < TOLERANCE
    assert largest_error(backend.whole(ids_BS), expected_BSV) < TOLERANCE, "token by token"


def test_a_prefill_of_last_logits_is_one_call_a_chunk(make_spec, export, monkeypatch):
    """Chunks are not cut for logits that nobody makes."""
    backend = export(make_spec(layers=1), logits="last").backend()
    monkeypatch.setattr("archwright.runtime.backends.base.CALL_BYTES", 1)
    monkeypatch.setattr("archwright.runtime.backends.base.PREFILL_CHUNK", 8)
    calls, run = [], backend._run
    monkeypatch.setattr(
        backend, "_run", lambda cache, ids_BS, *rest: calls.append(ids_BS.shape) or run(cache, ids_BS, *rest)
    )
    backend.prefill(backend.new_cache(2, 32), np.ones((2, 19), np.int64), np.array([19, 3]))
    assert calls == [(2, 8), (2, 8), (2, 3)]


def test_a_missing_graph_of_a_later_stage_is_named(make_spec, export):
    model = export(make_spec(), pipeline=2, tensor=2)
    model.graph_at(3).unlink()
    with pytest.raises(ArchwrightError, match=r"rank3/stage1\.onnx: BUILD020"):
        merge_ranks(model.folder, stage=1, ranks=model.plan.stage_ranks(1))


def test_a_stage_is_planned_by_its_own_segments(make_spec, export):
    model = export(make_spec(layers=3), pipeline=2, tensor=2, logits="last")
    plans = [model.planned_at(stage) for stage in range(2)]
    assert sum(each.attentions for each in plans) == 3 and sum(each.collectives for each in plans) == 6
    assert plans[0].outputs["hidden"] == plans[1].inputs["hidden"] == "FLOAT"
    assert "logit_index" in plans[1].inputs and "logit_index" not in plans[0].inputs
    assert not plans[0].caches.keys() & plans[1].caches.keys()


def test_coordinates_count_tensor_ranks_first(make_spec, export):
    program = export(make_spec(layers=2)).plan.program
    plan = partition(program, Degrees(pipeline=2, tensor=4))
    places = [plan.coordinates(rank) for rank in range(8)]
    assert [(place["pipeline"], place["expert"], place["tensor"]) for place in places] == [
        (stage, 0, tensor) for stage in range(2) for tensor in range(4)
    ]
    assert [list(plan.stage_ranks(stage)) for stage in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stage_of(plan, 1).program.segments[0].block.self_attn.mask == Causal()
