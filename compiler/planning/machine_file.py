"""`--machines FILE.yaml`: GPUs that the table does not have, and other values of its constants.

Of the form

    gpus:
      H100-PCIe:
        memory_gib: 79.6
        bandwidth_tb_per_s: 2.0
        tflops: {half: 756, single: 51, double: 26}
        link_gb_per_s: 64        # one way, to the other GPUs of the node
        node_size: 8
        network_gbit_per_s: 200  # of each GPU
    constants: {matmul_fraction: 0.72}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from archwright.compiler.planning.constants import DEFAULTS, Constants
from archwright.compiler.planning.machines import GPUS, Gpu, make_gpu
from archwright.spec.diagnostics import span_of
from archwright.spec.errors import SpecError
from archwright.spec.models import Node
from archwright.spec.source import MapNode, fault, parse, plain, read_source
from archwright.spec.structure import dotted, suggest

_HELP = "see `gpus` and `constants` in docs/errors.md, PLAN003"
Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]
Value = Annotated[float, Field(ge=1e-12, le=1e15)]
"""Of a constant. Within these limits neither times nor bytes leave the numbers that a computer has."""


class Rates(Node):
    """Dense TFLOP/s."""

    half: Rate
    single: Rate
    double: Rate = 1.0


class GpuFile(Node):
    """A GPU as its data sheet has it."""

    memory_gib: Rate
    bandwidth_tb_per_s: Rate
    tflops: Rates
    link_gb_per_s: Rate
    node_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    network_gbit_per_s: Rate = 100.0


class MachineFile(Node):
    """The whole file."""

    gpus: dict[Name, GpuFile] = Field(default_factory=dict)
    constants: dict[str, Value] = Field(default_factory=dict)


def read_machines(path: Path | None) -> tuple[Mapping[str, Gpu], Constants]:
    """(every GPU, every constant), those of a file over those of the tables.

    Raises SpecError with every fault of the file: PLAN003, or SPEC001 to SPEC004 for what is no YAML.
    """
    if path is None:
        return GPUS, DEFAULTS
    source = read_source(path, str(path))
    tree, faults = parse(source)
    if faults or not isinstance(tree, MapNode):
        raise SpecError(faults or [fault(tree.span, "PLAN003", "a machine file is a mapping", help=_HELP)])
    try:
        content = MachineFile.model_validate(plain(tree))
    except ValidationError as error:
        places = {tuple(part for part in each["loc"] if part != "[key]"): each["msg"] for each in error.errors()}
        faults = [
            fault(span_of(tree, place), "PLAN003", f"`{dotted(place)}`: {message}", help=_HELP)
            for place, message in places.items()
        ]
        raise SpecError(faults) from None
    unknown = [name for name in content.constants if name not in DEFAULTS]
    if unknown:
        raise SpecError(
            [
                fault(span_of(tree, ("constants", name)), "PLAN003", f"there is no constant `{name}`",
                      help=suggest(name, DEFAULTS, list_as="the constants are"))
                for name in unknown
            ]
        )  # fmt: skip
    return {**GPUS, **{name: _gpu(each) for name, each in content.gpus.items()}}, {**DEFAULTS, **content.constants}


def _gpu(given: GpuFile) -> Gpu:
    rates = given.tflops
    return make_gpu(
        given.memory_gib * 1024, given.bandwidth_tb_per_s, (rates.half, rates.single, rates.double),
        given.link_gb_per_s, given.node_size, given.network_gbit_per_s,
    )  # fmt: skip
