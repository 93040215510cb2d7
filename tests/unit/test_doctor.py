"""The doctor's traps on real folders: the wrong apex, both faiss packages, old versions, no place to write."""

import os
import resource
import time
from pathlib import Path

import pytest

from megacm3 import doctor
from megacm3.doctor import NOTE, OK, PROBLEM

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, name: str, version: str, *packages: str) -> None:
    """What pip leaves of a distribution: its metadata and its packages."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for package in packages:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()


def states(findings: object) -> list[str]:
    return [finding.state for finding in findings]  # type: ignore[attr-defined]


def test_this_environment_has_no_problem() -> None:
    findings = list(doctor.examine(ROOT, collective=False))
    assert [finding for finding in findings if finding.state == PROBLEM] == []


@pytest.mark.parametrize(
    "packages, state",
    [([], PROBLEM), (["faiss-cpu"], OK), (["faiss-gpu"], OK), (["faiss-cpu", "faiss-gpu"], PROBLEM)],
)
def test_one_faiss_and_only_one(tmp_path: Path, packages: list[str], state: str) -> None:
    for name in packages:
        install(tmp_path, name, "1.15.1")
    assert states(doctor.check_faiss(doctor.installed([str(tmp_path)]))) == [state]


def test_the_apex_of_the_package_index_is_not_nvidias(tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    install(wrong, "apex", "0.9.10.dev0", "apex", "apex/lib")
    install(right, "apex", "0.1", "apex", "apex/optimizers", "apex/normalization")
    for folder, state in ((tmp_path / "none", NOTE), (wrong, PROBLEM), (right, OK)):
        path = [str(folder)]
        assert states(doctor.check_apex(doctor.installed(path), path)) == [state]


def test_missing_and_untried_versions(tmp_path: Path) -> None:
    install(tmp_path, "numpy", "1.26.4")
    install(tmp_path, "Jinja2", "3.1.6")
    findings = list(
        doctor.check_packages(doctor.installed([str(tmp_path)]), ["numpy>=2", "torch==2.13.0", "jinja2>=3"])
    )
    assert [(finding.state, finding.name) for finding in findings] == [
        (NOTE, "numpy"),
        (PROBLEM, "torch"),
        (OK, "packages"),
    ]


def test_a_file_where_the_runs_should_go(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    assert states(doctor.check_disk(tmp_path / "not" / "yet")) != [PROBLEM]
    assert states(doctor.check_disk(tmp_path / "runs")) == [PROBLEM]


def test_little_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in doctor.check_limits()}
    assert "/dev/shm holds" in found["shared memory"].text
    monkeypatch.setattr(doctor, "SHARED_MEMORY_BYTES", 1 << 60)  # more than any machine has
    found = {finding.name: finding for finding in doctor.check_limits()}
    assert found["shared memory"].state == NOTE and "--shm-size" in found["shared memory"].text


def test_a_low_limit_of_open_files_is_noted() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = {finding.name: finding for finding in doctor.check_limits()}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found["open files"].state == NOTE and "limit 256" in found["open files"].text


def test_clocks_that_are_behind_or_apart(tmp_path: Path) -> None:
    assert states(doctor.check_clock(folder=tmp_path)) == [OK]
    (behind,) = doctor.check_clock(now=0.0)
    assert behind.state == NOTE and "1970-01-01" in behind.text
    (apart,) = doctor.check_clock(now=time.time() + 3600, folder=tmp_path)
    assert apart.state == NOTE and "-3600 s away" in apart.text
    assert os.listdir(tmp_path) == []


def test_the_devices_that_torch_sees() -> None:
    import torch

    found = list(doctor.check_devices())
    assert [finding.name.startswith("cuda:") for finding in found] == [True] * torch.cuda.device_count() or (
        "no CUDA device" in found[0].text
    )


def test_the_report_has_a_line_for_every_part() -> None:
    names = [finding.name for finding in doctor.examine(ROOT, collective=False)]
    for name in ("python", "machine", "packages", "faiss", "apex", "shared memory", "open files", "clock", "disk"):
        assert name in names
