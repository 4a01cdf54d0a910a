"""A plan as one HTML page that needs nothing else: no script runs, no font or file is fetched."""

import json
from html import escape

from archwright.compiler.planning.drawings import legend, memory_drawing, mesh_drawing, name_of, timeline_drawing
from archwright.compiler.planning.memory import parts, total_bytes
from archwright.compiler.planning.report import CONVENTION, PlanReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif } svg text { fill: #1c1c1c }
svg .limit { stroke: #b3261e; stroke-width: 1.5; stroke-dasharray: 5 3 }
table { border-collapse: collapse } td, th { padding: .15rem .7rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } th { font-weight: 600; border-bottom: 1px solid #bbb }
.key { display: inline-block; margin-right: 1rem }
.key i { display: inline-block; width: .8em; height: .8em;
       margin-right: .35em }
.no { color: #b3261e } .yes { color: #1b6e3c } code { background: #f2f2f2; padding: .1em .3em }
.wide { overflow-x: auto } th + th + th { font-size: .85rem } td + td + td { font-size: .9rem }
.small { color: #555; font-size: .85rem }
"""


def as_html(report: PlanReport) -> str:
    """Mesh, stacked memory, timeline and numbers; the JSON of the plan stands in the element `plan`."""
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in report.degrees.items() if degree > 1) or "one GPU"
    sections = [
        f"<h1>{escape(report.name)}</h1><p>{report.kind}, {escape(mesh)}{_machine(report)}</p>",
        _verdict(report),
        "<h2>Numbers</h2>" + _numbers(report),
        "<h2>Mesh</h2>" + mesh_drawing(report),
        f"<h2>Memory of a rank</h2><p>{legend(report)}</p>" + memory_drawing(report) + _memory_table(report),
    ]
    estimate = report.training
    if estimate is not None and estimate.time is not None:
        if report.exchanges():
            sections.append("<h2>Communication of a rank in a step</h2>" + _communication(report))
        if estimate.degrees.pipeline > 1:
            sections.append(
                f"<h2>Pipeline</h2><p>{estimate.time.bubble:.1%} of the time the busiest rank waits.</p>"
                + timeline_drawing(estimate.time.tasks, estimate.degrees.pipeline)
            )
    sections += [f"<p>{escape(note)}</p>" for note in report.notes]
    data = json.dumps(report.to_json()).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Plan of {escape(report.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>'
        + "\n".join(sections)
        + f'\n<script type="application/json" id="plan">{data}</script></body></html>\n'
    )


def _machine(report: PlanReport) -> str:
    return f", {report.cluster.count} {escape(report.cluster.name)}" if report.cluster else ""


def _verdict(report: PlanReport) -> str:
    if report.cluster is None:
        return ""
    total, capacity = max(map(total_bytes, report.memory)), report.cluster.capacity_bytes
    answer = "yes" if report.fits else "no"
    text = f'<p class="{answer}"><b>Fits: {answer}</b>, {total / 1e9:.1f} of {capacity / 1e9:.1f} GB.</p>'
    if report.change is not None:
        change = report.change
        text += (
            f"<p>The cheapest change that was tried: <code>{escape(change.command)}</code>, then "
            f"{change.total_bytes / 1e9:.1f} GB and {change.step_s:.3g} s a step.</p>"
        )
    return text


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    cells = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    header = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f'<div class="wide"><table>{header}{"".join(cells)}</table></div>'


def _numbers(report: PlanReport) -> str:
    flops, rows = report.flops, list[tuple[str, ...]]()
    rows.append(("parameters", f"{report.num_params:,}"))
    rows.append(("parameters on the largest rank", f"{report.num_params_per_rank:,}"))
    rows.append(("FLOPs per token, training", f"{flops.training:,} ({flops.training_causal:,} causal)"))
    rows.append(("KV cache per token", f"{report.kv_bytes_per_token:,} bytes ({report.kv_precision})"))
    if report.step_s is not None and report.bound_s is not None:
        rows.append((report.step, f"{report.step_s:.4g} s expected, at least {report.bound_s:.4g} s"))
    note, full, causal = "", report.mfu(flops.training), report.mfu(flops.training_causal)
    if full is not None and causal is not None and report.step_s is not None:
        rows.append(("tokens a second", f"{report.tokens_per_step / report.step_s:,.0f}"))
        rows.append(("expected MFU", f"{full:.1%} full, {causal:.1%} causal"))
        note = f'<p class="small">{escape(CONVENTION)}</p>'
    found = report.inference
    if found is not None and found.largest_batch is not None:
        times = f"{found.prefill_s:.4g} s expected, at least {found.prefill_bound_s:.4g} s"
        rows.append(("prefill of one full row", times))
        rows += [(f"rows of {length:,} tokens that fit", f"{batch:,}") for length, batch in found.largest_batch.items()]
    return _table(rows) + note


def _memory_table(report: PlanReport) -> str:
    kinds = report.kinds
    names = dict.fromkeys(field for each in kinds for field, size in parts(each).items() if size)
    moments = [getattr(each, "moment", "") for each in kinds]
    rows: list[tuple[str, ...]] = []
    for position, each in enumerate(kinds):
        sizes = [*(parts(each)[field] for field in names), total_bytes(each)]
        rows.append((str(position), moments[position], *(f"{size / 1e9:.2f}" for size in sizes)))
    return _table(rows, ("pipeline", "fullest in", *map(name_of, names), "total, GB"))


def _communication(report: PlanReport) -> str:
    rows = [
        (axis, str(report.degrees[axis]), f"{each.bytes / 1e9:.3f}", f"{each.total_s:.4f}", f"{each.exposed_s:.4f}")
        for axis, each in report.exchanges().items()
    ]
    return _table(rows, ("axis", "degree", "sent, GB", "alone, s", "exposed, s"))
