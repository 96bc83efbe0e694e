"""A look at a node before the trainer starts there: `python -m treepo_mcore.launch.preflight`, once on every node.

Each node prints one line that begins with its name. A node that will not do says why and ends with status 1. The
standard library is enough, so this takes a second and runs before anything heavy is loaded. With `--meet` the nodes
also reach the first one over the network, compare clocks, versions and GPUs with it, and hear from it what is wrong
with any of them: then all end with status 1.
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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from treepo_mcore.system.environment import package_versions

GIB = 2**30
QUERY = ("index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
BUSY_MIB = 2048  # a GPU that nobody uses holds a few hundred MiB of driver and fabric state
NVIDIA_SMI_SECONDS = 45.0  # a broken driver or GPU can make it hang; twice that is still in time for the meeting
SHARED_MEMORY_GIB = 1  # NCCL's and torch's segments; a container's default of 64 MB is too little
MEET_SECONDS = 120.0  # nodes start at different times
STRANGER_SECONDS = 5.0  # by which one who connects has said what nodes say
LINE = 1 << 20  # longest, in characters
SKEW_SECONDS = 2.0  # beyond this, logs cannot be laid side by side and lease times of file systems suffer


@dataclass
class Findings:
    """What was seen on a node, and what is wrong with it."""

    seen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)  # what has to be the same on all nodes

    def add(self, other: Findings) -> None:
        """Take another look's findings in."""
        self.seen += other.seen
        self.wrong += other.wrong
        self.same |= other.same


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
        if not used.isdigit():  # "[GPU requires reset]", "[Unknown Error]", ...
            findings.wrong.append(f"GPU {index}: memory in use: {used}")
        elif int(used) > BUSY_MIB:
            findings.wrong.append(f"GPU {index}: {used} MiB in use; does another job or a left-over process run?")
        if errors not in ("0", "[N/A]"):  # "[N/A]" where ECC is off
            findings.wrong.append(f"GPU {index}: {errors} uncorrected memory errors")
    if rows:
        _, kind, driver, memory, _, _ = rows[0]
        size = f" ({int(memory) / 1024:.0f} GiB)" if memory.isdigit() else ""
        findings.seen.append(f"{len(rows)} x {kind}{size}, driver {driver}")
        findings.same |= {"GPU": kind, "driver": driver}
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


def look_at_infiniband(adapters: Path, named: str | None) -> Findings:
    """From ADAPTER/ports/PORT/state below /sys/class/infiniband: the ports that `named` says are ACTIVE.

    named: as NCCL_IB_HCA, a list of ADAPTER or ADAPTER:PORT; a name stands for all that begin with it, or, with "="
    before the list, for itself. Ports that are not named may be down: no cable need be there.
    """
    states = {
        (file.parents[2].name, file.parent.name): file.read_text().split(":")[-1].strip()  # "4: ACTIVE"
        for file in sorted(adapters.glob("*/ports/*/state"))
    }
    active = sum(state == "ACTIVE" for state in states.values())
    findings = Findings([f"{active} of {len(states)} InfiniBand ports active"] if states else [])
    if named is None or named.startswith("^"):  # "^": those that are not to be used
        return findings
    exact = named.startswith("=")
    for name in named.removeprefix("=").split(","):
        wanted, _, wanted_port = name.partition(":")
        found = {
            f"{adapter}:{port}": state
            for (adapter, port), state in states.items()
            if (adapter == wanted if exact else adapter.startswith(wanted)) and wanted_port in ("", port)
        }
        if not found:
            findings.wrong.append(f"InfiniBand: no {name}, expected one of --ib-hca {named}")
        findings.wrong += [f"InfiniBand: {port} is {state}" for port, state in found.items() if state != "ACTIVE"]
    return findings


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


def compare(mine: dict[str, Any], first: dict[str, Any], trip: float) -> Findings:
    """What has to be the same here and on the first node, and the clocks; `trip` seconds went by while it answered."""
    findings = Findings()
    for name in sorted(mine["same"] | first["same"]):
        here, there = (side["same"].get(name, "absent") for side in (mine, first))
        if here != there:
            findings.wrong.append(f"{name} {here}, and {there} on {first['name']}")
    skew = abs(mine["time"] - first["time"])
    if skew > SKEW_SECONDS + trip:
        findings.wrong.append(f"its clock differs by {skew:.1f} s from that of {first['name']}")
    elif not findings.wrong:
        findings.seen.append(f"clock and versions as on {first['name']}")
    return findings


def meet(address: tuple[str, int], node: int, nodes: int, name: str, mine: Findings) -> Findings:
    """What a node learns from the others; `mine` is what it found itself. address: host and port of the first node.

    The first node (`node` 0) listens, the others come. Each compares itself with the first and says what is wrong with
    it; when all are in, the first answers with what is wrong anywhere.
    """
    host, port = address
    me = {"name": name, "same": mine.same}
    if node == 0:
        try:
            return _receive(port, nodes - 1, me, mine.wrong)
        except OSError as error:
            return Findings(wrong=[f"cannot listen on port {port}: {error}"])
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            with socket.create_connection(address, timeout=10) as connection:
                return _report(connection, me | {"node": node}, mine.wrong)
        except (OSError, ValueError) as error:  # not there yet, or it ended in mid-sentence
            if time.monotonic() > deadline:
                return Findings(wrong=[f"cannot reach {host}:{port}: {error}"])
            time.sleep(0.5)


