"""Rules of mixture-of-experts layers."""

from collections.abc import Callable, Iterator

from archwright.spec.findings import Finding, channels_cut, divisors, layers, nearest, tensor_degrees
from archwright.spec.models import MoeFfn, Spec


def _moe_layers(spec: Spec) -> Iterator[tuple[str, MoeFfn]]:
    """The mixtures of experts that the spec spells out, with their paths."""
    return ((f"{path}.ffn", layer.ffn) for path, layer in layers(spec) if isinstance(layer.ffn, MoeFfn))


def _experts_per_token_exist(spec: Spec) -> Iterator[Finding]:
    for path, ffn in _moe_layers(spec):
        if ffn.experts_per_token > ffn.experts:
            yield Finding(
                code="SPEC046", path=f"{path}.experts_per_token", others={f"{path}.experts": ffn.experts},
                message=f"`experts_per_token` ({ffn.experts_per_token}) is more than `experts` ({ffn.experts})",
                label=f"a token cannot go through {ffn.experts_per_token} of {ffn.experts} experts",
                help=f"use experts_per_token: {ffn.experts}, or raise experts",
            )  # fmt: skip


def _expert_degrees(spec: Spec) -> dict[str, int | str]:
    return {"parallel.expert": spec.parallel.expert, "build.parallel.expert": spec.build.parallel.expert}


def _expert_needs_moe(spec: Spec) -> Iterator[Finding]:
    for degree_path, degree in _expert_degrees(spec).items():
        if degree != 1 and not any(_moe_layers(spec)):
            other = "tensor" if degree_path.startswith("build.") else "data_shard"
            yield Finding(
                code="SPEC047", path=degree_path,
                message=f"`{degree_path}` is {degree}, and no layer has experts",
                label="it spreads the experts of `ffn: {kind: moe}` over ranks",
                help=f"use expert: 1; {other} spreads everything else",
            )  # fmt: skip


def _expert_splits_experts(spec: Spec) -> Iterator[Finding]:
    for path, ffn in _moe_layers(spec):
        for degree_path, degree in _expert_degrees(spec).items():
            if isinstance(degree, int) and ffn.experts % degree:
                yield Finding(
                    code="SPEC048", path=f"{path}.experts", others={degree_path: degree},
                    message=f"`experts` ({ffn.experts}) is not divisible by `{degree_path}` ({degree})",
                    label=f"{ffn.experts} experts cannot be spread evenly over {degree} ranks",
                    help=f"use expert: {nearest(degree, divisors(ffn.experts))}, "
                    f"or set experts to a multiple of {degree}",
                )  # fmt: skip


def _tensor_splits_shared(spec: Spec) -> Iterator[Finding]:
    """SPEC023 for the shared expert; `ffn.hidden_size` is every kind's."""
    for path, ffn in _moe_layers(spec):
        if ffn.shared is None:
            continue
        for degree_path, degree in tensor_degrees(spec):
            width = ffn.shared.hidden_size
            yield from channels_cut(f"{path}.shared.hidden_size", "ffn.shared.hidden_size", width, degree_path, degree)


MOE_RULES: tuple[Callable[[Spec], Iterator[Finding]], ...] = (
    _experts_per_token_exist,
    _expert_needs_moe,
    _expert_splits_experts,
    _tensor_splits_shared,
)
