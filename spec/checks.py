"""Cross-field rules: each looks at a sound `Spec` and yields what breaks it, with the exact paths.

A rule is a generator of `Finding`s, listed in `RULES`; `check` places the findings in the text.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from archwright.spec.diagnostics import span_of
from archwright.spec.errors import Diagnostic
from archwright.spec.models import Layer, Llama3Scaling, Range, SentencePieceTokenizer, Spec
from archwright.spec.source import MapNode, fault, find
from archwright.spec.structure import Path, parse_path

TENSOR_DEGREES = (1, 2, 4, 8)
"""What this version partitions, trains and builds."""

_MAX_POSITIONS = "model.max_positions"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A broken rule: the caret goes to `path`; `others` are the values that it is at odds with, by path."""

    code: str
    path: str
    message: str
    label: str
    help: str
    others: dict[str, object] = field(default_factory=dict[str, object])


def check(spec: Spec, tree: MapNode, *, ignore: tuple[Path, ...] = ()) -> list[Diagnostic]:
    """Every broken rule, placed in the text. Findings that touch a path in `ignore` are left out."""

    def is_ignored(finding: Finding) -> bool:
        paths = [parse_path(path) for path in (finding.path, *finding.others)]
        return any(path[: len(bad)] == bad for path in paths for bad in ignore)

    findings = [finding for rule in RULES for finding in rule(spec)]
    return [_place(finding, tree) for finding in findings if not is_ignored(finding)]


def _place(finding: Finding, tree: MapNode) -> Diagnostic:
    notes: list[str] = []
    for other, value in finding.others.items():
        node = find(tree, parse_path(other))
        notes.append(f"`{other}` is {value}, {f'set at {node.span}' if node else 'by default'}")
    return fault(
        span_of(tree, parse_path(finding.path)), finding.code, finding.message,
        path=finding.path, label=finding.label, help=finding.help, notes=tuple(notes),
    )  # fmt: skip


def _layers(spec: Spec) -> Iterator[tuple[str, Layer]]:
    """Each layer that the spec spells out, with its path."""
    model = spec.model
    if isinstance(model.layers, tuple):
        yield from ((f"model.layers[{index}].layer", run.layer) for index, run in enumerate(model.layers))
    elif model.layer is not None:
        yield "model.layer", model.layer


def _stack_is_written_once(spec: Spec) -> Iterator[Finding]:
    model = spec.model
    if isinstance(model.layers, tuple) and model.layer is not None:
        yield Finding(
            code="SPEC038", path="model.layer", message="`model.layer` stands beside a mixed stack",
            label="the runs of `model.layers` bring their own layers", help="remove it",
        )  # fmt: skip
    if not isinstance(model.layers, tuple) and model.layer is None:
        yield Finding(
            code="SPEC012", path="model.layers", message="`layer` is missing in `model`",
            label=f"{model.layers} of which layer?", help="add `layer:`, a mapping with attention and ffn",
        )  # fmt: skip


def _kv_heads_divide_heads(spec: Spec) -> Iterator[Finding]:
    for path, layer in _layers(spec):
        heads, kv_heads = layer.attention.heads, layer.attention.kv_heads
        if kv_heads and heads % kv_heads:
            yield Finding(
                code="SPEC020", path=f"{path}.attention.kv_heads", others={f"{path}.attention.heads": heads},
                message=f"`heads` ({heads}) is not divisible by `kv_heads` ({kv_heads})",
                label=f"{heads} query heads cannot share {kv_heads} key/value heads evenly",
                help=f"use kv_heads: {_nearest(kv_heads, _divisors(heads))}, or set heads to a multiple of {kv_heads}",
            )  # fmt: skip


def _layers_and_degrees(spec: Spec) -> Iterator[tuple[str, Layer, str, int]]:
    for path, layer in _layers(spec):
        for degree_path, degree in _tensor_degrees(spec):
            yield path, layer, degree_path, degree


