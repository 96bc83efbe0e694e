"""The look at a node: what nvidia-smi prints of healthy and of broken GPUs, memory, disk, clocks, other nodes.

The samples of nvidia-smi were written by hand in its documented format; no machine with eight GPUs was at hand.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treepo_mcore.cli.app import app
from treepo_mcore.launch import preflight
from treepo_mcore.launch.preflight import (
    Findings,
    compare,
    look_at_disk,
    look_at_gpus,
    look_at_infiniband,
    look_at_links,
    look_at_memory,
)


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
    same = {"GPU": "NVIDIA H100 80GB HBM3", "driver": "580.82.07"}
    assert findings == Findings(["8 x NVIDIA H100 80GB HBM3 (80 GiB), driver 580.82.07"], [], same)
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
        (
            HEALTHY.replace(gpu(6), "6, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 4, [Unknown Error]\n"),
            ["GPU 6: [Unknown Error] uncorrected memory errors"],
        ),
        (
            HEALTHY.replace(gpu(0), "0, NVIDIA H100 80GB HBM3, 580.82.07, [N/A], [GPU requires reset], [N/A]\n"),
            ["GPU 0: memory in use: [GPU requires reset]"],
        ),
        (
            HEALTHY.replace(gpu(7), "7, NVIDIA H100 80GB HBM3, 580.82.07, 81559, [Unknown Error], 0\n"),
            ["GPU 7: memory in use: [Unknown Error]"],
        ),
        (
            HEALTHY.replace(gpu(7), "7, NVIDIA H100 80GB HBM3, 580.82.07, 81559, [N/A], 0\n"),
            ["GPU 7: memory in use: [N/A]"],
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


def test_an_nvidia_smi_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "NVIDIA_SMI_SECONDS", 0.2)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = preflight._nvidia_smi(["nvlink", "--status"], lambda status: look_at_links(status, None))
    assert found.wrong == ["nvidia-smi nvlink: no answer in 0.2 s"]


def test_infiniband(tmp_path):
    for adapter, port, state in (
        ("mlx5_0", 1, "4: ACTIVE"),
        ("mlx5_1", 1, "1: DOWN"),
        ("mlx5_2", 1, "4: ACTIVE"),
        ("mlx5_2", 2, "2: INIT"),
        ("mlx5_10", 1, "4: ACTIVE"),
    ):
        folder = tmp_path / adapter / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    assert look_at_infiniband(tmp_path / "none", None) == Findings()
    assert look_at_infiniband(tmp_path, None) == Findings(["3 of 5 InfiniBand ports active"])
    for named, wrong in {
        "mlx5_0": [],
        "mlx5_10,mlx5_2:1": [],
        "^mlx5_0": [],
        "mlx5_2": ["InfiniBand: mlx5_2:2 is INIT"],
        "mlx5_1": ["InfiniBand: mlx5_1:1 is DOWN"],  # and mlx5_10, as NCCL reads it
        "=mlx5_10": [],
        "=mlx5_1,mlx5_0": ["InfiniBand: mlx5_1:1 is DOWN"],
        "mlx5_3": ["InfiniBand: no mlx5_3, expected one of --ib-hca mlx5_3"],
    }.items():
        assert look_at_infiniband(tmp_path, named).wrong == wrong, named


def test_memory_and_disk(tmp_path):
    meminfo = "MemTotal:       2113421036 kB\nMemFree:        1000 kB\nMemAvailable:   8388608 kB\n"
    assert look_at_memory(meminfo, 8) == Findings(["8 GiB memory"], [])
    assert look_at_memory(meminfo, 8.5).wrong == ["8.0 GiB of memory available, expected 8"]
    assert look_at_disk(tmp_path / "not" / "yet", 0.001).wrong == []
    assert str(tmp_path) in look_at_disk(tmp_path / "not" / "yet", 1e9).wrong[0]


def test_versions_and_clocks():
    first = {"name": "n1", "same": {"torch": "2.11.0", "vllm": "0.26.0"}, "time": 1000.0}
    assert compare({"same": first["same"], "time": 1001.0}, first, 0.1).wrong == []
    assert compare({"same": first["same"], "time": 997.0}, first, 0.1).wrong == [
        "its clock differs by 3.0 s from that of n1"
    ]
    assert compare({"same": first["same"], "time": 997.0}, first, 1.5).wrong == []  # it was asked slowly
    assert compare({"same": {"torch": "2.10.0"}, "time": 1000.0}, first, 0.1).wrong == [
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
    # A bad node ends all, or the others' torchrun would wait for it.
    assert [node.returncode for node in nodes] == [1, 1, 1]
    assert said == [
        "preflight n1: FAILED: n3: 7 GPUs, expected 8\n",
        "preflight n2: FAILED: n3: 7 GPUs, expected 8\n",
        "preflight n3: FAILED: 7 GPUs, expected 8\n",
    ]


def test_good_nodes_meet_and_a_stranger_is_ignored(tmp_path):
    port = free_port()
    where = ["--gpus", "8", "--nvlinks", "18", "--nodes", "3", "--meet", f"127.0.0.1:{port}"]
    nodes = [start(tmp_path, *where, "--node", "0", name="n1")]
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"node": 1, "name": "n9"}\n'):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:
                assert nodes[0].poll() is None
                time.sleep(0.1)
    nodes += [start(tmp_path, *where, "--node", str(node), name=f"n{node + 1}") for node in (1, 2)]
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0, 0], said
    assert said[0].startswith(
        "preflight n1: ok, 8 x NVIDIA H100 80GB HBM3 (80 GiB), driver 580.82.07, 18 NVLinks each, "
    )
    assert "reached by 2 other nodes" in said[0]
    assert "clock and versions as on n1" in said[1]


def test_nodes_with_another_driver_are_wrong_on_all(tmp_path):
    where = ["--gpus", "8", "--nodes", "2", "--meet", f"127.0.0.1:{free_port()}"]
    smi = [HEALTHY, HEALTHY.replace("580.82.07", "575.57.08").replace("H100 80GB HBM3", "H200")]
    nodes = [start(tmp_path, *where, "--node", str(n), name=f"n{n + 1}", smi=smi[n]) for n in range(2)]
    said = [node.communicate(timeout=60)[0] for node in nodes]
    wrong = "GPU NVIDIA H200, and NVIDIA H100 80GB HBM3 on n1{} driver 575.57.08, and 580.82.07 on n1\n"
    assert said == ["preflight n1: FAILED: n2: " + wrong.format(","), "preflight n2: FAILED: " + wrong.format(";")]


def test_a_first_node_that_cannot_be_reached_and_nodes_that_do_not_come(monkeypatch):
    monkeypatch.setattr(preflight, "MEET_SECONDS", 0.2)
    address = "127.0.0.1", free_port()
    found = preflight.meet(address, 1, 2, "n2", Findings())
    assert found.wrong[0].startswith(f"cannot reach 127.0.0.1:{address[1]}: ")
    found = preflight.meet(address, 0, 3, "n1", Findings())
    assert found.wrong == ["waited 0.2 s for 2 other nodes, heard none"]


def test_a_port_that_somebody_else_has(monkeypatch):
    """On the first node it is said; others find a stranger behind it."""
    monkeypatch.setattr(preflight, "MEET_SECONDS", 0.2)
    with socket.create_server(("", 0)) as taken:
        address = "127.0.0.1", taken.getsockname()[1]
        found = preflight.meet(address, 0, 2, "n1", Findings())
        assert found.wrong[0].startswith(f"cannot listen on port {address[1]}: ")
        threading.Thread(target=hang_up, args=(taken,), daemon=True).start()
        found = preflight.meet(address, 1, 2, "n2", Findings())
        assert found.wrong[0].startswith(f"cannot reach 127.0.0.1:{address[1]}: ")


def hang_up(taken: socket.socket) -> None:
    """On everyone who comes, until the port is closed."""
    with suppress(OSError):
        while True:
            taken.accept()[0].close()


def test_an_address_without_a_port_is_refused(capsys):
    with pytest.raises(SystemExit):
        preflight.main(["--meet", "n1"])
    assert "expected HOST:PORT, found 'n1'" in capsys.readouterr().err


def test_as_a_subcommand(tmp_path):
    command = ["launch", "preflight", "--disk", str(tmp_path), "--disk-gib", "1e9"]
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, command[:-2]).exit_code == 0
