"""Rules for graphs that ONNX Runtime and TensorRT must understand alike.

Every rule stands for a trap: a form that one of them refuses, or accepts and computes something else. docs/errors.md
lists them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from onnx import TensorProto

from archwright.compiler.interpreters.onnx_dialects import PORTABLE, Dialect
from archwright.compiler.interpreters.onnx_ops import DOMAIN, OPSET
from archwright.compiler.targets.dialect_rules import grouped_attention, lengths_attention
from archwright.compiler.targets.linted import Graph, Problems, attributes, given, sizes

ROOTED = ("broadcast", "reduce", "gather", "scatter")
UNROOTED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
REDUCE_OPS = ("sum", "prod", "max", "min", "avg")


def lint(model: onnx.ModelProto, folder: Path | None = None, dialect: Dialect = PORTABLE) -> list[str]:
    """What is wrong with a graph: one line a problem, `LINT006 model.layers.0.self_attn/attention: has no scale ...`.

    folder: where the graph's file lies, to look at its external data; without it only their names are checked.
    dialect: whose operators the graph may have.
    """
    graph = Graph(model, folder, dialect)
    return [f"{code} {problem}" for code, rule in RULES.items() for problem in rule(graph)]


def opset(graph: Graph) -> Problems:
    versions = {entry.domain: entry.version for entry in graph.model.opset_import}
    if versions.get("") != OPSET:
        yield f"opset: is {versions.get('')}; TensorScatter and this form of Attention need {OPSET}"
    for domain in versions.keys() - {"", *graph.dialect.domains}:
        yield f"opset: imports `{domain}`, which no graph of target {graph.dialect.target} has"


def attention_lengths(graph: Graph) -> Problems:
    for node in graph.of("Attention"):
        if given(node.input, 6):
            yield f"{node.name}: has `nonpad_kv_seqlen`, which TensorRT accepts and ignores; use an explicit mask"


def attention_causal(graph: Graph) -> Problems:
    for node in graph.of("Attention"):
        if attributes(node).get("is_causal", 0):
            yield f"{node.name}: has is_causal; its triangle starts at row 0 of the cache, and TensorRT refuses a mask"


def attention_mask(graph: Graph) -> Problems:
    for node in graph.of("Attention"):
        if not given(node.input, 3):
            yield f"{node.name}: has no mask, so it sees rows of the cache that are not written yet"
        elif graph.dtypes.get(node.input[3]) != TensorProto.BOOL:
            yield f"{node.name}: its mask is not boolean"


def attention_cache(graph: Graph) -> Problems:
    for node in graph.of("Attention"):
        if given(node.input, 4) or given(node.input, 5):
            yield f"{node.name}: has past inputs, which TensorRT refuses; write the cache with TensorScatter"
        if any(given(node.output, index) for index in range(1, len(node.output))):
            yield f"{node.name}: has more than one output, which TensorRT refuses"


def attention_scale(graph: Graph) -> Problems:
    for node in graph.of("Attention"):
        if "scale" not in attributes(node):
            yield f"{node.name}: has no scale; TensorRT would spread its root over Q and K in many small layers"


def attention_extras(graph: Graph) -> Problems:
    for node in graph.of("Attention"):
        for name in sorted(attributes(node).keys() & {"softcap", "softmax_precision", "qk_matmul_output_mode"}):
            yield f"{node.name}: has {name}, which TensorRT refuses"


def static_cache(graph: Graph) -> Problems:
    for _, past, _ in graph.writes():
        value = graph.inputs.get(past)
        if value is not None and not all(isinstance(size, int) for size in sizes(value)[1:]):
            yield f"{past}: is {sizes(value)}; TensorRT needs a cache that is static in all but the batch"


def aliased_cache(graph: Graph) -> Problems:
    readers = Counter(name for node in graph.nodes for name in node.input)
    written = {past for _, past, _ in graph.writes()}
    for name in graph.inputs:
        if "past." in name and name not in written:
            yield f"{name}: is a cache that nothing writes"
    for node in graph.of("TensorScatter"):
        values = attributes(node)
        if values.get("axis") != 2 or values.get("mode", "linear") != "linear":
            yield f"{node.name}: must write with axis 2 and mode linear"
    for node, past, present in graph.writes():
        if past not in graph.inputs:
            yield f"{node.name}: its cache `{past}` is not a graph input"
        elif present not in graph.outputs:
            yield f"{node.name}: its result `{present}` is not a graph output"
        elif graph.inputs[past].type != graph.outputs[present].type or past.replace("past.", "present.") != present:
            yield f"{node.name}: `{past}` and `{present}` cannot share memory: their names or types do not match"
        elif readers[past] > 1:
            yield f"{node.name}: `{past}` is read by another node too, so it cannot be written in place"
        if node.op_type != "GroupQueryAttention" and not given(node.input, 2):
            yield f"{node.name}: has no write_indices, so it writes every row of the batch at 0"


def rotary_tables(graph: Graph) -> Problems:
    for node in graph.of("RotaryEmbedding"):
        x, *tables = (graph.dtypes.get(name) for name in node.input[:3])
        if any(table != x for table in tables):
            yield f"{node.name}: its tables do not have the type of x"
        elif x != TensorProto.FLOAT:
            yield f"{node.name}: does not rotate in float32, so long positions lose their phase"
        if not given(node.input, 3):
            yield f"{node.name}: has no position_ids; TensorRT and caches need them"


def collective_attributes(graph: Graph) -> Problems:
    for node in graph.of("DistCollective"):
        a = attributes(node)
        kind, reduce_op = a.get("collective_operation"), a.get("reduce_op")
        if node.domain != DOMAIN:
            yield f"{node.name}: is in domain `{node.domain}`; ONNX's checker accepts it in `{DOMAIN}` only"
        if kind not in (*ROOTED, *UNROOTED):
            yield f"{node.name}: collective_operation is {kind!r}"
        if (reduce_op not in REDUCE_OPS) if kind in REDUCING else (reduce_op != "none"):
            yield f"{node.name}: reduce_op {reduce_op!r} does not go with {kind}"
        if (a.get("root", 0) == -1) is (kind in ROOTED):
            yield f"{node.name}: root is {a.get('root', 0)}; it is a rank for {', '.join(ROOTED)} and -1 for the others"
        if not isinstance(a.get("nb_rank"), int) or a["nb_rank"] < 2:
            yield f"{node.name}: nb_rank is {a.get('nb_rank')}"
        yield from _group(node.name, a)
        if len(node.input) != 1 or len(node.output) != 1:
            yield f"{node.name}: has {len(node.input)} inputs and {len(node.output)} outputs; it takes one of each"


def _group(name: str, attributes: Mapping[str, Any]) -> Problems:
    """`groups` lists the ranks that take part, `group_size` is its length, and so is `nb_rank`."""
    if ("groups" in attributes) != ("group_size" in attributes):
        yield f"{name}: groups and group_size do not fit together"
    elif "groups" in attributes:
        group, size = list(attributes["groups"]), attributes["group_size"]
        if not group or len(group) != size or size != attributes.get("nb_rank"):
            yield f"{name}: groups {group}, group_size {size} and nb_rank {attributes.get('nb_rank')} do not fit"
        if len(set(group)) != len(group) or any(rank < 0 for rank in group):
            yield f"{name}: groups {group} are not the numbers of different ranks"


def used_inputs(graph: Graph) -> Problems:
    for name in graph.inputs:
        if name not in graph.needed:
            yield f"{name}: no output depends on this input"


def typed_ends(graph: Graph) -> Problems:
    for name, value in (graph.inputs | graph.outputs).items():
        tensor = value.type.tensor_type
        if not tensor.elem_type or not tensor.HasField("shape"):
            yield f"{name}: has no type or no shape; TensorRT then refuses the model"
        elif any(size == "" for size in sizes(value)):
            yield f"{name}: has a size without a name"


def unique_names(graph: Graph) -> Problems:
    values = [*graph.inputs, *(t.name for t in graph.model.graph.initializer)]
    values += [name for node in graph.nodes for name in node.output if name]
    for kind, names in (("nodes", [node.name for node in graph.nodes]), ("values", values)):
        for name, number in Counter(names).items():
            if number > 1 or not name:
                yield f"{name}: {number} {kind} are called so"


def engine_attributes(graph: Graph) -> Problems:
    for node in graph.nodes:
        for attribute in node.attribute:
            if attribute.name.startswith("TRT_"):
                yield f"{node.name}: has {attribute.name}, with which ONNX Runtime refuses the model"


def external_data(graph: Graph) -> Problems:
    for tensor in graph.model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = PurePosixPath(entries.get("location", ""))
        if location.is_absolute() or ".." in location.parts or "\\" in str(location) or str(location) == ".":
            yield f"{tensor.name}: its data `{location}` lie outside the folder of the graph"
        elif graph.folder is not None:
            file = graph.folder / location
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            if not file.is_file() or not file.resolve().is_relative_to(graph.folder.resolve()):
                yield f"{tensor.name}: `{location}` is missing or leads out of the folder"
            elif file.stat().st_size < end:
                yield f"{tensor.name}: `{location}` has {file.stat().st_size} bytes, the tensor ends at {end}"


RULES: Mapping[str, Callable[[Graph], Problems]] = {
    "LINT001": opset,
    "LINT002": attention_lengths,
    "LINT003": attention_causal,
    "LINT004": attention_mask,
    "LINT005": attention_cache,
    "LINT006": attention_scale,
    "LINT007": attention_extras,
    "LINT008": static_cache,
    "LINT009": aliased_cache,
    "LINT010": rotary_tables,
    "LINT011": collective_attributes,
    "LINT012": used_inputs,
    "LINT013": typed_ends,
    "LINT014": unique_names,
    "LINT015": engine_attributes,
    "LINT016": external_data,
    "LINT017": lengths_attention,
    "LINT018": grouped_attention,
}
