"""One job a directory."""

import subprocess
import sys

import pytest

from treepo_mcore.config import ConfigError
from treepo_mcore.system.lock import lock_directory

HOLD = "import sys; from pathlib import Path; from treepo_mcore.system.lock import lock_directory\n"
HOLD += "held = lock_directory(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_a_directory_is_one_jobs_until_it_is_gone(tmp_path):
    """Killed without a chance to clear anything away, too."""
    run = tmp_path / "runs" / "one"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], **pipes)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        ConfigError, match=rf"run\.dir: .*one is in use by process {holder.pid} on .*; expected one job"
    ):
        lock_directory(run)
    holder.kill()
    holder.wait()
    lock = lock_directory(run)
    with pytest.raises(ConfigError, match="is in use by process"):
        lock_directory(run)
    lock.close()
    lock_directory(run).close()
