"""Faults on purpose, for tests and drills: the one place that reads MEGACM3_FAULT.

    MEGACM3_FAULT="save.before_fsync:rank=1:step=4:kill9"

Points are named where `strike` is called. Conditions that are left out match everything. Actions: kill9, sleep=SECONDS,
or any other word, which `strike` returns to its caller. Several faults are separated by semicolons.
"""

import os
import signal
import time

VARIABLE = "MEGACM3_FAULT"


def strike(point: str, **where: int) -> str:
    """Carry out the faults set for `point`; return the action that the caller must carry out, "" for none."""
    for fault in os.environ.get(VARIABLE, "").split(";"):
        name, *fields = fault.strip().split(":")
        if name != point or not fields:
            continue
        *conditions, action = fields
        wanted = dict(condition.partition("=")[::2] for condition in conditions)
        if any(str(where.get(key)) != value for key, value in wanted.items()):
            continue
        if action == "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        if action.startswith("sleep="):
            time.sleep(float(action.removeprefix("sleep=")))
            return ""
        return action
    return ""