def _tensor_splits_heads(spec: Spec) -> Iterator[Finding]:
    for path, layer, degree_path, degree in _layers_and_degrees(spec):
        heads = layer.attention.heads
        if heads % degree:
            yield Finding(
                code="SPEC021", path=f"{path}.attention.heads", others={degree_path: degree},
                message=f"`heads` ({heads}) is not divisible by `{degree_path}` ({degree})",
                label=f"{heads} query heads cannot be split over {degree} ranks",
                help=f"use tensor: {_nearest_degree(heads, degree)}, or set heads to a multiple of {degree}",
            )  # fmt: skip


def _tensor_splits_kv_heads(spec: Spec) -> Iterator[Finding]:
    for path, layer, degree_path, degree in _layers_and_degrees(spec):
        kv_heads = layer.attention.kv_heads or layer.attention.heads
        if kv_heads % degree and degree % kv_heads:
            yield Finding(
                code="SPEC022", path=f"{path}.attention.kv_heads", others={degree_path: degree},
                message=f"`kv_heads` ({kv_heads}) and `{degree_path}` ({degree}): neither divides the other",
                label=f"{kv_heads} key/value heads can be neither split over {degree} ranks nor copied to them",
                help=f"use tensor: {_nearest_degree(kv_heads, degree)}, or a kv_heads that {degree} divides",
            )  # fmt: skip


def _tensor_splits_ffn(spec: Spec) -> Iterator[Finding]:
    for path, layer, degree_path, degree in _layers_and_degrees(spec):
        width = layer.ffn.hidden_size
        if width % degree:
            yield Finding(
                code="SPEC023", path=f"{path}.ffn.hidden_size", others={degree_path: degree},
                message=f"`ffn.hidden_size` ({width}) is not divisible by `{degree_path}` ({degree})",
                label=f"{width} inner channels cannot be split over {degree} ranks",
                help=f"use hidden_size: {_nearest_multiple(width, degree)}, "
                f"or tensor: {_nearest_degree(width, degree)}",
            )  # fmt: skip


