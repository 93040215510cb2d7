"""What every command line shares: error lines, exit codes, progress, and keyed random seeds. Imports nothing heavy."""

import errno
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

from megacm3.errors import ConfigError, DataError, Megacm3Error, Stopped

Item = TypeVar("Item")

# What libraries say on import or at every call, and no user of ours can act upon: parts that are optional (the doctor
# lists them), a variable that model/kernels.py sets where there is a GPU, and names that torch is going to change.
_NOISE = (
    "Transformer Engine and Apex are not installed",
    ".*CUDA_DEVICE_MAX_CONNECTIONS to 1",
    r"`torch\.distributed\.\w+` is deprecated",
)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Faults of a write that mean a full disk, an exhausted quota, a limit."""


def run(main: Callable[[list[str] | None], int | None]) -> NoReturn:
    """Run a command's `main` and leave with the contract's exit code.

    A `Megacm3Error` becomes one `error:` line on stderr; so does a file that cannot be read or written (no permission,
    no space, a file in a folder's place). Ctrl-C becomes exit code 75, since all offline work is committed unit by
    unit. Anything else is a fault of ours and keeps its traceback.
    """
    logging.basicConfig(level=os.environ.get("MEGACM3_LOG", "INFO"), format="%(message)s", stream=sys.stderr)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for noisy in ("datasets", "faiss", "httpx", "matplotlib", "PIL", "torch", "megatron"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code = main(None) or 0
    except KeyboardInterrupt:
        print("stopped: what was finished is kept; run the same command again to continue", file=sys.stderr)
        code = Stopped.exit_code
    except Megacm3Error as error:
        if not error.silent:
            print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        # A write that finds the disk full names no file.
        if not error.filename and error.errno not in NO_ROOM:
            raise
        logging.getLogger(__name__).debug("in full:", exc_info=error)
        print(f"error: {error.filename or 'writing the output'}: {error.strerror}", file=sys.stderr)
        code = DataError.exit_code
    sys.exit(code)


def progress(
    items: Iterable[Item], *, total: int | None = None, unit: str = "it", description: str = ""
) -> Iterable[Item]:
    """`items` with a bar on stderr: count, rate and time left; a line every 10 s where stderr is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        unit=unit,
        desc=description or None,
        mininterval=10.0 if quiet else 0.2,
        maxinterval=30.0 if quiet else 10.0,
        ncols=100 if quiet else None,
        leave=True,
        file=sys.stderr,
    )


def seed_from(*parts: Any) -> int:
    """A 63-bit seed from the values' `repr`: every random stream of the project is keyed by such a tuple.

    The same parts give the same seed on every machine, rank and worker; use only numbers, strings and tuples of them.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pairs(flag: str, given: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE words of a flag as a dict. Raises ConfigError for one that has no key or no value."""
    given = list(given)
    found = dict(pair.partition("=")[::2] for pair in given)
    if not all(found) or not all(found.values()):
        raise ConfigError(f"{flag} {' '.join(given)}; expected KEY=VALUE")
    return found
