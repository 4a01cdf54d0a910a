"""`archwright doctor`: what this machine has, what it lacks, and what to type about it.

Every check is a function without arguments that gives findings. A finding is `ok`, `warning` (works, with a drawback),
`missing` (an optional part is absent) or `broken` (the base cannot work); only `broken` makes the verb exit with 1.
"""

import importlib
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from archwright.compiler.targets.gpus import visible_gpus
from archwright.compiler.targets.tensorrt_loader import load_tensorrt, tensorrt_flavor, tensorrt_title
from archwright.spec.cli import add_output_format, parser
from archwright.spec.errors import ArchwrightError

Status = Literal["ok", "warning", "missing", "broken"]

_GIB = 2**30
_LOW_MEMORY_BYTES = 4 * _GIB
_LOW_DISK_BYTES = 5 * _GIB
_IMPORT_NAMES = {"onnx-ir": "onnx_ir", "ruamel.yaml": "ruamel.yaml"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    found: str
    fix: str = ""


def version_key(version: str) -> tuple[int, ...]:
    """The release numbers of a version: `2.13.0+cpu` -> (2, 13, 0). Enough to compare with a lower bound."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def base_requirements(requirements: Sequence[str]) -> list[tuple[str, str]]:
    """(distribution, lowest version) of the requirements that belong to no extra."""
    found: list[tuple[str, str]] = []
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)\s*", requirement)
        if match:
            found.append((match[1], match[2]))
    return found


def check_python() -> list[Finding]:
    """Python itself; an older one cannot get this far, so it is never broken here."""
    found = f"{platform.python_version()} ({sys.executable})"
    return [Finding(name="python", status="ok", found=found)]


def check_machine() -> list[Finding]:
    """Operating system, cores, memory, free disk."""
    findings = [
        Finding(name="platform", status="ok", found=f"{platform.system()} {platform.release()} {platform.machine()}")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings.append(Finding(name="cores", status="ok", found=str(cores)))
    memory_bytes = free_memory_bytes()
    if memory_bytes is not None:
        findings.append(
            _amount("memory", memory_bytes, _LOW_MEMORY_BYTES, "close other programs, or train a smaller spec")
        )
    disk_bytes = shutil.disk_usage(Path.cwd()).free
    findings.append(_amount("disk", disk_bytes, _LOW_DISK_BYTES, f"make room on the disk of {Path.cwd()}"))
    return findings


def free_memory_bytes() -> int | None:
    """Memory that programs can still take; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _amount(name: str, free_bytes: int, low_bytes: int, fix: str) -> Finding:
    low = free_bytes < low_bytes
    found = f"{free_bytes / _GIB:.1f} GiB free"
    return Finding(name=name, status="warning" if low else "ok", found=found, fix=fix if low else "")


def check_base() -> list[Finding]:
    """Every distribution that Archwright's base requires: there, new enough, and importable."""
    findings: list[Finding] = []
    for name, lowest in base_requirements(metadata.requires("archwright") or []):
        findings.append(_check_distribution(name, lowest))
    return findings


def _check_distribution(name: str, lowest: str) -> Finding:
    fix = f'pip install "{name}>={lowest}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name=name, status="broken", found="not installed", fix=fix)
    if version_key(version) < version_key(lowest):
        return Finding(name=name, status="broken", found=f"{version}, older than {lowest}", fix=fix)
    try:
        importlib.import_module(_IMPORT_NAMES.get(name, name))
    except Exception as error:  # a compiled package can fail with any type, and doctor reports instead of failing
        return Finding(
            name=name, status="broken", found=f"{version} does not import: {error}", fix=f"{fix} --force-reinstall"
        )
    return Finding(name=name, status="ok", found=version)


def check_torch() -> list[Finding]:
    """The build of torch, its GPUs, and the process groups that training on several ranks needs."""
    try:
        import torch
        import torch.distributed as dist
    except Exception:  # check_base has said so, with the fix
        return []
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    findings = [Finding(name="torch build", status="ok", found=build)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / _GIB:.0f} GiB"
            found = f"{properties.name}, SM {properties.major}.{properties.minor}, {memory}"
            findings.append(Finding(name=f"gpu {index}", status="ok", found=found))
    else:
        fix = "" if torch.version.cuda else "with an NVIDIA GPU: install a CUDA build of torch (README, Set-up)"
        findings.append(
            Finding(name="gpu", status="missing", found="none that torch can use; everything runs on the CPU", fix=fix)
        )
    gloo = dist.is_available() and dist.is_gloo_available()
    findings.append(
        Finding(name="gloo", status="ok", found="process groups on the CPU work")
        if gloo
        else Finding(
            name="gloo",
            status="warning",
            found="this build of torch has none, so several CPU processes cannot train together",
            fix="install an official build of torch, or keep parallel degrees at 1 on the CPU",
        )
    )
    return findings


def check_compiler() -> list[Finding]:
    """A C++ compiler and Python's headers: torch.compile's CPU back end writes C++ and compiles it at run time."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    if compiler and headers:
        return [Finding(name="C++ compiler", status="ok", found=f"{compiler}; torch.compile can be on")]
    lacking = "no g++ or clang++" if not compiler else "no Python.h"
    return [
        Finding(
            name="C++ compiler",
            status="warning",
            found=f"{lacking}; torch.compile stays off on the CPU: the same numbers, slower",
            fix="install g++ and Python's headers (Debian: g++, python3-dev)",
        )
    ]


def check_onnxruntime() -> list[Finding]:
    """ONNX Runtime, and that only one of its two distributions is there."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if not installed:
        fix = 'pip install "archwright[cpu]" (or "archwright[gpu]")'
        return [Finding(name="onnxruntime", status="missing", found="`build` and `verify` need it", fix=fix)]
    if len(installed) == 2:
        found = "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files"
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then install one extra: cpu or gpu"
        return [Finding(name="onnxruntime", status="warning", found=found, fix=fix)]
    try:
        providers = importlib.import_module("onnxruntime").get_available_providers()
        problem = importlib.import_module("archwright.runtime.backends.onnxruntime_sessions").cuda_problem()
    except Exception as error:  # as in _check_distribution
        fix = f"pip install --force-reinstall {installed[0]}"
        return [Finding(name="onnxruntime", status="warning", found=f"does not import: {error}", fix=fix)]
    found = f"{installed[0]} {_version(installed[0])}: {', '.join(providers)}"
    findings = [Finding(name="onnxruntime", status="ok", found=found)]
    if installed == ["onnxruntime-gpu"]:
        found = f"cannot use a GPU: {problem}" if problem else "graphs run on the GPU"
        fix = "install the CUDA and cuDNN that this version wants, or a driver for them" if problem else ""
        findings.append(Finding(name="onnxruntime gpu", status="warning" if problem else "ok", found=found, fix=fix))
    return findings


def check_tensorrt() -> list[Finding]:
    """TensorRT of either kind, and on which of the GPUs that the driver shows its engines run."""
    try:
        module = load_tensorrt()
    except ArchwrightError as error:
        return [Finding(name="tensorrt", status="missing", found=f"{error.message}", fix=error.help or "")]
    title, gpus = tensorrt_title(module), visible_gpus()
    if tensorrt_flavor(module) == "tensorrt_rtx":
        if any(gpu.capability == "9.0" for gpu in gpus):
            fix = 'pip install "archwright[gpu]": the full TensorRT'
            return [Finding(name="tensorrt", status="warning", found=f"{title} does not serve SM 9.0", fix=fix)]
        if not gpus:
            found = f"{title}; builds engines, and no GPU is here to run them"
            return [Finding(name="tensorrt", status="ok", found=found)]
    elif not gpus:
        fix = 'run where the GPU is, or pip install "archwright[tensorrt-rtx]", which builds without one'
        return [Finding(name="tensorrt", status="warning", found=f"{title} needs a GPU, and none is here", fix=fix)]
    return [Finding(name="tensorrt", status="ok", found=f"{title}, for {', '.join(map(str, gpus))}")]


def check_transformers() -> list[Finding]:
    """`transformers` is used by tests and by those who load exported folders with it; Archwright runs without it."""
    version = _version("transformers")
    if version:
        return [Finding(name="transformers", status="ok", found=version)]
    fix = 'pip install "transformers>=5,<6"'
    return [Finding(name="transformers", status="missing", found="only comparisons with it need it", fix=fix)]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_python,
    check_machine,
    check_base,
    check_torch,
    check_compiler,
    check_onnxruntime,
    check_tensorrt,
    check_transformers,
)


def report_text(findings: Sequence[Finding]) -> str:
    """One line a finding, its fix on the next, and a verdict."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  fix: {finding.fix}")
    broken = [finding.name for finding in findings if finding.status == "broken"]
    lines.append(f"Archwright cannot work here: {', '.join(broken)}" if broken else "Archwright can work here.")
    return "\n".join(lines)


def report_json(findings: Sequence[Finding]) -> str:
    """`{"works": bool, "findings": [{name, status, found, fix}]}`."""
    works = all(finding.status != "broken" for finding in findings)
    return json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=2)


def doctor(argv: list[str]) -> int:
    """The verb. Exit status 1 when something that the base needs is absent or does not load."""
    doctor_parser = parser("doctor", "Say what this machine has, what it lacks and how to mend it.")
    add_output_format(doctor_parser, ("text", "json"))
    arguments = doctor_parser.parse_args(argv)
    findings = [finding for check in CHECKS for finding in check()]
    print(report_json(findings) if arguments.output_format == "json" else report_text(findings))
    return 1 if any(finding.status == "broken" for finding in findings) else 0