def _report(connection: socket.socket, me: dict[str, Any], wrong: list[str]) -> Findings:
    stream = connection.makefile("rw")
    begin = time.monotonic()
    _say(stream, me)
    first = _hear(stream, "name", "same", "time")
    findings = compare(me | {"time": time.time()}, first, time.monotonic() - begin)
    _say(stream, {"wrong": wrong + findings.wrong})
    connection.settimeout(MEET_SECONDS + 10)  # until the last one is in
    findings.wrong += _elsewhere(_hear(stream, "wrong")["wrong"], me["name"])
    return findings


def _receive(port: int, others: int, me: dict[str, Any], wrong: list[str]) -> Findings:
    findings = Findings()
    came: dict[int, tuple[str, list[str], TextIO]] = {}  # by the node's number
    deadline = time.monotonic() + MEET_SECONDS
    with socket.create_server(("", port), backlog=max(others, 1)) as listening, ExitStack() as connections:
        while len(came) < others and (left := deadline - time.monotonic()) > 0:
            listening.settimeout(left)
            try:
                connection, _ = listening.accept()
                stream: TextIO = connections.enter_context(connection).makefile("rw")
                connection.settimeout(STRANGER_SECONDS)
                said = _hear(stream, "node", "name")
                _say(stream, me | {"time": time.time()})
                came[said["node"]] = said["name"], _hear(stream, "wrong")["wrong"], stream
            except (OSError, ValueError):
                continue  # a port scanner, or a node that broke off and will come again
        names = [name for name, _, _ in came.values()]
        if len(came) < others:
            heard = f"only {', '.join(names)}" if came else "none"
            findings.wrong.append(f"waited {MEET_SECONDS:g} s for {others} other nodes, heard {heard}")
        else:
            findings.seen.append(f"reached by {others} other node{'s' if others > 1 else ''}")
        everywhere = {name: its for name, its, _ in came.values() if its}
        if wrong + findings.wrong:
            everywhere[me["name"]] = wrong + findings.wrong
        for _, _, node in came.values():
            with suppress(OSError):  # one that is gone by now has ended its script
                _say(node, {"wrong": everywhere})
    findings.wrong += _elsewhere(everywhere, me["name"])
    return findings


def _say(stream: TextIO, words: dict[str, Any]) -> None:
    stream.write(json.dumps(words) + "\n")
    stream.flush()


def _hear(stream: TextIO, *keys: str) -> dict[str, Any]:
    """A line with an object that has `keys`; raises `ValueError` for anything else, such as nothing at all."""
    line = stream.readline(LINE)
    words = json.loads(line or "null")
    if not isinstance(words, dict) or not words.keys() >= set(keys):
        raise ValueError(f"expected {', '.join(keys)}, heard {line[:80]!r}")
    return words


def _elsewhere(wrong: dict[str, list[str]], name: str) -> list[str]:
    return [f"{other}: {', '.join(texts)}" for other, texts in sorted(wrong.items()) if other != name]


def look(options: argparse.Namespace) -> Findings:
    """Everything about this node."""
    findings = Findings()
    if options.gpus:
        query = [f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
        findings.add(_nvidia_smi(query, lambda output: look_at_gpus(output, options.gpus)))
        findings.add(_nvidia_smi(["nvlink", "--status"], lambda status: look_at_links(status, options.nvlinks)))
        findings.add(look_at_infiniband(Path("/sys/class/infiniband"), options.ib_hca))
        findings.add(look_at_disk(Path("/dev/shm"), SHARED_MEMORY_GIB))
    findings.add(look_at_memory(Path("/proc/meminfo").read_text(), options.memory_gib))
    findings.add(look_at_disk(options.disk, options.disk_gib))
    found = package_versions()
    findings.same |= found
    findings.seen.append(f"torch {found.get('torch', 'absent')}")
    if "torch" not in found:
        findings.wrong.append(f"no torch in {sys.executable}")
    return findings


def _nvidia_smi(arguments: list[str], look: Callable[[str], Findings]) -> Findings:
    """What `look` makes of what it prints on both streams, errors included."""
    command = ["nvidia-smi", *arguments]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        return look("not installed")
    try:
        return look("\n".join(process.communicate(timeout=NVIDIA_SMI_SECONDS)))
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting for its end: one that hangs in the driver has none
        return Findings(wrong=[f"nvidia-smi {arguments[0]}: no answer in {NVIDIA_SMI_SECONDS:g} s"])


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, found {text!r}")
    return host, int(port)


def node_name() -> str:
    """As Slurm calls it, or the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def main(arguments: list[str]) -> int:
    """Look, print one line; the exit status says whether the node will do."""
    parser = argparse.ArgumentParser(prog="preflight", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=0, help="expected on this node; 0: do not look")
    parser.add_argument("--nvlinks", type=int, help="active ones expected on each GPU; default: all have as many")
    parser.add_argument("--ib-hca", help="InfiniBand adapters that must be active, as NCCL_IB_HCA; default: none must")
    parser.add_argument("--disk", type=Path, default=Path(), help="where the run writes")
    parser.add_argument("--disk-gib", type=float, default=0, help="free there, at least")
    parser.add_argument("--memory-gib", type=float, default=0, help="of host memory available, at least")
    parser.add_argument("--meet", type=_address, metavar="HOST:PORT", help="of the first node")
    parser.add_argument("--node", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args(arguments)
    name = node_name()
    findings = look(options)
    if options.meet and options.nodes > 1:
        findings.add(meet(options.meet, options.node, options.nodes, name, findings))
    if findings.wrong:
        print(f"preflight {name}: FAILED: {'; '.join(findings.wrong)}", flush=True)
        return 1
    print(f"preflight {name}: ok, {', '.join(findings.seen)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
