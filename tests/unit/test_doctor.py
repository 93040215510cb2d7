"""The doctor's traps on real folders: the wrong apex, both faiss packages, old versions, no place to write."""

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
