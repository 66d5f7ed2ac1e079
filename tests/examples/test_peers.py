"""Processes that miss each other, played by threads of one: every way to end, and what the others learn."""

import contextlib
import pathlib
import queue
import socket
import sys
import threading

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining.peers import Peers

HEARTBEAT = 30


@pytest.fixture
def run():
    """Three processes that are connected, and for each what it has learned."""
    learned = [queue.Queue() for _ in range(3)]
    peers = [Peers(index, 3, lambda *news, index=index: learned[index].put(news)) for index in range(3)]
    served = peers[0].serve(HEARTBEAT)
    for peer in peers[1:]:
        peer.connect("127.0.0.1", served, HEARTBEAT)
    peers[0].wait(10)
    yield peers, learned, served
    for index in range(3):
        die(peers, index)


def die(peers, index):
    """What the kernel does for a process that is killed; its own threads, alive here, are not to say anything."""
    peers[index]._is_over = True
    for link in list(peers[index]._links.values()):
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_one_that_is_killed_is_missed_by_all(run, killed):
    peers, learned, _ = run
    die(peers, killed)
    for index in {0, 1, 2} - {killed}:
        # Those that the first leaves behind do not know more than that.
        assert learned[index].get(timeout=10) == (killed, 1, "")


@pytest.mark.parametrize("failed", [0, 1])
def test_one_that_fails_says_why(run, failed):
    peers, learned, _ = run
    peers[failed].fail(2, 'no files match "x"\nin two lines')
    for index in {0, 1, 2} - {failed}:
        assert learned[index].get(timeout=10) == (failed, 2, 'no files match "x"\nin two lines')
    die(peers, failed)
    assert all(news.empty() for news in learned)


def test_only_the_first_end_counts(run):
    peers, learned, _ = run
    die(peers, 1)
    assert learned[0].get(timeout=10) == learned[2].get(timeout=10) == (1, 1, "")
    peers[2].fail(1, "a step failed")
    die(peers, 2)
    assert all(news.empty() for news in (learned[0], learned[2]))


def test_all_finish_together_and_nobody_is_missed(run):
    peers, learned, _ = run
    finished = queue.Queue()

    def finish(index):
        peers[index].finish()
        finished.put(index)

    threads = [threading.Thread(target=finish, args=(index,)) for index in range(3)]
    for thread in threads[1:]:
        thread.start()
    with pytest.raises(queue.Empty):
        finished.get(timeout=0.2)
    threads[0].start()
    for thread in threads:
        thread.join(10)
    assert finished.qsize() == 3
    for index in (2, 0, 1):
        die(peers, index)
    assert all(news.empty() for news in learned)


def test_one_that_dies_while_others_wait_for_it(run):
    peers, learned, _ = run
    for index in (0, 2):
        threading.Thread(target=peers[index].finish, daemon=True).start()
    die(peers, 1)
    assert learned[0].get(timeout=10) == learned[2].get(timeout=10) == (1, 1, "")


@pytest.mark.parametrize(
    "text", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guessed", "index": 1}\n', b"[1]\n", b"7\n"]
)
def test_strangers_end_nothing(text):
    learned = queue.Queue()
    peers = [Peers(index, 2, lambda *news: learned.put(news)) for index in range(2)]
    served = peers[0].serve(HEARTBEAT)
    with socket.create_connection(("127.0.0.1", int(served.split()[0])), timeout=10) as link:
        link.sendall(text)
        if text.endswith(b"\n"):
            assert link.recv(1) == b""  # it is shown the door
    peers[1].connect("127.0.0.1", served, HEARTBEAT)
    peers[0].wait(10)
    assert learned.empty()
    peers[1].fail(3, "still told")
    assert learned.get(timeout=10) == (1, 3, "still told")
    for index in range(2):
        die(peers, index)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(served.split()[0])), timeout=10)


def test_those_that_do_not_come_are_named():
    peers = Peers(0, 3, lambda *_: None)
    other = Peers(2, 3, lambda *_: None)
    other.connect("127.0.0.1", peers.serve(HEARTBEAT), HEARTBEAT)
    with pytest.raises(OSError, match=r"processes \[1\] have not connected in 0.3 seconds"):
        peers.wait(0.3)
    die([peers, None, other], 0)
    die([peers, None, other], 2)


def test_one_alone_waits_for_nobody():
    learned = queue.Queue()
    finishing = threading.Thread(target=Peers(0, 1, lambda *news: learned.put(news)).finish, daemon=True)
    finishing.start()
    finishing.join(10)
    assert not finishing.is_alive() and learned.empty()
