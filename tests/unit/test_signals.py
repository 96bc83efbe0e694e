"""What a signal does before there is a step to finish, and after."""

import signal
import subprocess
import sys

import pytest

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
