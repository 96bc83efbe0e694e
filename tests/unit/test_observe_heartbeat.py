"""A node that is silent, gone or done, seen from another; the processes themselves run in tests/launch."""

import os
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from treepo_mcore.config import CommConfig
from treepo_mcore.system import heartbeat
from treepo_mcore.system.heartbeat import ALIVE, DONE, _join, _serve, _Watch, listen_to_nodes


@pytest.fixture
def watch(monkeypatch):
    """A watch of node n2, the other end of its connection, and the pipe from its own rank."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    yield _Watch({ours: "n2"}, read, 0.3), theirs, write
    for end in (ours, theirs):
        end.close()
    os.close(read)


def test_a_silent_node_is_lost(watch):
    assert watch[0].run() == "node n2 has been silent for 0.3 s"
    assert watch[1].recv(100).startswith(ALIVE)  # and was told that this one lives


def test_a_node_that_ends_without_being_done_is_lost_at_once(watch):
    watch[1].close()
    assert watch[0].run() == "node n2 has ended without being done"


def test_beats_keep_a_node_and_done_lets_it_go(watch):
    watching, theirs, write = watch

    def life():
        for _ in range(10):
            theirs.send(ALIVE)
            time.sleep(0.05)
        theirs.send(DONE)
        time.sleep(0.4)  # longer than the silence that is allowed
        os.write(write, DONE)

    thread = threading.Thread(target=life)
    thread.start()
    assert watching.run() is None
    thread.join()


def test_done_is_passed_on(watch):
    watching, theirs, write = watch
    os.write(write, DONE)
    assert watching.run() is None
    assert theirs.recv(100).endswith(DONE)


def test_a_rank_that_died_takes_the_watch_along(watch):
    watching, _, write = watch
    os.close(write)
    with pytest.raises(SystemExit):
        watching.run()


@pytest.mark.parametrize(("local", "rank"), [("4", 0), ("2", 1)])
def test_one_node_or_not_its_first_rank(monkeypatch, local, rank):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert listen_to_nodes(rank, 4, store=None, limits=CommConfig()) is None


def test_what_is_heard_is_not_answered(watch):
    """Two nodes that answered each other's bytes would do nothing else."""
    watching, theirs, write = watch

    def talk():
        for _ in range(200):
            theirs.send(ALIVE)
            time.sleep(0.001)
        os.write(write, DONE)

    thread = threading.Thread(target=talk)
    thread.start()
    begin = time.monotonic()
    assert watching.run() is None
    thread.join()
    beats = len(theirs.recv(10000)) - len(DONE)
    assert 1 <= beats <= 2 + (time.monotonic() - begin) / 0.05


def test_strangers_are_not_taken_for_nodes(monkeypatch):
    """One that says something else, one that says nothing, one that hangs up at once; then the node."""
    monkeypatch.setattr(heartbeat, "GREETING_SECONDS", 0.2)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    said: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(heartbeat, "print", lambda text, flush: said.put(text), raising=False)
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(_serve, 1, 10.0)
        meeting = said.get(timeout=10)
        where = ("127.0.0.1", int(meeting.partition("/")[0]))
        strangers = [socket.create_connection(where) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n")
        strangers[2].close()
        joined = _join(f"127.0.0.1:{meeting}", 10.0)
        heard = serving.result(timeout=10)
    assert list(heard.values()) == ["n2"]
    assert list(joined.values()) == ["127.0.0.1"]
    for end in (*strangers, *heard, *joined):
        end.close()
