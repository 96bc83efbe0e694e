"""Nodes hear each other; when one falls silent, the others end their ranks instead of waiting in a collective.

Collectives cannot tell a slow peer from a lost one, so their timeouts are as long as the longest honest wait. Here
one small process a node exchanges a byte a second with the first node's, outside the trainer's interpreter: no lock
that a long call holds delays it. It imports the standard library only. A rank that ends by an error takes its node's
process along, and the other nodes notice that too.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo_mcore.system.environment import deaf_children

if TYPE_CHECKING:  # the process itself imports the standard library only
    from treepo_mcore.config import CommConfig

GRACE_SECONDS = 5.0  # for the ranks' own errors to come first
LAUNCHER_SECONDS = 15.0  # for torchrun to end by itself once its ranks are gone
BEAT_SECONDS = 1.0
GREETING_SECONDS = 5.0  # for a connection to say who it is
KEY = "treepo/heartbeat"  # in the store: where the first node is heard
ALIVE, DONE = b".", b"D"


class Heartbeat:
    """The process of this node, for as long as the trainer runs. Only the first rank of a node makes one."""

    def __init__(self, address: str | None, nodes: int, limits: CommConfig) -> None:
        """address: host:port/word of the first node's heartbeat; None on that node itself, which hears `nodes` - 1."""
        where = ["--join", address] if address else ["--serve", str(nodes - 1)]
        where += [str(limits.silence_seconds), str(limits.init_timeout_seconds)]
        with deaf_children():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "treepo_mcore.system.heartbeat", *where],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        assert self.process.stdout is not None
        # On the first node port/word: where it listens, and what the others say there before their names.
        self.meeting = self.process.stdout.readline().decode().strip()
        if not self.meeting:
            raise RuntimeError(f"the heartbeat of node {socket.gethostname()} could not start")

    def close(self) -> None:
        """The run is over on this node: the others need not hear it any more."""
        assert self.process.stdin is not None
        self.process.stdin.write(DONE)
        self.process.stdin.close()
        self.process.wait()


def listen_to_nodes(rank: int, world: int, store: Any, limits: CommConfig) -> Heartbeat | None:
    """Start the heartbeat on the first rank of each node, where torchrun or the batch script tells of several nodes.

    store: of torch.distributed, through which the first node says where it listens.
    """
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if on_node == world or rank % on_node:
        return None
    if rank == 0:
        heartbeat = Heartbeat(None, world // on_node, limits)
        store.set(KEY, heartbeat.meeting)
        return heartbeat
    return Heartbeat(f"{os.environ['MASTER_ADDR']}:{store.get(KEY).decode()}", world // on_node, limits)


class _Watch:
    """What runs in the process."""

    def __init__(self, sockets: dict[socket.socket, str], rank: int, silence: float) -> None:
        """sockets: with the names of the nodes at their other ends. rank: file descriptor of the pipe from the rank.

        silence: seconds without a byte from a node; then it is lost.
        """
        self.silence = silence
        self.names = dict(sockets)
        self.heard = dict.fromkeys(sockets, time.monotonic())
        self.selector = selectors.DefaultSelector()
        self.selector.register(rank, selectors.EVENT_READ)
        for other in sockets:
            other.setblocking(False)
            self.selector.register(other, selectors.EVENT_READ)

    def run(self) -> str | None:
        """Until this node's rank is done (None), or another node is lost: then what to say.

        Ends the process when the rank has ended without being done: the others hear no more of this node.
        """
        beat = time.monotonic()  # the next one is due
        while True:
            for key, _ in self.selector.select(max(0.0, beat - time.monotonic())):
                if not isinstance(key.fileobj, socket.socket):
                    if os.read(key.fd, 1) == DONE:
                        self._send(DONE)
                        return None
                    sys.exit(1)
                elif reason := self._read(key.fileobj):
                    return reason
            now = time.monotonic()
            for other, last in self.heard.items():
                if now - last > self.silence:
                    return f"node {self.names[other]} has been silent for {self.silence:g} s"
            if now >= beat:  # and not whenever something was heard: that would be answered, for ever
                self._send(ALIVE)
                beat = now + BEAT_SECONDS

    def _read(self, other: socket.socket) -> str | None:
        try:
            received = other.recv(4096)
        except OSError as error:
            return f"node {self.names[other]} is lost: {error}"
        if DONE in received:
            del self.heard[other]
            self.selector.unregister(other)
        elif not received:
            return f"node {self.names[other]} has ended without being done"
        else:
            self.heard[other] = time.monotonic()
        return None

    def _send(self, what: bytes) -> None:
        for other in self.heard:
            try:
                other.send(what)
            except OSError:  # full or closed: reading tells which, and how long ago it was heard
                continue


def _serve(others: int, patience: float) -> dict[socket.socket, str]:
    """Wait for the other nodes. Who does not know the word is none of them: scanners knock at every port.

    patience: seconds from one to the next; they check their engines before, some more slowly than others.
    """
    word = secrets.token_hex(16)
    listening = socket.create_server(("", 0), backlog=max(others, 1))
    deadline = time.monotonic() + patience
    print(f"{listening.getsockname()[1]}/{word}", flush=True)
    connected: dict[socket.socket, str] = {}
    while len(connected) < others:
        listening.settimeout(max(deadline - time.monotonic(), 0.001))
        other, _ = listening.accept()
        said, _, name = _greeting(other).partition(" ")
        if said == word:
            connected[other] = name
            deadline = time.monotonic() + patience
        else:
            other.close()
    return connected


def _greeting(other: socket.socket) -> str:
    """The first line, or nothing where none comes."""
    other.settimeout(GREETING_SECONDS)
    try:
        return other.makefile("r", errors="replace").readline(1000).strip()
    except OSError:
        return ""


def _join(address: str, patience: float) -> dict[socket.socket, str]:
    where, _, word = address.partition("/")
    host, _, port = where.rpartition(":")
    first = socket.create_connection((host, int(port)), timeout=patience)
    first.sendall(f"{word} {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}\n".encode())
    print("joined", flush=True)
    return {first: host}


def _end_node(rank: int, launcher: Path) -> None:
    """Under Slurm, and where torchrun may restart its ranks, the launcher sees to the rest when one rank is gone.

    Otherwise all ranks of torchrun are ended here, and torchrun too when it does not follow: its agent hangs where its
    own store was on the lost node.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        if os.getppid() == rank:
            os.kill(rank, signal.SIGKILL)
        return
    for child in (launcher / "task" / launcher.name / "children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(LAUNCHER_SECONDS)
    if launcher.exists():
        print("error: torchrun does not end, ending it", file=sys.stderr, flush=True)
        os.kill(int(launcher.name), signal.SIGKILL)


def main() -> None:
    """`--serve OTHERS` on the first node, `--join HOST:PORT/WORD` on the others, then the seconds of silence and of
    patience; the rank is the parent process."""
    rank = os.getppid()
    launcher = Path("/proc") / Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]
    option, value = sys.argv[1:3]
    silence, patience = map(float, sys.argv[3:])
    try:
        others = _serve(int(value), patience) if option == "--serve" else _join(value, patience)
        reason = _Watch(others, sys.stdin.fileno(), silence).run()
    except TimeoutError:
        reason = f"after {patience:g} s not all nodes can be heard"
    if reason is None:
        return
    time.sleep(GRACE_SECONDS)
    if launcher.exists():
        print(f"error: {reason}; ending the ranks of this node", file=sys.stderr, flush=True)
        _end_node(rank, launcher)


if __name__ == "__main__":
    main()
