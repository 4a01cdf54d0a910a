"""Joining rank graphs: what is shared, what is refused, and that a wrong rank shows."""

import shutil

import numpy as np
import onnx
import pytest

from archwright.compiler.targets.linter import lint
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.spec import ArchwrightError


def edit(folder, rank, change):
    path = folder / f"rank{rank}" / "stage0.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def collectives(graph):
    return [node for node in graph.node if node.op_type == "DistCollective"]


def test_names_and_files(make_spec, export):
    model = export(make_spec(layers=1), tensor=2)
    merged = merge_ranks(model.folder)
    caches = [f"rank{rank}/past.0.{state}" for rank in range(2) for state in ("key", "value")]
    indices = ["input_ids", "position_ids", "write_index", "kv_positions"]
    assert [value.name for value in merged.graph.input] == indices + caches
    logits = [value.name for value in merged.graph.output if "present." not in value.name]
    assert logits == ["logits", "rank1/logits"]
    assert sum(node.op_type == "Sum" for node in merged.graph.node) == 2
    assert not collectives(merged.graph)
    locations = {entry.value for t in merged.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert locations == {"rank0/stage0.data", "rank1/stage0.data"}
    path = model.folder / "merged.onnx"
    path.write_bytes(merged.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    assert lint(merged, model.folder) == []


def test_one_rank_is_joined_too(make_spec, export, running):
    model = export(make_spec(layers=1))
    run = running(merge_ranks(model.folder).SerializeToString(), folder=model.folder, batch=1)
    ids_BS = np.arange(6)[None]
    outputs = run.step(ids_BS, np.zeros(1, np.int64), 6)
    assert list(outputs) == ["logits"]
    assert largest_error(outputs["logits"], model.oracle(ids_BS)) < TOLERANCES["onnxruntime", "float32"]


def test_a_rank_with_another_ranks_weights_shows(make_spec, export, running):
    model = export(make_spec(layers=1), tensor=2)
    shutil.copyfile(model.folder / "rank0" / "stage0.data", model.folder / "rank1" / "stage0.data")
    run = running(merge_ranks(model.folder).SerializeToString(), folder=model.folder, batch=1)
    ids_BS = np.arange(6)[None]
    outputs = run.step(ids_BS, np.zeros(1, np.int64), 6)
    assert largest_error(outputs["logits"], model.oracle(ids_BS)) > 1000 * TOLERANCES["onnxruntime", "float32"]


def test_a_missing_rank_is_named(make_spec, export):
    model = export(make_spec(layers=1), tensor=4)
    (model.folder / "rank2" / "stage0.onnx").unlink()
    with pytest.raises(ArchwrightError, match=r"rank2/stage0\.onnx: BUILD020"):
        merge_ranks(model.folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ArchwrightError, match="BUILD020"):
        merge_ranks(tmp_path)


def test_ranks_with_other_collectives_are_refused(make_spec, export):
    def drop(graph):
        node = collectives(graph)[-1]
        for reader in graph.node:
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
        graph.node.remove(node)

    model = export(make_spec(layers=1), tensor=2)
    edit(model.folder, 1, drop)
    with pytest.raises(ArchwrightError, match="BUILD021 rank 1 has 1 collectives, rank 0 has 2"):
        merge_ranks(model.folder)


def test_ranks_with_another_order_are_refused(make_spec, export):
    def swap(graph):
        first, second = collectives(graph)
        first.name, second.name = second.name, first.name

    model = export(make_spec(layers=1), tensor=2)
    edit(model.folder, 1, swap)
    with pytest.raises(ArchwrightError, match=r"BUILD021 rank 1 runs `.*down_proj/all_reduce` where rank 0 runs"):
        merge_ranks(model.folder)


@pytest.mark.parametrize(("name", "value"), [("reduce_op", "max"), ("collective_operation", "reduce"), ("nb_rank", 4)])
def test_other_collectives_are_refused(make_spec, export, name, value):
    def change(graph):
        attributes = collectives(graph)[0].attribute
        index = next(index for index, attribute in enumerate(attributes) if attribute.name == name)
        attributes[index].CopyFrom(onnx.helper.make_attribute(name, value))

    model = export(make_spec(layers=1), tensor=2)
    for rank in range(2):
        edit(model.folder, rank, change)
    with pytest.raises(ArchwrightError, match="BUILD022"):
        merge_ranks(model.folder)
