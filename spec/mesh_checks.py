"""Rules of the mesh: what each axis can cut, and which degrees go together."""

from collections.abc import Callable, Iterator

from archwright.spec.findings import (
    Finding,
    channels_cut,
    divisors,
    layers,
    nearest,
    nearest_multiple,
    tensor_degrees,
)
from archwright.spec.models import Layer, Spec

AXES = ("tensor", "pipeline", "context", "expert", "data_shard", "data_replicate")


def _known(spec: Spec) -> dict[str, int]:
    """Axis → degree, of those that the spec gives as a number."""
    return {axis: degree for axis in AXES if isinstance(degree := getattr(spec.parallel, axis), int)}


def _layers_and_degrees(spec: Spec) -> Iterator[tuple[str, Layer, str, int]]:
    for path, layer in layers(spec):
        for degree_path, degree in tensor_degrees(spec):
            yield path, layer, degree_path, degree


def _tensor_splits_heads(spec: Spec) -> Iterator[Finding]:
    for path, layer, degree_path, degree in _layers_and_degrees(spec):
        heads = layer.attention.heads
        if heads % degree:
            yield Finding(
                code="SPEC021", path=f"{path}.attention.heads", others={degree_path: degree},
                message=f"`heads` ({heads}) is not divisible by `{degree_path}` ({degree})",
                label=f"{heads} query heads cannot be split over {degree} ranks",
                help=f"use tensor: {nearest(degree, divisors(heads))}, "
                f"or set heads to a multiple of {degree}",
            )  # fmt: skip


def _tensor_splits_kv_heads(spec: Spec) -> Iterator[Finding]:
    for path, layer, degree_path, degree in _layers_and_degrees(spec):
        kv_heads = layer.attention.kv_heads or layer.attention.heads
        if kv_heads % degree and degree % kv_heads:
            yield Finding(
                code="SPEC022", path=f"{path}.attention.kv_heads", others={degree_path: degree},
                message=f"`kv_heads` ({kv_heads}) and `{degree_path}` ({degree}): neither divides the other",
                label=f"{kv_heads} key/value heads can be neither split over {degree} ranks nor copied to them",
                help=f"use tensor: {nearest(degree, divisors(kv_heads))}, "
                f"or a kv_heads that {degree} divides",
            )  # fmt: skip


def _tensor_splits_ffn(spec: Spec) -> Iterator[Finding]:
    for path, layer, degree_path, degree in _layers_and_degrees(spec):
        yield from channels_cut(
            f"{path}.ffn.hidden_size", "ffn.hidden_size", layer.ffn.hidden_size, degree_path, degree
        )


def _micro_batches_divide_batch(spec: Spec) -> Iterator[Finding]:
    train = spec.train
    if train and train.batch_size % train.micro_batches:
        size, pieces = train.batch_size, train.micro_batches
        yield Finding(
            code="SPEC031", path="train.batch_size", others={"train.micro_batches": pieces},
            message=f"`batch_size` ({size}) is not divisible by `micro_batches` ({pieces})",
            label=f"{size} sequences cannot be cut into {pieces} equal pieces",
            help=f"use batch_size: {nearest_multiple(size, pieces)}, "
            f"or micro_batches: {nearest(pieces, divisors(size))}",
        )  # fmt: skip


def _one_degree_is_auto(spec: Spec) -> Iterator[Finding]:
    autos = [axis for axis in AXES if getattr(spec.parallel, axis) == "auto"]
    for axis in autos[:-1]:
        yield Finding(
            code="SPEC040", path=f"parallel.{axis}", others={f"parallel.{autos[-1]}": "auto"},
            message=f"`parallel.{axis}` and `parallel.{autos[-1]}` are both `auto`",
            label="one axis can fill what the others leave", help=f"give {autos[-1]} a number, for example 1",
        )  # fmt: skip


def _sequence_needs_tensor(spec: Spec) -> Iterator[Finding]:
    if spec.parallel.sequence and spec.parallel.tensor == 1:
        yield Finding(
            code="SPEC041", path="parallel.sequence", others={"parallel.tensor": 1},
            message="`parallel.sequence` is true and `parallel.tensor` is 1",
            label="it spreads the sequence over the tensor ranks, and there is one",
            help="use sequence: false, or tensor: 2 or more",
        )  # fmt: skip


def _symmetric_memory_needs_sequence(spec: Spec) -> Iterator[Finding]:
    if spec.parallel.symmetric_memory is True and not spec.parallel.sequence:
        yield Finding(
            code="SPEC050", path="parallel.symmetric_memory", others={"parallel.sequence": False},
            message="`parallel.symmetric_memory` is true and `parallel.sequence` is false",
            label="what travels by copies are tokens that tensor ranks share, and they share none",
            help="use symmetric_memory: auto, or sequence: true",
        )  # fmt: skip


