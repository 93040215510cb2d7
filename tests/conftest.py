"""Which tests may run beside which: unit tests by file on any process, everything that starts processes on one."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its group for `--dist loadgroup` (tests/run.sh).

    A unit-test file stays together, so that its fixtures are made once. Tests that start ranks, launchers or tools share
    one group: they run one after another and share one pool of ranks.
    """
    for item in items:
        room = item.path.relative_to(TESTS)
        name = str(room) if room.parts[0] == "unit" else "processes"
        item.add_marker(pytest.mark.xdist_group(name))
