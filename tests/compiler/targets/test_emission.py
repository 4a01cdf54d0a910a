"""What the graphs compute, against the oracle. B batch, S sequence, T tokens in all."""

import numpy as np
import onnx
import pytest

from archwright.compiler.interpreters.numpy_ops import make_cache, run_numpy
from archwright.compiler.ir import Step
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.retype import as_float32
from archwright.compiler.tolerances import TOLERANCES, largest_error

TOLERANCE = TOLERANCES["onnxruntime", "float32"]
RANKS = [
    pytest.param(1, 2, id="1rank"),
    pytest.param(2, 2, id="2ranks"),
    pytest.param(4, 2, id="4ranks-replicated-kv"),
    pytest.param(4, 1, id="4ranks-mqa"),
    pytest.param(4, 4, id="4ranks-mha"),
]


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 61, shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [False, True])
def test_whole_sequences(make_spec, export, running, tied, scaling):
    model = export(make_spec(tied=tied, scaling=scaling))
    ids_BS = tokens(2, 9)
    outputs = running(model.graph, batch=2).step(ids_BS, np.zeros(2, np.int64), 9)
    assert largest_error(outputs["logits"], model.oracle(ids_BS)) < TOLERANCE


def test_capacity_beyond_what_is_visible_changes_nothing(make_spec, export, running):
    model = export(make_spec())
    ids_BS = tokens(1, 5)
    run = running(model.graph, batch=1)
    run.caches = {name: cache + 7 for name, cache in run.caches.items()}
    outputs = run.step(ids_BS, np.zeros(1, np.int64), 32)
    assert largest_error(outputs["logits"], model.oracle(ids_BS)) < TOLERANCE


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("tensor", "kv_heads"), RANKS)
def test_prefill_and_decode_at_uneven_lengths(make_spec, export, running, tensor, kv_heads, precision):
    """Prompts of 7, 4 and 1 tokens in one padded batch, then 16 steps, each row at its own place in the cache."""
    model = export(make_spec(kv_heads=kv_heads), tensor=tensor, precision=precision)
    graph = as_float32(merge_ranks(model.folder))
    run = running(graph.SerializeToString(), folder=model.folder, batch=3)
    lengths_B = np.array([7, 4, 1])
    ids_BT = tokens(3, 23)
    expected_BTV = model.oracle(ids_BT)
    row_B = np.arange(3)
    first = run.step(np.where(np.arange(7) < lengths_B[:, None], ids_BT[:, :7], 0), np.zeros(3, np.int64), 7)
    assert len(first) == tensor
    for logits_BSV in first.values():
        error = largest_error(logits_BSV[row_B, lengths_B - 1], expected_BTV[row_B, lengths_B - 1])
        assert error < TOLERANCE
    for step in range(16):
        at_B = lengths_B + step
        outputs = run.step(ids_BT[row_B, at_B][:, None], at_B, int(at_B.max()) + 1)
        for logits_BSV in outputs.values():
            assert largest_error(logits_BSV[:, 0], expected_BTV[row_B, at_B]) < TOLERANCE


def test_a_prompt_in_pieces_gives_the_same(make_spec, export, running):
    model = export(make_spec())
    ids_BT = tokens(2, 12)
    run = running(model.graph, batch=2)
    pieces = [
        run.step(ids_BT[:, start:stop], np.full(2, start), stop)["logits"] for start, stop in ((0, 5), (5, 6), (6, 12))
    ]
    assert largest_error(np.concatenate(pieces, axis=1), model.oracle(ids_BT)) < TOLERANCE


def test_the_last_rows_of_the_cache(make_spec, export, running):
    model = export(make_spec(), capacity=20)
    ids_BT = tokens(1, 20)
    run = running(model.graph, batch=1)
    run.step(ids_BT[:, :17], np.zeros(1, np.int64), 17)
    outputs = run.step(ids_BT[:, 17:], np.array([17]), 20)
    assert largest_error(outputs["logits"], model.oracle(ids_BT)[:, 17:]) < TOLERANCE


def test_half_precision_rotates_in_float32_at_long_positions(make_spec, export, running):
    """bfloat16 has 8 bits: at position 8,190 neighbouring positions would share one angle."""
    model = export(make_spec(max_positions=8192, layers=1), precision="bfloat16", capacity=8192)
    graph = as_float32(merge_ranks(model.folder))
    rotary = [node for node in graph.graph.node if node.op_type == "RotaryEmbedding"]
    tables = {t.name: t.data_type for t in graph.graph.initializer}
    assert {tables[name] for node in rotary for name in node.input[1:3]} == {onnx.TensorProto.FLOAT}
    run = running(graph.SerializeToString(), folder=model.folder, batch=1)
    ids_BS = tokens(1, 6)
    outputs = run.step(ids_BS, np.array([8186]), 8192)
    step = Step(
        positions_BS=np.arange(8186, 8192)[None], write_index_B=np.array([8186]), kv_positions_L=np.arange(8192)
    )
    cache = make_cache(model.plan.program, batch=1, positions=8192)
    expected = run_numpy(model.plan.program, model.arrays, ids_BS, step=step, cache=cache)
    assert largest_error(outputs["logits"], expected) < TOLERANCE


def test_caches_stay_in_place(make_spec, export, capfd):
    """The same memory as input and output: nothing is copied, and ONNX Runtime does not warn that it would be."""
    ort = pytest.importorskip("onnxruntime")
    model = export(make_spec())
    session = ort.InferenceSession(str(model.graph), providers=["CPUExecutionProvider"])
    shapes = {i.name: [1, *i.shape[1:]] for i in session.get_inputs() if "past." in i.name}
    caches = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    pointers = {name: cache.data_ptr() for name, cache in caches.items()}
    ids_BT = tokens(1, 10)
    logits = []
    for at in range(10):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids_BT[:, at : at + 1])
        binding.bind_cpu_input("position_ids", np.array([[at]]))
        binding.bind_cpu_input("write_index", np.array([at]))
        binding.bind_cpu_input("kv_positions", np.arange(at + 1))
        binding.bind_output("logits")
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past.", "present."), cache)
        session.run_with_iobinding(binding)
        logits.append(binding.get_outputs()[0].numpy()[:, 0])
    assert {name: cache.data_ptr() for name, cache in caches.items()} == pointers
    assert largest_error(np.stack(logits, axis=1), model.oracle(ids_BT)) < TOLERANCE
    assert "in-place" not in capfd.readouterr().err
