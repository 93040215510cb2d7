"""Packaging of megacm3. The version ranges stand once, in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megacm3" / "__init__.py").read_text()).group(1)

# faiss-cpu and faiss-gpu install the same folder, so neither is a base requirement; the tests are for developers.
EXTRA = ("faiss-cpu", "pytest")


def requirements(extra: bool) -> list[str]:
    """The lines of requirements.txt that are (or are not) in an extra."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#") and line.startswith(EXTRA) == extra]


TESTS = [line for line in requirements(extra=True) if line.startswith("pytest")]
FAISS_CPU = [line for line in requirements(extra=True) if line.startswith("faiss-cpu")]

setup(
    name="megacm3",
    version=VERSION,
    description="An open trainer for early-fusion image and text token models: CM3Leon and Chameleon",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    author="megacm3 authors",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megacm3", "megacm3.*"]),
    package_data={"megacm3": ["py.typed", "sft/tasks.yaml", "evaluation/blind_page.html"]},
    install_requires=requirements(extra=False),
    extras_require={
        # Choose one of cpu and gpu, never both.
        "cpu": FAISS_CPU,
        # For CUDA machines; megacm3 runs without each of them, more slowly. NVIDIA's Apex is not here: `apex` in the
        # package index is another project (tools/doctor.py tells them apart).
        "gpu": ["faiss-gpu>=1.15,<1.16", "transformer-engine[pytorch]>=2.8", "flash-attn>=2.8"],
        "ray": ["datatrove[ray]>=0.10.1,<0.11"],
        # Inputs that need a package of their own; WARC also wants the system's libmagic.
        "tfrecord": ["tfrecord>=1.14,<2", "crc32c>=2.4"],
        "crawl": [
            "warcio>=1.7,<2",
            "faust-cchardet>=2.1",
            "python-magic>=0.4.27",
            "trafilatura>=1.8,<1.12",
            "lxml-html-clean>=0.4",
            "spacy>=3.8,<4",
        ],
        # Encoders of open_clip; its torchvision must be the build that goes with torch.
        "open_clip": ["open_clip_torch>=3.3,<4"],
        # Other indexes of a memory bank: Milvus with its embedded Lite, Annoy, Pinecone's client.
        "milvus": ["pymilvus>=3.0.2,<4", "milvus-lite>=3.2,<4"],
        "annoy": ["annoy>=1.17.3,<2"],
        "pinecone": ["pinecone>=10.2,<11"],
        "sweep": ["optuna>=5.0,<6"],
        "evaluate": ["torchmetrics>=1.9,<2", "pycocoevalcap>=1.2,<2"],
        "wandb": ["wandb>=0.23,<1"],
        "dev": [*TESTS, "ruff==0.17.6", "mypy==2.4.1", "codespell>=2.4,<3", "pre-commit>=4,<5"],
    },
)