def _heads_divide_hidden_size(spec: Spec) -> Iterator[Finding]:
    hidden = spec.model.hidden_size
    for path, layer in _layers(spec):
        heads = layer.attention.heads
        if layer.attention.head_dim is None and hidden % heads:
            legal = [count for count in _divisors(hidden) if hidden // count % 2 == 0] or [1]
            yield Finding(
                code="SPEC024", path=f"{path}.attention.heads", others={"model.hidden_size": hidden},
                message=f"`hidden_size` ({hidden}) is not divisible by `heads` ({heads})",
                label=f"{hidden} / {heads} is no whole head_dim, and none is given",
                help=f"use heads: {_nearest(heads, legal)}, or give head_dim",
            )  # fmt: skip


def _head_dim_is_even(spec: Spec) -> Iterator[Finding]:
    hidden = spec.model.hidden_size
    for path, layer in _layers(spec):
        attention = layer.attention
        if attention.position.kind != "rope" or (attention.head_dim is None and hidden % attention.heads):
            continue
        head_dim = spec.model.head_dim(attention)
        if head_dim % 2:
            given = attention.head_dim is not None
            yield Finding(
                code="SPEC025", path=f"{path}.attention.{'head_dim' if given else 'heads'}",
                others={} if given else {"model.hidden_size": hidden},
                message=f"`head_dim` ({head_dim}) is odd",
                label=f"rope rotates pairs of channels, {head_dim} has one left over",
                help=f"use head_dim: {head_dim + 1}",
            )  # fmt: skip


def _supported_tensor_degree(spec: Spec) -> Iterator[Finding]:
    for path, degree in _tensor_degrees(spec):
        if degree not in TENSOR_DEGREES:
            verb = "builds for" if path.startswith("build") else "trains on"
            legal = ", ".join(map(str, TENSOR_DEGREES))
            yield Finding(
                code="SPEC026", path=path, message=f"`{path}` ({degree}) is not supported",
                label=f"this version {verb} tensor degrees {legal}",
                help=f"use tensor: {_nearest(degree, TENSOR_DEGREES)}",
            )  # fmt: skip


def _supported_axes(spec: Spec) -> Iterator[Finding]:
    training, inference = spec.parallel, spec.build.parallel
    degrees = {
        "parallel.pipeline": training.pipeline,
        "parallel.context": training.context,
        "parallel.expert": training.expert,
        "parallel.data_shard": 1 if training.data_shard == "auto" else training.data_shard,
        "parallel.data_replicate": training.data_replicate,
        "build.parallel.pipeline": inference.pipeline,
        "build.parallel.expert": inference.expert,
    }
    for path, degree in degrees.items():
        if degree != 1:
            axis = path.rpartition(".")[2]
            legal = "auto" if axis == "data_shard" else "1"
            yield Finding(
                code="SPEC027", path=path, message=f"`{path}` ({degree}) is not supported",
                label="of the mesh axes, this version supports `tensor` only", help=f"use {axis}: {legal}",
            )  # fmt: skip
    if training.sequence:
        yield Finding(
            code="SPEC027", path="parallel.sequence", message="`parallel.sequence` is not supported",
            label="this version has no sequence parallelism", help="use sequence: false",
        )  # fmt: skip


def _sequence_fits_positions(spec: Spec) -> Iterator[Finding]:
    limit = spec.model.max_positions
    if spec.train and spec.train.sequence_length > limit:
        length = spec.train.sequence_length
        yield Finding(
            code="SPEC030", path="train.sequence_length", others={_MAX_POSITIONS: limit},
            message=f"`sequence_length` ({length}) is longer than `{_MAX_POSITIONS}` ({limit})",
            label=f"the model accepts {limit} positions",
            help=f"use sequence_length: {limit}, or raise {_MAX_POSITIONS}",
        )  # fmt: skip


def _micro_batches_divide_batch(spec: Spec) -> Iterator[Finding]:
    train = spec.train
    if train and train.batch_size % train.micro_batches:
        size, pieces = train.batch_size, train.micro_batches
        yield Finding(
            code="SPEC031", path="train.batch_size", others={"train.micro_batches": pieces},
            message=f"`batch_size` ({size}) is not divisible by `micro_batches` ({pieces})",
            label=f"{size} sequences cannot be cut into {pieces} equal pieces",
            help=f"use batch_size: {_nearest_multiple(size, pieces)}, "
            f"or micro_batches: {_nearest(pieces, _divisors(size))}",
        )  # fmt: skip


def _warmup_fits_steps(spec: Spec) -> Iterator[Finding]:
    train = spec.train
    warmup = train.schedule.warmup_steps if train else None
    if train and warmup is not None and warmup > train.steps:
        yield Finding(
            code="SPEC032", path="train.schedule.warmup_steps", others={"train.steps": train.steps},
            message=f"`warmup_steps` ({warmup}) is more than `steps` ({train.steps})",
            label="training would end before the learning rate is reached",
            help=f"use warmup_steps: {max(1, train.steps // 50)}, or raise steps",
        )  # fmt: skip


def _tokens_fit_vocabulary(spec: Spec) -> Iterator[Finding]:
    rows = spec.model.vocab_size
    tokens = spec.tokenizer.vocab_size if isinstance(spec.tokenizer, SentencePieceTokenizer) else None
    if tokens and tokens > rows:
        yield Finding(
            code="SPEC033", path="tokenizer.vocab_size", others={"model.vocab_size": rows},
            message=f"`tokenizer.vocab_size` ({tokens}) is more than `model.vocab_size` ({rows})",
            label=f"the model has rows for {rows} tokens",
            help=f"use vocab_size: {rows} here, or raise model.vocab_size",
        )  # fmt: skip


def _cache_fits_positions(spec: Spec) -> Iterator[Finding]:
    limit, length = spec.model.max_positions, spec.build.max_positions
    if length and length > limit:
        yield Finding(
            code="SPEC034", path="build.max_positions", others={_MAX_POSITIONS: limit},
            message=f"`build.max_positions` ({length}) is more than `{_MAX_POSITIONS}` ({limit})",
            label=f"the model accepts {limit} positions",
            help=f"use max_positions: {limit} here, or raise {_MAX_POSITIONS}",
        )  # fmt: skip


def _ranges(spec: Spec) -> Iterator[tuple[str, Range]]:
    for index, profile in enumerate(spec.build.profiles):
        for name in ("batch", "sequence", "positions"):
            yield f"build.profiles[{index}].{name}", getattr(profile, name)


def _ranges_are_ordered(spec: Spec) -> Iterator[Finding]:
    for path, sizes in _ranges(spec):
        if not sizes.min <= sizes.opt <= sizes.max:
            low, middle, high = sorted((sizes.min, sizes.opt, sizes.max))
            yield Finding(
                code="SPEC035", path=f"{path}.opt",
                message=f"`{path}`: min ({sizes.min}), opt ({sizes.opt}) and max ({sizes.max}) are not in order",
                label="min <= opt <= max is required", help=f"use {{min: {low}, opt: {middle}, max: {high}}}",
            )  # fmt: skip


def _ranges_fit_limits(spec: Spec) -> Iterator[Finding]:
    build = spec.build
    batch = ("build.max_batch", build.max_batch)
    positions = ("build.max_positions", build.max_positions or 0)
    if not build.max_positions:
        positions = (_MAX_POSITIONS, spec.model.max_positions)
    for path, sizes in _ranges(spec):
        limit_path, limit = batch if path.endswith("batch") else positions
        if sizes.max > limit:
            yield Finding(
                code="SPEC036", path=f"{path}.max", others={limit_path: limit},
                message=f"`{path}.max` ({sizes.max}) is more than `{limit_path}` ({limit})",
                label=f"the cache is made for {limit}", help=f"use max: {limit}, or raise {limit_path}",
            )  # fmt: skip


def _rope_scaling_is_sane(spec: Spec) -> Iterator[Finding]:
    for layer_path, layer in _layers(spec):
        position = layer.attention.position
        if position.kind == "rope" and position.scaling is not None:
            yield from _scaling_is_sane(f"{layer_path}.attention.position.scaling", position.scaling)


def _scaling_is_sane(path: str, scaling: Llama3Scaling) -> Iterator[Finding]:
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if low >= high:
        yield Finding(
            code="SPEC037", path=f"{path}.low_frequency_factor", others={f"{path}.high_frequency_factor": high},
            message=f"`low_frequency_factor` ({low:g}) is not below `high_frequency_factor` ({high:g})",
            label="the ramp between kept and divided wavelengths would be empty or turned round",
            help="Llama 3.1 uses low_frequency_factor: 1 and high_frequency_factor: 4",
        )  # fmt: skip
    if scaling.factor < 1:
        yield Finding(
            code="SPEC037", path=f"{path}.factor", message=f"`factor` ({scaling.factor:g}) is less than 1",
            label="scaling stretches positions, it does not shrink them", help="use factor: 1 or more",
        )  # fmt: skip


RULES: tuple[Callable[[Spec], Iterator[Finding]], ...] = (
    _stack_is_written_once,
    _kv_heads_divide_heads,
    _tensor_splits_heads,
    _tensor_splits_kv_heads,
    _tensor_splits_ffn,
    _heads_divide_hidden_size,
    _head_dim_is_even,
    _supported_tensor_degree,
    _supported_axes,
    _sequence_fits_positions,
    _micro_batches_divide_batch,
    _warmup_fits_steps,
    _tokens_fit_vocabulary,
    _cache_fits_positions,
    _ranges_are_ordered,
    _ranges_fit_limits,
    _rope_scaling_is_sane,
)


def _tensor_degrees(spec: Spec) -> tuple[tuple[str, int], ...]:
    return ("parallel.tensor", spec.parallel.tensor), ("build.parallel.tensor", spec.build.parallel.tensor)


def _divisors(number: int) -> list[int]:
    """All of them for the sizes that models have; past a million only the powers of two."""
    if number > 1_000_000:
        return [1 << shift for shift in range(number.bit_length()) if number % (1 << shift) == 0]
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(value: int, legal: Iterable[int]) -> int:
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def _nearest_multiple(value: int, factor: int) -> int:
    return max(factor, (value + factor // 2) // factor * factor)


def _nearest_degree(size: int, degree: int) -> int:
    return _nearest(degree, [candidate for candidate in TENSOR_DEGREES if size % candidate == 0])
