"""Two network namespaces joined by a veth pair are two hosts to everything above the kernel: torchrun between them,
one of them cut off in mid-run, brought back, and the same scripts run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treepo_mcore.launch.render import TorchrunJob, render

ROOT = Path(__file__).resolve().parents[2]
# Names of this process: a job that was killed leaves its own behind.
HOSTS = {f"treepo{os.getpid()}-{number}": f"10.77.0.{number + 1}" for number in range(2)}


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip netns"),
]


@pytest.fixture
def hosts():
    """Named as their namespaces; each resolves both names, and its interface to the other is eth0."""
    for name in HOSTS:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if made.returncode:  # root in a container often may not
            pytest.skip(f"needs to make network namespaces, which this machine refuses: {made.stderr.strip()}")
        folder = Path("/etc/netns") / name  # `ip netns exec` puts these files in place of /etc's
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {host}\n" for host, ip in HOSTS.items()))
    first, second = HOSTS
    veth = ["ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
    subprocess.run(veth, check=True)
    for name, address in HOSTS.items():
        subprocess.run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
        link(name, "up", "lo")
        link(name, "up")
    yield list(HOSTS)
    for name in HOSTS:
        left = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True).stdout.split()
        for process in left:  # of a test that failed
            os.kill(int(process), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=True)
        shutil.rmtree(Path("/etc/netns") / name)


def link(host: str, state: str, device: str = "eth0") -> None:
    subprocess.run(["ip", "-n", host, "link", "set", device, state], check=True)


def start(host: str, script: Path, number: int) -> subprocess.Popen[str]:
    """The script as a node of this number on a host, with a host name of its own."""
    command = f'hostname {host} && exec bash "$@"'
    return subprocess.Popen(
        ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c", command, "-", script, str(number)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_host_is_cut_off_and_comes_back(task, hosts, tmp_path):
    """By the static rendezvous that scripts have by default; c10d differs in torchrun's own part."""
    script = tmp_path / "train.sh"
    settings = ["run.dir=run", "trainer.save_every=1", "trainer.eval_before=false", "trainer.eval_after=false"]
    job = TorchrunJob(
        ROOT / "examples" / "quickstart" / "config.yaml",
        (*task, *settings, "trainer.steps=1000"),
        nodes=2,
        gpus_per_node=0,
        processes_per_node=1,
        python=sys.executable,
        interface="eth0",
        disk_gib=1,
        memory_gib=1,
        head=HOSTS[hosts[0]],
    )
    script.write_text(render(job))
    running = [start(host, script, number) for number, host in enumerate(hosts)]
    tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 600
    while not (tracker.is_file() and int(tracker.read_text()) >= 2):
        ended = [node.communicate()[0][-3000:] for node in running if node.poll() is not None]
        assert time.monotonic() < deadline, "no checkpoint"
        assert not ended, ended
        time.sleep(0.2)
    link(hosts[1], "down")
    cut = time.monotonic()
    seconds = []
    for node in running:
        node.wait(180)
        seconds.append(time.monotonic() - cut)
    said = [node.communicate()[0] for node in running]
    print(f"ended {seconds[0]:.0f} s and {seconds[1]:.0f} s after the cut")
    print("\n=====\n".join(text[-2500:] for text in said))
    assert all(node.returncode not in (0, 75) for node in running)
    assert max(seconds) < 90
    assert "error: node" in said[0]
    assert "ending the ranks of this node" in said[0]
    done = int(tracker.read_text())
    link(hosts[1], "up")
    again = script.with_name("again.sh")
    again.write_text(script.read_text().replace("trainer.steps=1000", f"trainer.steps={done + 2}"))
    running = [start(host, again, number) for number, host in enumerate(hosts)]
    said = [node.communicate(timeout=600)[0] for node in running]
    assert [node.returncode for node in running] == [0, 0], said
    assert f"resumed at step {done}" in said[0] + said[1]
    assert int(tracker.read_text()) == done + 2
