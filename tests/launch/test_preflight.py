"""The look at a node: what nvidia-smi prints of healthy and of broken GPUs, memory, disk, clocks, other nodes.

The samples of nvidia-smi were written by hand in its documented format; no machine with eight GPUs was at hand.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treepo_mcore.cli import app
from treepo_mcore.launch import preflight
from treepo_mcore.launch.preflight import Findings, compare, look_at_disk, look_at_gpus, look_at_links, look_at_memory


def gpu(index: int, used: int = 4, errors: int = 0) -> str:
    """A line of the query."""
    return f"{index}, NVIDIA H100 80GB HBM3, 580.82.07, 81559, {used}, {errors}\n"


HEALTHY = "".join(gpu(index) for index in range(8))
GONE = "Unable to determine the device handle for GPU3: 0000:5F:00.0: Unknown Error\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n"
)


def links(*down: tuple[int, int], gpus: int = 8, each: int = 18) -> str:
    """The status of all links; those of `down` (GPU, link) are inactive."""
    lines = []
    for gpu in range(gpus):
        lines.append(f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-00000000000{gpu})")
        for link in range(each):
            lines.append(f"\t Link {link}: {'<inactive>' if (gpu, link) in down else '26.562 GB/s'}")
    return "\n".join(lines) + "\n"


def test_healthy_gpus():
    findings = look_at_gpus(HEALTHY, 8)
    assert findings == Findings(["8 x NVIDIA H100 80GB HBM3 (80 GiB), driver 580.82.07"], [])
    assert look_at_gpus(HEALTHY.replace(", 0\n", ", [N/A]\n"), 8).wrong == []  # ECC is off


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (HEALTHY.replace(gpu(3), ""), ["7 GPUs, expected 8"]),
        (
            HEALTHY.replace(gpu(3), "") + GONE,
            [f"nvidia-smi: {GONE.strip()}", "7 GPUs, expected 8"],
        ),
        (NO_DRIVER, [f"nvidia-smi: {NO_DRIVER.strip()}", "0 GPUs, expected 8"]),
        ("No devices were found\n", ["nvidia-smi: No devices were found", "0 GPUs, expected 8"]),
        ("not installed", ["nvidia-smi: not installed", "0 GPUs, expected 8"]),
        (
            HEALTHY.replace("5, NVIDIA H100 80GB HBM3", "5, NVIDIA H200"),
            ["GPUs of different kinds: NVIDIA H100 80GB HBM3, NVIDIA H200"],
        ),
        (
            HEALTHY.replace(
                "2, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 4", "2, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 70123"
            ),
            ["GPU 2: 70123 MiB in use; does another job or a left-over process run?"],
        ),
        (
            HEALTHY.replace(
                "6, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 4, 0", "6, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 4, 3"
            ),
            ["GPU 6: 3 uncorrected memory errors"],
        ),
    ],
)
def test_broken_gpus(output, words):
    assert look_at_gpus(output, 8).wrong == words


def test_links():
    assert look_at_links(links(), 18) == Findings(["18 NVLinks each"], [])
    assert look_at_links(links(), None) == Findings(["18 NVLinks each"], [])
    assert look_at_links(links((2, 7), (2, 8)), None).wrong == ["GPU 2: 16 active NVLinks, expected 18"]
    # Cards in pairs with bridges: the same links are inactive on all.
    assert look_at_links(links((0, 4), (1, 4), gpus=2), None) == Findings(["17 NVLinks each"], [])
    assert look_at_links(links((0, 4), (1, 4), gpus=2), 18).wrong == [
        "GPU 0: 17 active NVLinks, expected 18",
        "GPU 1: 17 active NVLinks, expected 18",
    ]
    dead = "NVML: Unable to retrieve NVLink information as all links are inActive\n"
    assert look_at_links(dead, 18).wrong == [f"nvidia-smi nvlink: {dead.strip()}, expected 18 NVLinks a GPU"]
    assert look_at_links(dead, None).wrong == []


def test_memory_and_disk(tmp_path):
    meminfo = "MemTotal:       2113421036 kB\nMemFree:        1000 kB\nMemAvailable:   8388608 kB\n"
    assert look_at_memory(meminfo, 8) == Findings(["8 GiB memory"], [])
    assert look_at_memory(meminfo, 8.5).wrong == ["8.0 GiB of memory available, expected 8"]
    assert look_at_disk(tmp_path / "not" / "yet", 0.001).wrong == []
    assert str(tmp_path) in look_at_disk(tmp_path / "not" / "yet", 1e9).wrong[0]


def test_versions_and_clocks():
    first = {"name": "n1", "versions": {"torch": "2.11.0", "vllm": "0.26.0"}, "time": 1000.0}
    assert compare({"versions": first["versions"], "time": 1001.0}, first, 0.1).wrong == []
    assert compare({"versions": first["versions"], "time": 997.0}, first, 0.1).wrong == [
        "its clock differs by 3.0 s from that of n1"
    ]
    assert compare({"versions": first["versions"], "time": 997.0}, first, 1.5).wrong == []  # it was asked slowly
    assert compare({"versions": {"torch": "2.10.0"}, "time": 1000.0}, first, 0.1).wrong == [
        "torch 2.10.0, and 2.11.0 on n1",
        "vllm absent, and 0.26.0 on n1",
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, *arguments: str, name: str = "n1", smi: str | None = None) -> subprocess.Popen[str]:
    """The real command, with an nvidia-smi that prints `smi` and healthy links."""
    tools = folder / name
    tools.mkdir()
    (tools / "links").write_text(links())
    (tools / "query").write_text(smi or HEALTHY)
    (tools / "nvidia-smi").write_text(
        f"#!/bin/sh\ncase $1 in nvlink) cat {tools}/links ;; *) cat {tools}/query ;; esac\n"
    )
    (tools / "nvidia-smi").chmod(0o755)
    return subprocess.Popen(
        [sys.executable, "-m", "treepo_mcore.launch.preflight", "--disk", str(folder), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURMD_NODENAME": name},
    )


def test_the_nodes_meet_and_a_bad_one_is_named(tmp_path):
    where = ["--gpus", "8", "--nvlinks", "18", "--nodes", "3", "--meet", f"127.0.0.1:{free_port()}"]
    smi = [HEALTHY, HEALTHY, HEALTHY.rsplit("\n", 2)[0]]
    nodes = [
        start(tmp_path, *where, "--node", str(node), name=f"n{node + 1}", smi=sample) for node, sample in enumerate(smi)
    ]
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0, 1]
    assert said[0].startswith(
        "preflight n1: ok, 8 x NVIDIA H100 80GB HBM3 (80 GiB), driver 580.82.07, 18 NVLinks each, "
    )
    assert "reached by 2 other nodes" in said[0]
    assert "clock and versions as on n1" in said[1]
    assert said[2] == "preflight n3: FAILED: 7 GPUs, expected 8\n"


def test_a_first_node_that_cannot_be_reached_and_nodes_that_do_not_come(monkeypatch):
    monkeypatch.setattr(preflight, "MEET_SECONDS", 0.2)
    address = f"127.0.0.1:{free_port()}"
    assert preflight.meet(address, 1, 2, "n2").wrong[0].startswith(f"cannot reach {address}: ")
    assert preflight.meet(address, 0, 3, "n1").wrong == ["waited 0.2 s for 2 other nodes, heard none"]


def test_as_a_subcommand(tmp_path):
    command = ["launch", "preflight", "--disk", str(tmp_path), "--disk-gib", "1e9"]
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, command[:-2]).exit_code == 0
