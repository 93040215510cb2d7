"""Which tests may run beside which: unit tests by file on any process, everything that starts processes on one."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class ByRoom(LoadScopeScheduling):
    """A unit-test file stays together, so that its fixtures are made once. Tests that start ranks, launchers or tools
    are one unit of work: they run one after another and share one pool of ranks.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if "unit/" in file else "processes"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByRoom:
    """How the tests are dealt out where there is more than one process (tests/run.sh)."""
    return ByRoom(config, log)
