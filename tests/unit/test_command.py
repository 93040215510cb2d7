"""How a command ends: one line and a code for what a user can mend."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("os.write(os.open('/dev/full', os.O_WRONLY), b'x')", 3, "error: writing the output: No space left on device"),
        ("open('/none/such')", 3, "error: /none/such: No such file"),
        ("raise DataError('a; expected b')", 3, "error: a; expected b"),
        ("raise KeyboardInterrupt", 75, "stopped: what was finished is kept"),
    ],
)
def test_the_end_of_a_command(body, code, said):
    program = f"""
import os
from megacm3.command import run
from megacm3.errors import DataError
def main(arguments):
    {body}
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == 1
