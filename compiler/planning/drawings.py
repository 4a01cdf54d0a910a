"""Drawings of a plan as SVG: the mesh, the memory of each pipeline rank, the pipeline's timeline."""

from collections.abc import Iterator, Sequence
from html import escape

from archwright.compiler.planning.memory import parts, total_bytes
from archwright.compiler.planning.report import PlanReport
from archwright.compiler.planning.schedule import Task

COLOURS = {
    "weights": "#2f6db5", "compute weights": "#86b2e0", "gradients": "#c2533d", "unsharded gradients": "#e39a86",
    "optimizer": "#7a5aa6", "activations": "#3f9166", "working": "#93c9a9", "logits": "#d2a13a", "kv cache": "#3f9166",
    "windows": "#b58a9e", "context": "#6b6b6b", "nccl": "#949494", "allocator": "#bcbcbc",
}  # fmt: skip
_WIDTH = 960
_MOST_GROUPS, _MOST_TASKS = 64, 4000


def svg(height: float, content: Iterator[str] | Sequence[str], title: str) -> str:
    """One drawing, as wide as the page."""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(content)}</svg>"
    )


def _box(x: float, y: float, width: float, height: float, fill: str, tip: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height:.2f}" fill="{fill}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def name_of(field: str) -> str:
    """`kv_cache_bytes` → kv cache."""
    return field.removesuffix("_bytes").replace("_", " ")


def mesh_drawing(report: PlanReport) -> str:
    """Every GPU as a square, a row a pipeline rank, tensor ranks side by side, frames around data ranks.

    A mesh of many ranks is drawn up to `_MOST_GROUPS` groups a row; the text says how many there are.
    """
    degrees = report.degrees
    rows, tensor = degrees.get("pipeline", 1), degrees["tensor"]
    groups = len(report.memory) // (rows * tensor)
    shown = min(groups, _MOST_GROUPS)
    left, gap = 110.0, 4.0
    node = report.cluster.gpu.node_size if report.cluster else len(report.memory)
    cell = min(18.0, (_WIDTH - left - shown * gap) / (shown * tensor))
    context, outer = degrees.get("context", 1), "data and context" if report.training else "expert"
    content: list[str] = []
    for row in range(rows):
        y = 10 + row * (cell + 8)
        content.append(_text(left - 8, y + cell / 2 + 4, f"pipeline {row}" if rows > 1 else "ranks", "end"))
        for group in range(shown):
            x = left + group * (tensor * cell + gap)
            shade = "#2f6db5" if group // context % 2 == 0 else "#4f86c4"
            for column in range(tensor):
                rank = (row * groups + group) * tensor + column
                tip = f"rank {rank}, pipeline {row}, {outer} {group}, tensor {column}, node {rank // node}"
                content.append(_box(x + column * cell, y, cell - 1, cell, shade, tip))
    height = 10 + rows * (cell + 8)
    more = f"; {shown} of {groups} groups drawn" if shown < groups else ""
    legend = f"a row a pipeline rank; {tensor} tensor rank{'s' if tensor > 1 else ''} stand together{more}"
    content.append(_text(left, height + 14, legend))
    return svg(height + 22, content, "mesh")


def memory_drawing(report: PlanReport) -> str:
    """A stacked bar for each pipeline rank, and the capacity of a GPU."""
    kinds = report.kinds
    capacity = report.cluster.capacity_bytes if report.cluster else 0
    full = max([capacity, *(total_bytes(each) for each in kinds)])
    left, height = 110.0, 20.0
    scale = (_WIDTH - left - 90) / full
    content: list[str] = []
    for row, memory in enumerate(kinds):
        y, x = 10 + row * (height + 6), left
        content.append(_text(left - 8, y + 14, f"pipeline {row}" if len(kinds) > 1 else "each rank", "end"))
        for field, size in parts(memory).items():
            if size:
                tip = f"{name_of(field)}: {size / 1e9:.3f} GB"
                content.append(_box(x, y, size * scale, height, COLOURS[name_of(field)], tip))
                x += size * scale
        content.append(_text(x + 6, y + 14, f"{total_bytes(memory) / 1e9:.1f} GB"))
    bottom = 10 + len(kinds) * (height + 6)
    if capacity and report.cluster:
        x = left + capacity * scale
        content.append(f'<line x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{bottom:.1f}" class="limit"/>')
        content.append(_text(x, bottom + 14, f"{report.cluster.name} {capacity / 1e9:.1f} GB", "end"))
    return svg(bottom + 20, content, "memory of each pipeline rank")


def legend(report: PlanReport) -> str:
    """The colours of the parts that are there."""
    used = dict.fromkeys(name_of(field) for each in report.memory for field, size in parts(each).items() if size)
    return "".join(f'<span class="key"><i style="background:{COLOURS[name]}"></i>{name}</span>' for name in used)


def timeline_drawing(tasks: Sequence[Task], ranks: int) -> str:
    """A row a pipeline rank; forwards blue, backwards green, darker for each further stage of a rank; idle is white."""
    shown = sorted(tasks, key=lambda task: task.start_s)[:_MOST_TASKS]
    end_s, left, height = max(task.stop_s for task in shown), 110.0, 18.0
    scale = (_WIDTH - left - 10) / end_s
    content: list[str] = []
    for row in range(ranks):
        content.append(_text(left - 8, 23 + row * (height + 4), f"pipeline {row}", "end"))
    for task in shown:
        turn = task.stage // ranks
        hue, light = (140, 58) if task.backward else (212, 62)
        tip = f"{'backward' if task.backward else 'forward'} of micro-batch {task.micro_batch}, stage {task.stage}, "
        tip += f"{task.start_s * 1e3:.2f} to {task.stop_s * 1e3:.2f} ms"
        y, width = 10 + task.rank * (height + 4), (task.stop_s - task.start_s) * scale
        fill = f"hsl({hue},45%,{light - 12 * (turn % 4)}%)"
        content.append(_box(left + task.start_s * scale, y, width - 0.5, height, fill, tip))
        if width > 14:
            content.append(_text(left + task.start_s * scale + width / 2, y + 13, str(task.micro_batch), "middle"))
    bottom = 10 + ranks * (height + 4)
    content += [_text(left, bottom + 14, "0 s"), _text(_WIDTH - 10, bottom + 14, f"{end_s:.3g} s", "end")]
    return svg(bottom + 20, content, "pipeline timeline")
