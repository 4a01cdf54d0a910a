"""How TensorRT is told to build: profiles, limits, flags, the GPUs to build for, timings of earlier builds."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from archwright.compiler.targets.gpus import Gpu, visible_gpus
from archwright.compiler.targets.tensorrt_loader import tensorrt_flavor, tensorrt_title
from archwright.compiler.targets.tensorrt_progress import BuildLog
from archwright.spec import ArchwrightError
from archwright.spec.files import atomic_write
from archwright.spec.models import Build, Profile
from archwright.spec.models.deployment import Engine, Range

PREFILL_TOKENS = 2048
"""Longest piece of a prompt in one step of the default profiles. The memory of a context grows with it (the logits of
every position are an output); longer prompts run in pieces, which the cache makes exact."""

PORTABLE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Where an engine of TensorRT for RTX runs that names no compute capability (its documentation, version 1.7)."""
CALL_BYTES = 1 << 30
"""Most that a prefill step may copy of experts' weights."""


def default_profiles(build: Build, capacity: int, *, token_bytes: int = 0) -> tuple[Profile, ...]:
    """The spec's profiles, or one for prefill and one for decode from its limits.

    Two, since one profile over both gives poor kernels for single tokens. token_bytes: what a rank's graph copies of
    experts' weights for each token, see `stages.gathered_values`: the pieces of a prefill are shorter then.
    """
    if build.profiles:
        return build.profiles
    piece = min(PREFILL_TOKENS, capacity)
    if token_bytes:
        piece = min(piece, max(1, CALL_BYTES // (build.max_batch * token_bytes)))
    positions = Range(min=1, opt=max(1, capacity // 2), max=capacity)
    prefill = Profile(
        batch=Range(min=1, opt=1, max=build.max_batch),
        sequence=Range(min=1, opt=max(1, piece // 4), max=piece),
        positions=positions,
    )
    decode = Profile(
        batch=Range(min=1, opt=build.max_batch, max=build.max_batch),
        sequence=Range(min=1, opt=1, max=1),
        positions=positions,
    )
    return prefill, decode


@dataclass(frozen=True, kw_only=True)
class BuiltFor:
    """Where an engine runs. gpu: the one that it was built on, None where none was needed.

    capabilities: compute capabilities (`8.9`), none where only the GPU's own name says enough.
    """

    capabilities: tuple[str, ...]
    gpu: Gpu | None


def built_for(trt: ModuleType, engine: Engine) -> BuiltFor:
    """Raises ArchwrightError BUILD034 where the spec wants engines for GPUs that this library cannot promise."""
    if tensorrt_flavor(trt) == "tensorrt_rtx":
        if engine.hardware_compatibility != "none":
            raise ArchwrightError(
                "BUILD034",
                f"{tensorrt_title(trt)} does not know `build.engine.hardware_compatibility`",
                help="leave it out: its engines run on every GPU of their compute capabilities",
            )
        named = tuple(f"{capability:.1f}" for capability in engine.compute_capabilities)
        return BuiltFor(capabilities=named or PORTABLE_CAPABILITIES, gpu=None)
    gpu = next(iter(visible_gpus()), None)
    capability = gpu.capability if gpu else "unknown"
    if any(f"{named:.1f}" != capability for named in engine.compute_capabilities):
        raise ArchwrightError(
            "BUILD034",
            f"{tensorrt_title(trt)} builds for the GPU that it runs on ({gpu or 'none is here'}), and "
            "`build.engine.compute_capabilities` names others",
            help="leave compute_capabilities out, or build with TensorRT for RTX (archwright[tensorrt-rtx])",
        )
    return BuiltFor(capabilities=(capability,) if gpu else (), gpu=gpu)


def flags_of(trt: ModuleType, engine: Engine) -> tuple[str, ...]:
    """The builder flags of the spec, and those that a library needs, by TensorRT's names."""
    compatible = ("VERSION_COMPATIBLE",) if engine.version_compatible else ()
    if tensorrt_flavor(trt) == "tensorrt":
        return compatible
    # TensorRT for RTX has no lean runtime that it could put into the engine, and without memory from outside the steps
    # of its engines cannot be captured as CUDA graphs.
    return (*compatible, *(("EXCLUDE_LEAN_RUNTIME",) if compatible else ()), "REQUIRE_USER_ALLOCATION")


class TimingCache:
    """Kernel timings in one file, read once, given to every build and written after each.

    Ranks that have the same structure find each other's timings in it. Without a GPU nothing is timed, and TensorRT for
    RTX never times: then the log says that the file is not used.
    """

    def __init__(self, trt: ModuleType, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._times = tensorrt_flavor(trt) == "tensorrt"
        self._title = tensorrt_title(trt)
        self._content = b""
        if self._path is not None and self._times:
            with suppress(FileNotFoundError):
                self._content = self._path.read_bytes()

    def attach(self, config: Any, log: BuildLog) -> None:
        if self._path is None:
            return
        if not self._times:
            log.add("warning", f"{self._title} times no kernels: build.engine.timing_cache is not used")
            return
        cache = config.create_timing_cache(self._content)
        if cache is None or not config.set_timing_cache(cache, False):
            log.add("warning", f"the timings in {self._path.name} are another GPU's or version's: they begin anew")
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep(self, config: Any) -> None:
        """Write what is known now. A build that fails leaves the file as it was."""
        if self._path is not None and self._times and (cache := config.get_timing_cache()) is not None:
            self._content = bytes(cache.serialize())
            atomic_write(self._path, self._content)


def configure(trt: ModuleType, builder: Any, network: Any, profiles: Sequence[Profile], engine: Engine) -> Any:
    """TensorRT's configuration of a build, but for the timing cache and the monitor."""
    config = builder.create_builder_config()
    config.builder_optimization_level = engine.optimization_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(engine.workspace_gib * (1 << 30)))
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the spec means float32
    for flag in flags_of(trt, engine):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if tensorrt_flavor(trt) == "tensorrt":
        level = engine.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    elif engine.compute_capabilities:
        config.num_compute_capabilities = len(engine.compute_capabilities)
        for index, capability in enumerate(engine.compute_capabilities):
            known = getattr(trt.ComputeCapability, "SM" + f"{capability:.1f}".replace(".", ""))
            assert config.set_compute_capability(known, index), "the library accepts what `spec` knows"
    for profile in profiles:
        config.add_optimization_profile(_limits(builder, network, profile))
    return config


def _limits(builder: Any, network: Any, profile: Profile) -> Any:
    limits = builder.create_optimization_profile()
    ranges: Mapping[str, Range] = {
        "batch": profile.batch,
        "sequence": profile.sequence,
        "positions": profile.positions,
    }
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [ranges.get(tensor.get_dimension_name(dim), size) for dim, size in enumerate(tensor.shape)]
        shapes = [
            [getattr(size, bound) if isinstance(size, Range) else size for size in sizes]
            for bound in ("min", "opt", "max")
        ]
        limits.set_shape(tensor.name, *shapes)
    return limits
