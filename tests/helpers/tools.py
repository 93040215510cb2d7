"""Command lines without a process for each: a tool's `main` in this process, its error as a user would see it."""

import importlib.util
from pathlib import Path

from megacm3.errors import Megacm3Error

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_tool(name: str, *arguments: object) -> tuple[int, str]:
    """Exit code and error line of `python tools/NAME.py arguments`; what it prints goes to the real stdout."""
    spec = importlib.util.spec_from_file_location(f"megacm3_tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.main([str(word) for word in arguments]) or 0, ""
    except Megacm3Error as error:
        assert "\n" not in str(error)
        return error.exit_code, str(error)
