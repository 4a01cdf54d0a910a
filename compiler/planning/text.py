"""A plan for people: sentences, and bars where numbers are compared."""

from archwright.compiler.planning.inference import Inference
from archwright.compiler.planning.memory import TrainingMemory, parts, total_bytes
from archwright.compiler.planning.report import CONVENTION, PlanReport
from archwright.compiler.planning.training import Estimate

_BAR = 40
"""Columns of a full memory."""


def as_text(report: PlanReport) -> str:
    """The report, the memory of the fullest rank drawn as bars."""
    flops = report.flops
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in report.degrees.items() if degree > 1) or "one GPU"
    replicas = f", {report.replicas} replicas" if report.replicas > 1 else ""
    lines = [
        f"{report.name}: {report.kind}, {mesh}{replicas}",
        "",
        f"  parameters      {report.num_params:,}; {report.num_params_per_rank:,} on {_each(report)} rank",
        f"  FLOPs per token {flops.training:.4g} to train at {flops.sequence} tokens ({flops.training_causal:.4g} "
        f"causal), {flops.forward:.4g} forward ({flops.forward_causal:.4g} causal)",
        f"  KV cache        {report.kv_bytes_per_token:,} bytes per token ({report.kv_precision})",
        "",
        *_memory(report),
    ]
    if report.cluster is not None:
        times = _training(report, report.training) if report.training else _inference(report)
        lines += ["", *times, *_verdict(report)]
    return "\n".join([*lines, *(f"  note            {note}" for note in report.notes)])


def _each(report: PlanReport) -> str:
    return "the largest" if len(report.kinds) > 1 else "each"


def _memory(report: PlanReport) -> list[str]:
    fullest = max(report.memory, key=total_bytes)
    capacity = report.cluster.capacity_bytes if report.cluster else 0
    full = max(total_bytes(fullest), capacity)
    count = len(report.memory)
    alike = len(report.kinds) == 1
    which = f"each of {count} rank{'s' if count > 1 else ''}" if alike else f"the fullest of {count} ranks"
    moment = f", at its fullest: {_MOMENTS[fullest.moment]}" if isinstance(fullest, TrainingMemory) else ""
    lines = [f"  memory of {which}{moment}"]
    sizes = {name.removesuffix("_bytes").replace("_", " "): size for name, size in parts(fullest).items() if size}
    lines += [_bar(name, size, full) for name, size in sizes.items()]
    lines.append(_bar("total", total_bytes(fullest), full))
    if report.cluster is not None:
        lines.append(_bar(report.cluster.name, capacity, full))
    if not alike:
        lines += ["", "  memory of each pipeline rank"]
        lines += [_bar(f"pipeline {i}", total_bytes(each), full) for i, each in enumerate(report.kinds)]
    return lines


_MOMENTS = {
    "loss": "in the loss of the last micro-batch",
    "backward": "as the backward begins",
    "first layer": "in the last backward of the first layer",
    "end": "as the last backward ends",
}


def _training(report: PlanReport, estimate: Estimate) -> list[str]:
    time = estimate.time
    assert time is not None and report.step_s is not None and report.bound_s is not None
    flops = report.flops
    full, causal = (report.mfu(each) or 0 for each in (flops.training, flops.training_causal))
    lines = [
        f"  step            {report.step_s:.3g} s expected ({report.step}), at least {report.bound_s:.3g} s "
        "(roofline of published peaks)",
        f"  throughput      {report.tokens_per_step / report.step_s:,.0f} tokens/s, "
        f"{report.tokens_per_step / report.step_s / report.world:,.0f} on each GPU",
        f"  expected MFU    {full:.1%} full, {causal:.1%} causal",
        f"                  {CONVENTION}",
    ]
    if estimate.degrees.pipeline > 1:
        lines.append(f"  bubble          {time.bubble:.1%} of the pipeline's {time.pipeline_s:.3g} s")
    if report.exchanges():
        lines += ["", f"  {'communication':<18}{'degree':>7}{'sent/step':>14}{'alone':>11}{'exposed':>11}"]
    for axis, each in report.exchanges().items():
        row = f"    {axis:<16}{report.degrees[axis]:>7}{each.bytes / 1e9:>11.3f} GB"
        row += f"{each.total_s:>9.3f} s{each.exposed_s:>9.3f} s"
        lines.append(f"{row}  {'█' * round(_BAR * each.exposed_s / report.step_s)}".rstrip())
    return lines


def _inference(report: PlanReport) -> list[str]:
    found = report.inference
    assert found is not None and found.decode_s and found.prefill_s and found.largest_batch is not None
    assert found.decode_bound_s is not None and found.prefill_bound_s is not None
    positions = max(found.largest_batch)
    lines = [
        f"  decode          {found.decode_s:.3g} s expected ({report.step}), at least {found.decode_bound_s:.3g} s "
        "(roofline of published peaks)",
        f"  prefill         {found.prefill_s:.3g} s expected (one row of {positions} tokens), "
        f"at least {found.prefill_bound_s:.3g} s",
        *_stages(found),
        "",
        "  rows that fit beside the weights",
    ]
    most = max([1, *found.largest_batch.values()])
    for length, batch in found.largest_batch.items():
        lines.append(f"    {length:>9} tokens{batch:>10}  {'█' * round(_BAR * batch / most)}".rstrip())
    return lines


def _stages(found: Inference) -> list[str]:
    if len(found.stages) == 1:
        return []
    times = ", ".join(f"{stage.decode_s:.3g}" for stage in found.stages)
    return [
        f"  stages          {times} s of a decode step, one behind the other: a token passes all of them",
        f"  hand-off        {found.decode_hand_off_bytes:,} bytes a decode step, {found.prefill_hand_off_bytes:,} for "
        "the prefill, between two stages",
    ]


def _verdict(report: PlanReport) -> list[str]:
    assert report.cluster is not None
    total, capacity = max(total_bytes(memory) for memory in report.memory), report.cluster.capacity_bytes
    lines = ["", f"  fits            {'yes' if report.fits else 'no'}: {total / 1e9:.1f} of {capacity / 1e9:.1f} GB"]
    if report.fits or report.training is None:
        return lines
    change = report.change
    if change is None:
        return [*lines, "  change          none that was tried makes it fit"]
    return [
        *lines,
        f"  change          {change.command}",
        f"                  then {change.total_bytes / 1e9:.1f} GB and {change.step_s:.3g} s a step: the cheapest "
        "that was tried",
    ]


def _bar(name: str, size_bytes: int, full_bytes: int) -> str:
    return f"    {name:<22}{size_bytes / 1e9:10.3f} GB  {'█' * round(_BAR * size_bytes / full_bytes)}".rstrip()
