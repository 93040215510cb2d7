"""report.html of a run, rewritten while it runs: curves, data shares and the config as one file without network."""

import html
import logging
import time
from pathlib import Path
from typing import Any

from megacm3.errors import DataError
from megacm3.evaluation.charts import panels, read_lines
from megacm3.evaluation.page import Section, render
from megacm3.files import new_file

log = logging.getLogger(__name__)

SHARE = 0.005
"""Of the training's time that the report may take: the next one waits until then."""


class ReportWriter:
    """Writes a run's report, seldom enough to cost nothing. The file is whole at any moment."""

    def __init__(self, out: Path, notes: dict[str, str]) -> None:
        """notes: further rows of the table, such as the layout."""
        self._out, self._notes, self._next = out, notes, 0.0

    def maybe(self) -> None:
        """Write it unless the last one was too short ago."""
        if time.monotonic() >= self._next:
            self.write("running")

    def write(self, state: str) -> None:
        """Write it now. state: how the run is, for the reader."""
        begun = time.monotonic()
        try:
            write_report(self._out, self._notes | {"state": f"{state} ({time.strftime('%Y-%m-%d %H:%M:%S %Z')})"})
        except OSError as fault:  # a full disk must not end a training
            log.warning("report.html could not be written: %s", fault.strerror)
        now = time.monotonic()
        self._next = now + (now - begun) / SHARE


def _data_shares(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = [row for row in rows if "data_tokens" in row]
    totals = {key: sum(row.get(key, 0) for row in rows) for row in rows[-1:] for key in row if key.startswith("data_")}
    room = totals.get("data_tokens", 0) + totals.get("data_padding", 0)
    if not room:
        return []
    shares = [(f"{name} tokens", totals[f"data_{name}"] / room) for name in ("padding", "cut", "left_out")]
    listed = [(name, f"{share:.1%} of the room") for name, share in shares]
    return listed + [
        ("retrieved documents a sample", f"{totals['data_retrieved'] / max(1, totals['data_samples']):.2f}")
    ]


def _saves(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    saves = [row for row in rows if "save_stall" in row]
    if not saves:
        return []
    stall, total = (sum(row[key] for row in saves) / len(saves) for key in ("save_stall", "save_total"))
    return [("saves", f"{len(saves)}: training stood still for {stall:.2f} s each, committed after {total:.2f} s")]


def write_report(out: Path, notes: dict[str, str] | None = None) -> Path:
    """Write `out`/report.html from `out`/metrics.jsonl and `out`/config.yaml; returns its path.

    notes: further rows of the table, such as the layout.
    """
    try:
        rows = read_lines(out / "metrics.jsonl")
    except DataError:
        rows = []  # nothing was logged yet
    table = [[name, value] for name, value in (notes or {}).items()]
    cards = []
    if rows:
        last = rows[-1]
        names = ["loss", "loss_text", "loss_image", "held_out_loss", "grad_norm", "tokens_per_second"]
        names.append("flops_utilization")
        cards = [(f"{last['step']:,}", "step"), (f"{last['tokens']:,}", "tokens")]
        cards += [(f"{last[name]:,.4g}", name.replace("_", " ")) for name in names if last.get(name) is not None]
        table += [list(row) for row in (*_data_shares(rows), *_saves(rows))]
        table += [["slow rank", f"step {row['step']}: {row['slow']}"] for row in rows if "slow" in row][-5:]
    sections = [Section("State", table=(["", ""], table))]
    if rows:
        sections.append(Section("Curves", "Means over the targets of a logged step, in nats.", charts=panels(rows)))
    config = (out / "config.yaml").read_text(encoding="utf-8") if (out / "config.yaml").exists() else ""
    sections.append(Section("Config", fragments=[f"<pre>{html.escape(config)}</pre>"]))
    with new_file(out / "report.html") as temporary:
        temporary.write_text(
            render(out.name, f"A training run of megacm3 in {out}.", cards, sections), encoding="utf-8"
        )
    return out / "report.html"
