"""Runs one program under limits: `python -I confined.py MEMORY FILE_BYTES CPU_SECONDS PROGRAM`, started by `code.py`.

A script of the standard library alone: it is not imported as a part of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

PROCESSES = 64  # of the user that are running, where the user is not root
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Limit this process, then become the program; 125 where it cannot even be started."""
    memory, file_bytes, seconds = map(int, sys.argv[1:4])
    alone = _leave()
    die_with_parent = ctypes.CDLL(None).prctl
    die_with_parent(DIE_WITH_PARENT, signal.SIGKILL)  # behind `_leave`, which makes the system forget it
    for name, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        resource.setrlimit(name, (most, most))
    if alone and (child := os.fork()):  # the child is the first process of its namespace: all others end with it
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    die_with_parent(DIE_WITH_PARENT, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, "-I", sys.argv[4]])


def _leave() -> bool:
    """Into namespaces without network and other processes, where the system has them for this user."""
    user, group = os.getuid(), os.getgid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC)
    except OSError:
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:  # files stay this user's
            file.write(line)
    return True


if __name__ == "__main__":
    main()
