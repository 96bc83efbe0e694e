"""What a signal does before there is a step to finish, and after."""

import math
import signal
import subprocess
import sys
import time

import pytest

from treepo_mcore.system.signals import StopRequest
from treepo_mcore.system.time_limit import TimeLimit

CODE = """
import os, signal, time
from treepo_mcore.system.signals import StopRequest
stop = StopRequest()
stop.listen()
{begin}
os.kill(os.getpid(), signal.{name})
time.sleep(0.1)
print(stop.number)
"""


def run(name, begin):
    code = CODE.format(name=name, begin=begin)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_before_the_first_step_it_ends_the_process(name):
    done = run(name, "")
    assert done.returncode == 75
    assert done.stderr == f"{name} before the first step: exit status 75\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_afterwards_it_waits_for_the_steps_end(name):
    done = run(name, "stop.begin_steps()")
    assert done.stdout.split() == [str(int(getattr(signal, name)))]


CLOSING = """
import ctypes
from treepo_mcore.system.signals import StopRequest
stop = StopRequest()
stop.listen()
stop.begin_steps()
{end}
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.pause, None, None)  # as libraries that take a while when Python itself is gone
print(flush=True)
raise SystemExit(75)
"""


@pytest.mark.parametrize(("end", "killed"), [("stop.end()", False), ("", True)])
def test_a_launcher_cannot_end_a_run_that_closes(end, killed):
    process = subprocess.Popen([sys.executable, "-c", CLOSING.format(end=end)], stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(300 if killed else 10):  # a signal that comes before Python is gone is only remembered
        process.terminate()
        time.sleep(0.1)
        if process.poll() is not None:
            break
    status = process.poll()
    process.kill()
    process.communicate()
    assert status == (-signal.SIGTERM if killed else None)


def test_a_time_limit_leaves_room_for_a_step_and_a_checkpoint(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = TimeLimit(60)
    assert not limit.near()
    for later, near in ((10, False), (15, False), (5, False), (3, True)):  # 60 - 33 are less than twice 15
        now[0] += later
        assert limit.near() is near
    assert not TimeLimit(math.inf).near()


def test_a_run_that_is_short_of_time_is_asked_to_stop(group, monkeypatch):
    stop = StopRequest(limit_seconds=60)
    assert stop.on_any_rank() is None
    monkeypatch.setattr(stop.limit, "near", lambda: True)
    assert stop.on_any_rank() == "time limit"
    stop.number = signal.SIGUSR1
    assert stop.on_any_rank() == "SIGUSR1"
