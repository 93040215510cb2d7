"""The run's report is one page that needs no network."""

import json
import re
import resource
import signal
from pathlib import Path

import pytest

from megacm3.training.report import ReportWriter, write_report


def test_the_page_holds_its_curves_and_the_last_figures(tmp_path: Path) -> None:
    lines = []
    for step in range(1, 9):
        line = {"step": step, "loss": 8.0 / step, "loss_text": None, "loss_image": 7.0 / step, "grad_norm": 1.0}
        counts = {"data_tokens": 90, "data_padding": 10, "data_cut": 0, "data_left_out": 5}
        lines.append(line | counts | {"data_samples": 4, "data_retrieved": 12, "lr": 0.1, "tokens": step * 100})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 9, "lo')
    (tmp_path / "config.yaml").write_text("model: <b>\n")
    page = write_report(tmp_path, {"layout": "2 ranks"}).read_text()
    assert "<svg" in page
    assert "10.0% of the room" in page and "3.00" in page and "2 ranks" in page
    assert "&lt;b&gt;" in page and not re.search(r"(src|href)=['\"]http", page)


def test_a_run_without_a_logged_step_still_has_a_page(tmp_path: Path) -> None:
    assert write_report(tmp_path).read_text().startswith("<!doctype html>")


def test_reports_wait_until_they_cost_next_to_nothing(tmp_path: Path) -> None:
    writer, page = ReportWriter(tmp_path, {}), tmp_path / "report.html"
    writer.maybe()
    assert "running" in page.read_text()
    page.unlink()
    writer.maybe()
    assert not page.exists()
    writer.write("finished")
    assert "finished" in page.read_text()


def test_a_disk_that_refuses_the_report_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ReportWriter(tmp_path, {})
    writer.write("before")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        writer.write("after")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written: File too large" in caplog.text
    assert "before" in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
