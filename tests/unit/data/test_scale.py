"""A hundred million documents: start-up time and memory do not depend on their number, and the stream is fast."""

from pathlib import Path

import pytest

from megacm3.data.loader_benchmark import large_store, made_up_store, opening, stream_rate
from megacm3.data.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_store(tmp_path_factory.mktemp("scale") / "store")


# Tests run beside each other: times are the processor's.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_opening_a_hundred_million_documents(folder: Path) -> None:
    seconds, megabytes = opening(folder)
    print(f"100M documents: first sequence after {seconds:.2f} s, {megabytes:.0f} MB of anonymous memory")
    assert seconds < 5 and megabytes < 500


@pytest.mark.parametrize("packing", ["whole", "blocks"])
def test_two_million_tokens_a_second(folder: Path, tmp_path: Path, packing: str) -> None:
    files = stream_rate(Store.open(folder), packing)
    made_up = stream_rate(made_up_store(tmp_path / "tokens"), packing)
    print(f"{packing}: {files / 1e6:.1f}M tokens/s from files, {made_up / 1e6:.1f}M made up")
    assert files > 2e6 and made_up > 2e6
