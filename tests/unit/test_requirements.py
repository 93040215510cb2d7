"""Every library that the package and the tools import is in requirements.txt or in an extra of setup.py."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OPTIONAL = {
    "apex": "NVIDIA's, from source (setup.py says why it is in no extra)",
    "flash_attn": "extra gpu",
    "transformer_engine": "extra gpu",
    "ray": "extra ray",
    "wandb": "extra wandb",
    "tfrecord": "extra tfrecord",
    "pymilvus": "extra milvus",
    "milvus_lite": "extra milvus",
    "annoy": "extra annoy",
    "pinecone": "extra pinecone",
    "open_clip": "extra open_clip",
    "torchvision": "comes with open_clip",
    "crc32c": "extra tfrecord",
    "google": "protobuf, which comes with tfrecord",
    "warcio": "extra crawl",
    "optuna": "extra sweep",
    "torchmetrics": "extra evaluate",
    "pycocoevalcap": "extra evaluate",
}
"""Imported only where installed."""


def imported(path: Path) -> set[str]:
    """Top-level names of all absolute imports in a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"megacm3", "tests"}


def test_every_import_is_required() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    required = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") for line in lines}
    distributions = importlib.metadata.packages_distributions()
    missing = []
    for folder in ("megacm3", "tools", "examples", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            beside = {other.stem for other in path.parent.glob("*.py")}
            for name in imported(path) - OPTIONAL.keys() - beside:
                providers = {provider.lower().replace("_", "-") for provider in distributions.get(name, [name])}
                if not providers & required:
                    missing.append(f"{path.relative_to(ROOT)} imports {name} ({', '.join(sorted(providers))})")
    assert not missing, "\n".join(missing)
