"""The drawings of the demo's page, as SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 720, 280, 46
COLOURS = (
    "#3366cc", "#dc6e00", "#2e8b57", "#8b3a8b", "#c0a000", "#777777", "#b03060", "#20808d", "#6b8e23", "#4b0082",
)  # fmt: skip


def loss_chart(losses: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """A curve a training: loss over steps, each axis to scale, smoothed over 1% of the steps."""
    curves = {name: _smooth(points) for name, points in losses.items() if points}
    if not curves:
        return ""
    top = max(loss for points in curves.values() for _, loss in points)
    last = max(step for points in curves.values() for step, _ in points)
    parts = [_axis_labels(top, last)]
    for index, (name, points) in enumerate(curves.items()):
        place = " ".join(f"{_x(step, last):.1f},{_y(loss, top):.1f}" for step, loss in points)
        colour = COLOURS[index]
        parts.append(f'<polyline points="{place}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f"{escape(name)}: {points[-1][1]:.3f}"
        parts.append(f'<text x="{WIDTH - 200}" y="{30 + 18 * index}" fill="{colour}">{label}</text>')
    return _svg(HEIGHT, parts)


def _x(step: float, last: int) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * step / last


def _y(loss: float, top: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * loss / top


def _axis_labels(top: float, last: int) -> str:
    ticks = [
        f'<text x="4" y="{_y(loss, top) + 4:.0f}">{loss}</text>'
        f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{_y(loss, top):.1f}" y2="{_y(loss, top):.1f}" stroke="#eee"/>'
        for loss in range(math.floor(top) + 1)
    ]
    ticks += [f'<text x="{_x(step, last):.0f}" y="{HEIGHT - 20}">{step}</text>' for step in (0, last // 2, last)]
    return "".join(ticks) + f'<text x="{WIDTH // 2}" y="{HEIGHT - 4}">step</text><text x="4" y="16">loss (nats)</text>'


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    size = max(1, len(points) // 100)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def plan_drawing(plan: Mapping[str, Any]) -> str:
    """The mesh as a row of ranks, each with its memory stacked to scale."""
    ranks: Sequence[Mapping[str, int]] = plan["memory"]["per_rank"]
    kinds = [name for name in ranks[0] if name.endswith("_bytes") and name != "total_bytes"]
    names = [name for name in kinds if any(rank[name] for rank in ranks)]
    largest = max(rank["total_bytes"] for rank in ranks)
    parts: list[str] = []
    for row, rank in enumerate(ranks):
        x, y = float(MARGIN + 50), 20 + 46 * row
        parts.append(f'<text x="4" y="{y + 20}">rank {rank["rank"]}</text>')
        for index, name in enumerate(names):
            width = (WIDTH - 2 * MARGIN - 130) * rank[name] / largest
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="30" fill="{COLOURS[index]}"/>')
            x += width
        parts.append(f'<text x="{x + 6:.0f}" y="{y + 20}">{rank["total_bytes"] / 1e6:.0f} MB</text>')
    y = 20 + 46 * len(ranks)
    parts += [
        f'<text x="{MARGIN + 50 + 200 * (index % 3)}" y="{y + 16 + 18 * (index // 3)}" fill="{COLOURS[index]}">'
        f"{name.removesuffix('_bytes').replace('_', ' ')} {ranks[0][name] / 1e6:.1f} MB</text>"
        for index, name in enumerate(names)
    ]
    mesh = ", ".join(f"{axis} {degree}" for axis, degree in plan["degrees"].items())
    y += 24 + 18 * -(-len(names) // 3)
    parts.append(f'<text x="{MARGIN + 50}" y="{y}">mesh: {escape(mesh)}</text>')
    return _svg(y + 10, parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" font-size="13" font-family="sans-serif">{"".join(parts)}</svg>'
