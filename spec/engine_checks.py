"""Rules of `build.engine`."""

from collections.abc import Callable, Iterator

from archwright.spec.findings import Finding
from archwright.spec.models import Spec

COMPUTE_CAPABILITIES = (7.5, 8.0, 8.6, 8.9, 12.0, 12.1)
"""Those that TensorRT for RTX builds for."""


def _capabilities_are_served(spec: Spec) -> Iterator[Finding]:
    for index, found in enumerate(spec.build.engine.compute_capabilities):
        if found not in COMPUTE_CAPABILITIES:
            near = min(COMPUTE_CAPABILITIES, key=lambda known: abs(known - found))
            yield Finding(
                code="SPEC055", path=f"build.engine.compute_capabilities[{index}]",
                message=f"TensorRT for RTX does not build for compute capability {found:.1f}",
                label=f"it builds for {', '.join(f'{known:.1f}' for known in COMPUTE_CAPABILITIES)}",
                help=f"use {near:.1f}" + ("; for H100 and H200, full TensorRT builds on the GPU itself" * (found == 9)),
            )  # fmt: skip


def _capabilities_differ(spec: Spec) -> Iterator[Finding]:
    given = spec.build.engine.compute_capabilities
    for index, found in enumerate(given):
        if found in given[:index]:
            yield Finding(
                code="SPEC056", path=f"build.engine.compute_capabilities[{index}]",
                message=f"compute capability {found:.1f} is given twice",
                label="an engine is built for each once", help="remove it",
            )  # fmt: skip


ENGINE_RULES: tuple[Callable[[Spec], Iterator[Finding]], ...] = (_capabilities_are_served, _capabilities_differ)
