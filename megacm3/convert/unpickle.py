"""`python -m megacm3.convert.unpickle SOURCE TARGET`: the tensors of a torch pickle as safetensors.

Reading a pickle can run code of its maker. It happens here alone, in a process of its own, and only after the user gave
--trust-pickle; whatever the file does, the importer sees plain tensors. Files of tensors alone are read as such.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megacm3.errors import CheckpointError


def unpickle(source: Path, target: Path) -> None:
    """Run this module in a process of its own. Raises CheckpointError with its last line when it fails."""
    command = [sys.executable, "-m", "megacm3.convert.unpickle", str(source), str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
        raise CheckpointError(f"{source} cannot be read: {said[0]}")


def main(source: str, target: str) -> None:
    """Write the tensors of `source` to `target`, one at a time."""
    import torch

    from megacm3.checkpoint.tensors import Entry, in_file_order, write_tensors

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):
        # Written before torch 1.6 (no mapping), or it holds more than tensors.
        loaded = torch.load(source, map_location="cpu", weights_only=False)
    state: dict[str, object] = {}
    if isinstance(loaded, dict):
        state = loaded.get("state_dict") or loaded.get("model") or loaded
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SystemExit("it holds no tensors")
    entries = in_file_order(Entry(name, value.dtype, tuple(value.shape)) for name, value in tensors.items())

    def values(entry: Entry) -> Iterator[torch.Tensor]:
        yield tensors[entry.key]

    write_tensors(Path(target), entries, {"format": "pt"}, values)


if __name__ == "__main__":
    main(*sys.argv[1:])
