"""Curves as SVG text for a page that needs no network."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacm3.errors import DataError

COLOURS = {"loss": "#8a8f98", "loss_image": "#d1495b", "loss_text": "#2e6f95"}
LABELS = {"loss": "all tokens", "loss_image": "image tokens", "loss_text": "text tokens"}


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line is left out. Raises DataError when there is none."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected JSON lines")
    lines = path.read_text(encoding="utf-8").splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as fault:
            if number < len(lines):
                raise DataError(f"{path} line {number} is not JSON: {fault}") from fault
    if not values:
        raise DataError(f"{path} holds no line")
    return values


def series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it is a finite number."""
    points = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, a twenty-fifth of the curve to either side (less at the ends)."""
    reach = len(values) // 25
    out = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)  # even on both sides, so that a falling curve is not moved
        window = values[i - near : i + near + 1]
        out.append(sum(window) / len(window))
    return out


def loss_chart(metrics: Sequence[dict[str, Any]]) -> str:
    """SVG of the loss by modality over the steps: points as logged, a smoothed line over them."""
    figure, axes = _figure(8.6, 3.6)
    for name in ("loss", "loss_text", "loss_image"):
        steps, values = series(metrics, name)
        if steps:
            axes.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=1)
            label = f"{LABELS[name]}: {values[-1]:.3f}"
            axes.plot(steps, smooth(values), color=COLOURS[name], linewidth=1.8, label=label)
        steps, values = series(metrics, f"held_out_{name}")
        if steps:
            label = f"{LABELS[name]}, held out: {values[-1]:.3f}"
            axes.plot(steps, values, "o--", color=COLOURS[name], linewidth=1, markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("gradient norm", "log", ("grad_norm",)),
    ("output norm", "log", ("output_norm",)),
    ("mean of log Z", "linear", ("z",)),
    ("q and k norm gains", "linear", ("q_gain", "k_gain", "q_gain_max", "k_gain_max")),
    ("learning rate", "linear", ("lr",)),
    ("tokens / s", "linear", ("tokens_per_second",)),
    ("share of the device's peak", "linear", ("flops_utilization",)),
    ("share of time waiting for data", "linear", ("data_wait",)),
    ("held-out bits per pixel", "linear", ("held_out_bits_per_pixel",)),
    ("memory (bytes)", "linear", ("memory",)),
)
"""Title, scale of the y axis, and the columns of metrics.jsonl of each small chart; empty ones are left out."""
POINTS = 1000
"""Of a curve at most: more cannot be seen."""


def panels(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """SVGs of a run's metrics: losses by modality and by position, then `PANELS`."""
    stride = -(-len(metrics) // POINTS)
    metrics = [line for i, line in enumerate(metrics) if i % stride == 0 or "held_out_loss" in line]
    charts = [loss_chart(metrics), *_position_chart(metrics)]
    for title, scale, names in PANELS:
        curves = [(name, *series(metrics, name)) for name in names]
        curves = [curve for curve in curves if curve[1]]
        if not curves:
            continue
        figure, axes = _figure(2.8, 2.0)
        for name, steps, values in curves:
            axes.plot(steps, values, linewidth=1.2, label=name, **({"color": "#444c56"} if len(curves) == 1 else {}))
        axes.set_title(title, fontsize=9, loc="left")
        if scale == "log" and min(min(values) for _, _, values in curves) > 0:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0 if min(min(values) for _, _, values in curves) >= 0 else None)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=7)
        charts.append(_svg(figure))
    return charts


def _position_chart(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Loss by place in the sequence: at the first, a middle and the last line."""
    lines = [line for line in metrics if line.get("loss_position")]
    if not lines:
        return []
    figure, axes = _figure(4.2, 3.6)
    for line in {line["step"]: line for line in (lines[0], lines[len(lines) // 2], lines[-1])}.values():
        points = [(i + 0.5, value) for i, value in enumerate(line["loss_position"]) if value is not None]
        parts = len(line["loss_position"])
        axes.plot([100 * x / parts for x, _ in points], [y for _, y in points], label=f"step {line['step']}")
    axes.set_xlabel("place in the sequence (%)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return [_svg(figure)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text; no date and a fixed salt, so that equal metrics give an equal page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megacm3", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
