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
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def small_charts(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """SVGs of gradient norm, learning rate and throughput."""
    charts = []
    for name, label in (("grad_norm", "gradient norm"), ("lr", "learning rate"), ("tokens_per_second", "tokens / s")):
        steps, values = series(metrics, name)
        if not steps:
            continue
        figure, axes = _figure(2.8, 2.0)
        axes.plot(steps, values, color="#444c56", linewidth=1.2)
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_ylim(bottom=0)
        charts.append(_svg(figure))
    return charts


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
