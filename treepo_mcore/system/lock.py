"""One job a directory: two that wrote the same one would overwrite each other's checkpoints and metrics."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from treepo_mcore.config import ConfigError

NAME = ".lock"


def lock_directory(directory: Path) -> IO[str]:
    """Lock a directory, which is made where it is missing, until the file returned is closed or the process is gone.

    A job that died leaves nothing to clear away: the system gives its lock back. Raises `ConfigError` where another
    process has it, with that one's host and number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = (directory / NAME).open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise ConfigError(f"run.dir: {directory} is in use by {holder}; expected one job a directory") from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle
