"""report.html of a run: losses by modality, gradient and output norms, throughput, data shares, as one file."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from megacm3.files import new_file

PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss (nats per target)", "linear", ("loss", "loss_text", "loss_image")),
    ("Norms", "log", ("grad_norm", "output_norm")),
    ("log Z", "linear", ("z",)),
    ("Learning rate", "linear", ("lr",)),
    ("Tokens per second", "linear", ("tokens_per_second",)),
    ("Share of time waiting for data", "linear", ("data_wait",)),
)
"""Title, scale of the y axis, and the columns of metrics.jsonl in each panel."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, oldest first."""
    rows = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # a line being written
    return rows


def curves(rows: list[dict[str, Any]]) -> bytes:
    """All panels as one SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    for axis, (title, scale, columns) in zip(figure.subplots(3, 2).flat, PANELS, strict=True):
        for name in columns:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_yscale(scale)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if len(columns) > 1 and axis.lines:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _data_shares(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    totals = {key: sum(row.get(key, 0) for row in rows) for key in rows[-1] if key.startswith("data_")}
    room = totals.get("data_tokens", 0) + totals.get("data_padding", 0)
    if not room:
        return []
    shares = [(f"{name} tokens", totals[f"data_{name}"] / room) for name in ("padding", "cut", "left_out")]
    listed = [(name, f"{share:.1%} of the room") for name, share in shares]
    return listed + [
        ("retrieved documents a sample", f"{totals['data_retrieved'] / max(1, totals['data_samples']):.2f}")
    ]


def write_report(out: Path, notes: dict[str, str] | None = None) -> Path:
    """Write `out`/report.html from `out`/metrics.jsonl and `out`/config.yaml; returns its path.

    notes: further rows of the table, such as the layout.
    """
    rows = read_metrics(out / "metrics.jsonl")
    table = list((notes or {}).items())
    picture = ""
    if rows:
        last = rows[-1]
        names = ("step", "loss", "loss_text", "loss_image", "grad_norm", "tokens", "tokens_per_second")
        table += [(name, f"{last[name]:,.6g}") for name in names if last.get(name) is not None]
        table += _data_shares([row for row in rows if "data_tokens" in row] or rows)
        encoded = base64.b64encode(curves(rows)).decode()
        picture = f'<img alt="curves" style="max-width:100%" src="data:image/svg+xml;base64,{encoded}">'
    config = (out / "config.yaml").read_text(encoding="utf-8") if (out / "config.yaml").exists() else ""
    body = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in table)
    page = (
        "<!doctype html><meta charset='utf-8'><title>megacm3 run</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "th{text-align:left;padding-right:2em;font-weight:600}pre{background:#f5f5f5;padding:1em;overflow:auto}</style>"
        f"<h1>{html.escape(out.name)}</h1><table>{body}</table>{picture}"
        f"<h2>Config</h2><pre>{html.escape(config)}</pre>"
    )
    with new_file(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / "report.html"
