"""Looks at a machine and its Python environment: what is there, what is missing, and what that costs.

Nothing here imports the libraries that it judges, but torch for the devices: a broken one must not stop the report.
"""

import importlib.machinery
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megacm3 import __version__

OK, NOTE, PROBLEM = "ok", "note", "problem"

ACCELERATORS = {
    "transformer-engine": "fp8, and attention and norms fused; without it: torch's own attention (flash where it can)",
    "flash-attn": "attention of TransformerEngine and transformers; without it: torch's own",
}
"""Optional packages, and what they bring."""

SHARED_MEMORY_BYTES = 1 << 30
"""Below this, loader processes and NCCL run out of /dev/shm (the default of docker is 64 MiB)."""
OPEN_FILES = 4096
"""Below this, a store or a bank of many parts, times the loader processes, can meet the limit."""
CLOCK_SECONDS = 5.0
"""More than this between two clocks, and files seem to come from the future."""
FREE_BYTES = 10 << 30
"""Below this, the environment (3 GiB) and a run with a few checkpoints may not fit."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state`: ok | note (works, at a cost) | problem (exit code 2)."""

    state: str
    name: str
    text: str


def check_python() -> Iterator[Finding]:
    """The interpreter, and the machine's cores and memory."""
    version = platform.python_version()
    fits = (3, 10) <= sys.version_info[:2] <= (3, 13)
    text = version if fits else f"{version} found, 3.10 to 3.13 expected"
    yield Finding(OK if fits else PROBLEM, "python", f"{text} ({sys.executable}), megacm3 {__version__}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} cores, {platform.machine()} {platform.system()} {platform.release()}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        text += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB of memory"
    yield Finding(OK, "machine", text)


def wanted_packages(root: Path | None = None) -> list[str]:
    """The requirement lines of this checkout, or of the installed package."""
    file = (root or Path(__file__).resolve().parents[1]) / "requirements.txt"
    if file.is_file():
        return [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in importlib.metadata.requires("megacm3") or [] if "extra ==" not in line]


def installed(path: list[str] | None = None) -> dict[str, str]:
    """Version by normalised name of every distribution on `path` (default: this environment)."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=sys.path if path is None else path):
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        found.setdefault(name, distribution.version)
    return found


def check_packages(versions: dict[str, str], wanted: list[str]) -> Iterator[Finding]:
    """Each requirement: missing is a problem, another version than the tried ones a note. faiss has its own check."""
    from packaging.requirements import Requirement

    good = []
    for line in wanted:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        if name.startswith(("faiss", "pytest")):
            continue
        found = versions.get(name)
        if found is None:
            yield Finding(PROBLEM, name, f"not installed, {requirement} expected: pip install -r requirements.txt")
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding(NOTE, name, f"{found} found, {requirement} is what was tried together")
        else:
            good.append(f"{name} {found}")
    yield Finding(OK, "packages", ", ".join(good))


def check_faiss(versions: dict[str, str]) -> Iterator[Finding]:
    """Exactly one of the faiss packages: all of them install the same folder."""
    found = {name: version for name, version in versions.items() if name.startswith("faiss-")}
    names = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        yield Finding(
            PROBLEM, "faiss", "not installed: no memory bank; pip install faiss-cpu (or faiss-gpu, never both)"
        )
    elif len(found) > 1:
        yield Finding(
            PROBLEM, "faiss", f"{names} overwrite each other's files: pip uninstall all of them, then install one"
        )
    else:
        yield Finding(OK, "faiss", names)


def check_apex(versions: dict[str, str], path: list[str] | None = None) -> Iterator[Finding]:
    """NVIDIA's Apex comes as source alone; the `apex` of the package index is another project."""
    spec = importlib.machinery.PathFinder.find_spec("apex", path)
    if spec is None:
        yield Finding(NOTE, "apex", "not installed: torch's fused Adam serves instead (optional, NVIDIA's source only)")
        return
    parts = {"optimizers", "normalization"}
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    if all(any((folder / part).is_dir() for folder in folders) for part in parts):
        yield Finding(OK, "apex", f"NVIDIA's, {versions.get('apex', 'no version')}")
    else:
        yield Finding(
            PROBLEM,
            "apex",
            f"apex {versions.get('apex', '')} is not NVIDIA's but another project of that name on the package index, "
            "and libraries that look for Apex stumble over it: pip uninstall apex",
        )


def check_accelerators(versions: dict[str, str]) -> Iterator[Finding]:
    """Optional packages for CUDA machines."""
    for name, gain in ACCELERATORS.items():
        if name in versions:
            yield Finding(OK, name, versions[name])
        else:
            yield Finding(NOTE, name, f"not installed (optional): {gain}")


def check_devices() -> Iterator[Finding]:
    """What torch can compute on."""
    try:
        import torch
    except ImportError as error:
        yield Finding(PROBLEM, "devices", f"torch cannot be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Finding(
            NOTE, "devices", "no CUDA device: everything runs on the CPU with gloo, fit for small models and tests"
        )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = device.major >= 8
        text = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        yield Finding(
            OK if bf16 else NOTE, f"cuda:{index}", text + ("" if bf16 else ": no bf16; use train.dtype=fp32 or fp16")
        )


def check_compiler() -> Iterator[Finding]:
    """DeepSpeed compiles some operations at first use; megacm3's own path on one machine needs none of them."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if found and shutil.which("ninja"):
        yield Finding(OK, "compiler", f"{found[0]} and ninja")
    else:
        yield Finding(NOTE, "compiler", "no C++ compiler with ninja: DeepSpeed's optimizer offload cannot be built")


def check_limits() -> Iterator[Finding]:
    """Shared memory and open files."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        text = f"/dev/shm holds {size / 2**30:.1f} GiB"
        if size < SHARED_MEMORY_BYTES:
            yield Finding(
                NOTE, "shared memory", text + ": too little for loader processes and NCCL (docker: --shm-size=8g)"
            )
        else:
            yield Finding(OK, "shared memory", text)
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
            yield Finding(NOTE, "open files", f"limit {soft}: a store of many parts may meet it; ulimit -n {hard}")
        else:
            yield Finding(OK, "open files", f"limit {soft}")


def check_clock(now: float | None = None, folder: Path | None = None) -> Iterator[Finding]:
    """A clock that is behind makes file times, logs and certificates of downloads wrong.

    now: seconds since 1970 in place of the clock's. folder: its file system's clock is compared too (a shared one has
    its own).
    """
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    now = time.time() if now is None else now
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < newest:
        yield Finding(NOTE, "clock", f"{text} is before this package was written ({time.ctime(newest)}): set the clock")
        return
    if folder is not None and os.access(folder, os.W_OK):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            off = os.stat(file.name).st_mtime - now
        if abs(off) > CLOCK_SECONDS:
            yield Finding(NOTE, "clock", f"{text}; the file system of {folder} is {off:+.0f} s away: synchronise both")
            return
    yield Finding(OK, "clock", text)


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free bytes where runs will be written, and whether a file can be written and made durable there."""
    folder = _existing(folder)
    free = shutil.disk_usage(folder).free
    state, text = OK, f"{free / 2**30:.1f} GiB free at {folder}"
    if free < FREE_BYTES:
        state, text = NOTE, f"{text}; less than {FREE_BYTES >> 30} GiB is soon full of checkpoints"
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        state, text = PROBLEM, f"{text}; cannot write there: {error}"
    yield Finding(state, "disk", text)


RANK_PROGRAM = """
import os, sys
import torch, torch.distributed as dist
backend = sys.argv[1]
if backend == "nccl":
    torch.cuda.set_device(int(os.environ["RANK"]))
dist.init_process_group(backend)
value = torch.full((1 << 20,), float(os.environ["RANK"]) + 1.0, device="cuda" if backend == "nccl" else "cpu")
dist.all_reduce(value)
assert (value == 3.0).all(), "the sum over two ranks is wrong"
dist.destroy_process_group()
"""


def check_collective(backend: str = "gloo", timeout: float = 90.0) -> Iterator[Finding]:
    """Two processes on this machine add up a tensor, as every training run will."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, backend],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    name = f"2 ranks, {backend}"
    try:
        for number, rank in enumerate(ranks):
            _, errors = rank.communicate(timeout=max(1.0, timeout - (time.monotonic() - started)))
            if rank.returncode:
                last = (errors.strip().splitlines() or ["no message"])[-1]
                yield Finding(PROBLEM, name, f"rank {number} left with exit code {rank.returncode}: {last}")
                return
        yield Finding(OK, name, f"all-reduce of 4 MiB right, {time.monotonic() - started:.1f} s with start-up")
    except subprocess.TimeoutExpired:
        yield Finding(PROBLEM, name, f"no answer in {timeout:.0f} s: is traffic on the loopback interface blocked?")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def examine(folder: Path, collective: bool = True) -> Iterator[Finding]:
    """All checks, one after another, each finding as soon as it is there."""
    versions = installed()
    yield from check_python()
    yield from check_packages(versions, wanted_packages())
    yield from check_faiss(versions)
    yield from check_apex(versions)
    yield from check_accelerators(versions)
    yield from check_devices()
    yield from check_compiler()
    yield from check_limits()
    yield from check_clock(folder=_existing(folder))
    yield from check_disk(folder)
    if collective:
        yield from check_collective("gloo")
        import torch

        if torch.cuda.device_count() > 1:
            yield from check_collective("nccl")
