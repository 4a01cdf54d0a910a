"""Cross-field rules: each looks at a sound `Spec` and yields what breaks it, with the exact paths.

A rule is a generator of `Finding`s, listed in `RULES`; `check` places the findings in the text.
"""

from collections.abc import Callable, Iterator

from archwright.spec.diagnostics import span_of
from archwright.spec.engine_checks import ENGINE_RULES
from archwright.spec.errors import ArchwrightError, Diagnostic
from archwright.spec.findings import Finding, divisors, layers, nearest
from archwright.spec.mesh_checks import MESH_RULES
from archwright.spec.models import Llama3Scaling, Range, SentencePieceTokenizer, Spec
from archwright.spec.moe_checks import MOE_RULES
from archwright.spec.quantize_checks import QUANTIZE_RULES
from archwright.spec.source import MapNode, fault, find
from archwright.spec.structure import Path, parse_path

_MAX_POSITIONS = "model.max_positions"
MAX_LAYERS = 10_000


def check(spec: Spec, tree: MapNode, *, ignore: tuple[Path, ...] = ()) -> list[Diagnostic]:
    """Every broken rule, placed in the text. Findings that touch a path in `ignore` are left out."""

    def is_ignored(finding: Finding) -> bool:
        paths = [parse_path(path) for path in (finding.path, *finding.others)]
        return any(path[: len(bad)] == bad for path in paths for bad in ignore)

    findings = [finding for rule in RULES for finding in rule(spec)]
    return [_place(finding, tree) for finding in findings if not is_ignored(finding)]


def check_values(spec: Spec) -> None:
    """For a spec that was changed after it was loaded, as where `auto` has become a number.

    Raises ArchwrightError with the first broken rule.
    """
    for rule in RULES:
        for finding in rule(spec):
            raise ArchwrightError(finding.code, finding.message, where=finding.path, help=finding.help)


def _place(finding: Finding, tree: MapNode) -> Diagnostic:
    notes: list[str] = []
    for other, value in finding.others.items():
        node = find(tree, parse_path(other))
        notes.append(f"`{other}` is {value}, {f'set at {node.span}' if node else 'by default'}")
    return fault(
        span_of(tree, parse_path(finding.path)), finding.code, finding.message,
        path=finding.path, label=finding.label, help=finding.help, notes=tuple(notes),
    )  # fmt: skip


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


def _layers_are_a_stack(spec: Spec) -> Iterator[Finding]:
    if (layers := spec.model.num_layers) > MAX_LAYERS:
        yield Finding(
            code="SPEC014", path="model.layers", message=f"`layers` ({layers}) is more than {MAX_LAYERS}",
            label="every layer is looked at, one after the other", help=f"use at most {MAX_LAYERS} layers",
        )  # fmt: skip


def _kv_heads_divide_heads(spec: Spec) -> Iterator[Finding]:
    for path, layer in layers(spec):
        heads, kv_heads = layer.attention.heads, layer.attention.kv_heads
        if kv_heads and heads % kv_heads:
            yield Finding(
                code="SPEC020", path=f"{path}.attention.kv_heads", others={f"{path}.attention.heads": heads},
                message=f"`heads` ({heads}) is not divisible by `kv_heads` ({kv_heads})",
                label=f"{heads} query heads cannot share {kv_heads} key/value heads evenly",
                help=f"use kv_heads: {nearest(kv_heads, divisors(heads))}, or set heads to a multiple of {kv_heads}",
            )  # fmt: skip


def _heads_divide_hidden_size(spec: Spec) -> Iterator[Finding]:
    hidden = spec.model.hidden_size
    for path, layer in layers(spec):
        heads = layer.attention.heads
        if layer.attention.head_dim is None and hidden % heads:
            legal = [count for count in divisors(hidden) if hidden // count % 2 == 0] or [1]
            yield Finding(
                code="SPEC024", path=f"{path}.attention.heads", others={"model.hidden_size": hidden},
                message=f"`hidden_size` ({hidden}) is not divisible by `heads` ({heads})",
                label=f"{hidden} / {heads} is no whole head_dim, and none is given",
                help=f"use heads: {nearest(heads, legal)}, or give head_dim",
            )  # fmt: skip


def _head_dim_is_even(spec: Spec) -> Iterator[Finding]:
    hidden = spec.model.hidden_size
    for path, layer in layers(spec):
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
    for layer_path, layer in layers(spec):
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
    _layers_are_a_stack,
    _kv_heads_divide_heads,
    _heads_divide_hidden_size,
    _head_dim_is_even,
    _sequence_fits_positions,
    _warmup_fits_steps,
    _tokens_fit_vocabulary,
    _cache_fits_positions,
    _ranges_are_ordered,
    _ranges_fit_limits,
    _rope_scaling_is_sane,
    *MESH_RULES,
    *MOE_RULES,
    *ENGINE_RULES,
    *QUANTIZE_RULES,
)
