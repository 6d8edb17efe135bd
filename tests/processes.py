"""Programs that run at the same time, and find each other at a port."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_together(program: Path, arguments: Sequence[Sequence[object]]) -> list[str]:
    """What one process for each row of arguments prints; all have to succeed."""
    with ExitStack() as stack:
        processes = []
        for row in arguments:
            process = subprocess.Popen(
                [sys.executable, str(program), *map(str, row)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # if another one fails
            processes.append(process)
        printed = []
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, out + err
            printed.append(out)
        return printed
