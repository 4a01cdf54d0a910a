"""In which operators graphs are written: a dialect is a few lowerings of its own over the same forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from archwright.compiler.blocks import FusedAttention, GroupedQueryAttention
from archwright.compiler.interpreters.onnx_dialects import onnxruntime_dialect, tensorrt_dialect
from archwright.compiler.interpreters.onnx_dialects.onnxruntime_dialect import OnnxruntimeOps
from archwright.compiler.interpreters.onnx_dialects.tensorrt_dialect import TensorrtOps
from archwright.compiler.interpreters.onnx_ops import DOMAIN, OnnxOps
from archwright.compiler.ir import Mask, Program
from archwright.compiler.passes.fuse import Fusion
from archwright.spec.models import Build

Refusal = Callable[[Mask, int, str], str | None]
"""(mask, head_dim, precision) → why the dialect says such a layer in the portable form, None where it does not."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    """pays: the fusions of `build.fuse: auto`; pays_int4: where matrices are of 4 bits.

    On ONNX Runtime's CPU kernels none pays: at 512 x 8 and 256 x 8 they are within the noise, which the same harness
    shows for equal graphs (benchmarks/results/2026-11-25-dialects-*.json), int4 on one thread among them. On two
    threads, which meet behind each product, an 88M model of int4 decoded 1.6% faster with joined matrices
    (2026-11-25-exporters-onnxruntime-int4.json). Under `tensorrt` the folded scale takes away a product in each layer,
    and costs nothing.
    """

    ops: type[OnnxOps]
    domains: frozenset[str]
    refusal: Refusal
    pays: tuple[Fusion, ...]
    pays_int4: tuple[Fusion, ...]


_TARGETS: Mapping[str, _Target] = MappingProxyType(
    {
        "portable": _Target(ops=OnnxOps, domains=frozenset({DOMAIN}), refusal=lambda *_: None, pays=(), pays_int4=()),
        "tensorrt": _Target(
            ops=TensorrtOps,
            domains=frozenset({DOMAIN}),
            refusal=tensorrt_dialect.refusal,
            pays=("scale",),
            pays_int4=("scale",),
        ),
        "onnxruntime": _Target(
            ops=OnnxruntimeOps,
            domains=frozenset({DOMAIN, onnxruntime_dialect.MICROSOFT}),
            refusal=onnxruntime_dialect.refusal,
            pays=(),
            pays_int4=("qkv", "gate_up"),
        ),
    }
)
ALL: tuple[Fusion, ...] = ("scale", "qkv", "gate_up")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How graphs are written. fusions: made of the Program first, in this order."""

    target: str = "portable"
    fusions: tuple[Fusion, ...] = ()

    @property
    def ops(self) -> type[OnnxOps]:
        return _TARGETS[self.target].ops

    @property
    def domains(self) -> frozenset[str]:
        """Of operators that its graphs may have, beside ONNX's own."""
        return _TARGETS[self.target].domains

    def portable_layers(self, program: Program, precision: str) -> dict[str, str]:
        """Path of each attention that the dialect's own operators cannot say → why; it has the portable form."""
        refusal = _TARGETS[self.target].refusal
        found = {
            path: refusal(block.mask, block.head_dim, precision)
            for path, block in program.blocks()
            if isinstance(block, GroupedQueryAttention | FusedAttention)
        }
        return {path: reason for path, reason in found.items() if reason is not None}


PORTABLE = Dialect()


def dialect_of(build: Build) -> Dialect:
    """What a spec's `build` section says. The scale is folded where no product of it rounds: not in float16."""
    target = _TARGETS[build.target]
    int4 = build.quantize is not None and any(rule.kind == "int4" for rule in build.quantize.rules)
    chosen = {"none": (), "all": ALL, "auto": target.pays_int4 if int4 else target.pays}[build.fuse]
    exact = build.precision != "float16"
    return Dialect(target=build.target, fusions=tuple(fusion for fusion in chosen if exact or fusion != "scale"))