def _ring_attends_causally(spec: Spec) -> Iterator[Finding]:
    if not spec.parallel.ring:
        return
    if spec.parallel.context == 1:
        yield Finding(
            code="SPEC049", path="parallel.ring", others={"parallel.context": 1},
            message="`parallel.ring` is true and `parallel.context` is 1",
            label="keys and values travel between context ranks, and there is one",
            help="use ring: false, or context: 2 or more",
        )  # fmt: skip
    for path, layer in layers(spec):
        if layer.attention.mask.kind != "causal":
            yield Finding(
                code="SPEC049", path="parallel.ring", others={f"{path}.attention.mask.kind": layer.attention.mask.kind},
                message=f"`parallel.ring` is true and a layer's mask is `{layer.attention.mask.kind}`",
                label="a ring skips the blocks that a causal mask hides, and knows no other mask",
                help="use ring: false: context ranks then gather keys and values, under every mask",
            )  # fmt: skip


def _tokens_are_spread_evenly(spec: Spec) -> Iterator[Finding]:
    """A context rank takes two equal pieces of a sequence; with `sequence`, tensor ranks cut what it has again."""
    known, train = _known(spec), spec.train
    context, tensor = known.get("context", 1), known.get("tensor", 1) if spec.parallel.sequence else 1
    pieces = (2 * context if context > 1 else 1) * tensor
    if train and train.sequence_length % pieces:
        others: dict[str, object] = {"parallel.context": context} if context > 1 else {}
        if tensor > 1:
            others["parallel.tensor"] = tensor
        yield Finding(
            code="SPEC042", path="train.sequence_length", others=others,
            message=f"`sequence_length` ({train.sequence_length}) does not come out even in {pieces} pieces",
            label="context ranks take two pieces each, and `sequence` cuts among the tensor ranks",
            help=f"use sequence_length: {nearest_multiple(train.sequence_length, pieces)}",
        )  # fmt: skip


def _pipeline_has_layers(spec: Spec) -> Iterator[Finding]:
    ranks, schedule, limit = _known(spec).get("pipeline", 1), spec.parallel.schedule, spec.model.num_layers
    each = schedule.stages_per_rank if schedule.kind == "interleaved" else 1
    if ranks > 1 and ranks * each > limit:
        what = f"{ranks} ranks of {each} stages" if each > 1 else f"{ranks} stages"
        yield Finding(
            code="SPEC043", path="parallel.pipeline", others={"model.layers": limit},
            message=f"`parallel.pipeline`: {what} for {limit} layers",
            label="a stage holds a layer at least", help=f"use pipeline: {max(1, limit // each)}",
        )  # fmt: skip
    stages = spec.build.parallel.pipeline
    if stages > max(1, limit):
        yield Finding(
            code="SPEC043", path="build.parallel.pipeline", others={"model.layers": limit},
            message=f"`build.parallel.pipeline`: {stages} stages for {limit} layers",
            label="a stage holds a layer at least", help=f"use pipeline: {limit}",
        )  # fmt: skip


def _pipeline_is_filled(spec: Spec) -> Iterator[Finding]:
    ranks, train, schedule = _known(spec).get("pipeline", 1), spec.train, spec.parallel.schedule
    if train is None or ranks == 1 or schedule.kind == "gpipe":
        return
    pieces = train.micro_batches
    whole = schedule.kind != "interleaved" or pieces % ranks == 0
    if pieces < ranks or not whole:
        need = f"a multiple of {ranks}" if schedule.kind == "interleaved" else f"{ranks} or more"
        yield Finding(
            code="SPEC044", path="train.micro_batches", others={"parallel.pipeline": ranks},
            message=f"`micro_batches` ({pieces}) is too few for a pipeline of {ranks} under {schedule.kind}",
            label=f"the schedule needs {need}",
            help=f"use micro_batches: {max(ranks, nearest_multiple(pieces, ranks))}",
        )  # fmt: skip


def _batch_fills_data_ranks(spec: Spec) -> Iterator[Finding]:
    known, train = _known(spec), spec.train
    ranks = known.get("data_shard", 1) * known.get("data_replicate", 1) * known.get("expert", 1)
    if train is None or ranks == 1:
        return
    pieces = ranks * train.micro_batches
    if train.batch_size % pieces:
        axes = {axis: known.get(axis, 1) for axis in ("data_shard", "data_replicate", "expert")}
        others: dict[str, object] = {f"parallel.{axis}": degree for axis, degree in axes.items() if degree > 1}
        yield Finding(
            code="SPEC045", path="train.batch_size",
            others={**others, "train.micro_batches": train.micro_batches},
            message=f"`batch_size` ({train.batch_size}) is not divisible by {ranks} data ranks x "
            f"{train.micro_batches} micro-batches",
            label="each data rank takes equally many sequences of each micro-batch",
            help=f"use batch_size: {nearest_multiple(train.batch_size, pieces)}",
        )  # fmt: skip


MESH_RULES: tuple[Callable[[Spec], Iterator[Finding]], ...] = (
    _tensor_splits_heads,
    _tensor_splits_kv_heads,
    _tensor_splits_ffn,
    _one_degree_is_auto,
    _sequence_needs_tensor,
    _symmetric_memory_needs_sequence,
    _ring_attends_causally,
    _tokens_are_spread_evenly,
    _pipeline_has_layers,
    _pipeline_is_filled,
    _micro_batches_divide_batch,
    _batch_fills_data_ranks,
)
