"""Other people's tools, which tests of exports run: where they are missing, the test says which and how to get it."""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

REQUIRED = "MEGACM3_PEERS"
"""Set to `required` by .ci/run: a peer that is missing is a failure there."""
LLAMA_CPP = "LLAMA_CPP"
"""Names a checkout of llama.cpp, or the part of it that llama-cpp-python's source distribution holds."""


def _missing(what: str) -> NoReturn:
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(what)
    pytest.skip(what)


def peer(name: str) -> Any:
    """The module `name`; skips, or in CI fails, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        _missing(f"{name} cannot be imported ({fault}): pip install -r .ci/requirements.txt")


def llama_cpp() -> Path:
    """The folder with convert_hf_to_gguf.py."""
    folder = Path(os.environ.get(LLAMA_CPP, "") or "nowhere")
    if not (folder / "convert_hf_to_gguf.py").is_file():
        _missing(f"${LLAMA_CPP} names no checkout of llama.cpp (.ci/llama_cpp.sh FOLDER makes one)")
    return folder


def vllm_sources() -> Path:
    """The installed vLLM's folder, found without importing it (that wants a GPU). Always skips where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed (gigabytes of CUDA): only the table of its fields was checked")
    return Path(spec.submodule_search_locations[0])
