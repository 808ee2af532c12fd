"""Faults from outside: functions in processes that are killed, and what they left on the disk."""
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills need Unix")
NOBODY = 65534  # a user who owns nothing
LITTER = (".part", ".lock", ".error")  # endings of what a killed process may leave behind


def start(job: Callable[..., object], *arguments: object, errors: Path | None = None) -> int:
    """Run a function in a process that is forked off, and return the id of that; an error goes into a file."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        job(*arguments)
        status = 0
    except BaseException as error:
        (errors.write_text(str(error)) if errors else traceback.print_exc())
    finally:
        os._exit(status)


def finish(process: int) -> int:
    """Wait for a process; returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_after(seconds: float, process: int) -> bool:
    """Kill a process after a while; returns whether it was still at work."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return finish(process) == -signal.SIGKILL


def as_nobody(job: Callable[..., object], *arguments: object) -> None:
    """Run a function as a user who may not write everywhere, as root may."""
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    job(*arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder and those inside it, without what a killed process may leave behind."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*"))
            if file.is_file() and file.suffix not in LITTER}
