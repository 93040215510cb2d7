"""The errors that users see, and the exit code of each.

A message says what was found, what was expected, and which key or flag to change. Programmer errors are plain asserts.
"""


class Megacm3Error(Exception):
    """Base of every error that ends a command with one line and its own exit code."""

    exit_code = 1
    silent = False
    """Whether another rank of the same job prints it."""


class ConfigError(Megacm3Error):
    """A flag, a config key, or a combination of them is wrong, or the hardware asked for is not there."""

    exit_code = 2


class DataError(Megacm3Error):
    """Input data, a tokenizer, a store, a bank or a neighbour folder is missing, damaged or of another make."""

    exit_code = 3


class CheckpointError(Megacm3Error):
    """A checkpoint or a model folder is missing, damaged or does not fit."""

    exit_code = 4


class Diverged(Megacm3Error):
    """The loss or a gradient left the range that the run's policy allows."""

    exit_code = 5


class PeerLost(Megacm3Error):
    """Another rank died or stalled."""

    exit_code = 6


class Stopped(Megacm3Error):
    """A signal ended the work after everything finished was saved; run the same command again to continue."""

    exit_code = 75
