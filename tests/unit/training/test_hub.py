"""The hub alone, with ranks that are connections of the test: strangers, losses, stalls, the first error."""

import json
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from typing import Any

import pytest

from megacm3.config import WatchdogConfig
from megacm3.training.hub import GRACE, Hub

KEY = b"secret"


@pytest.fixture
def ranks() -> Iterator[list[Connection]]:
    """Two ranks that have said hello, after three strangers, one of which stays and says nothing."""
    hub = Hub(2, KEY, WatchdogConfig(warn=0.2, timeout=2.0))
    address = ("127.0.0.1", hub.port)
    socket.create_connection(address).close()
    with socket.create_connection(address) as stranger, socket.create_connection(address):
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        found = [arrive(address, rank) for rank in range(2)]
        yield found
    for connection in found:
        connection.close()
    hub.join(10)


def arrive(address: tuple[str, int], rank: int) -> Connection:
    connection = Client(address, authkey=KEY)
    say(connection, kind="hello", rank=rank, host="here", pid=10 + rank)
    return connection


def say(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def beat(connection: Connection, phase: str, *, waits: bool, since: float = 0.0) -> None:
    say(connection, kind="beat", step=3, phase=phase, since=since, waits=waits)


def verdict(connection: Connection, seconds: float = 10.0) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if connection.poll(0.1):
            message = json.loads(connection.recv_bytes())
            if message["kind"] == "verdict":
                return message["verdict"]
    raise AssertionError("no verdict")


def test_a_rank_that_ends_is_named_with_its_last_place(ranks: list[Connection]) -> None:
    beat(ranks[1], "backward", waits=False)
    time.sleep(0.3)
    ranks[1].close()
    found = verdict(ranks[0])
    assert found["code"] == 6 and found["speaker"] == 0
    assert found["text"].startswith("rank 1 (here, process 11) was lost") and "backward of step 3" in found["text"]


def test_the_first_error_wins_over_the_collectives_that_it_breaks(ranks: list[Connection]) -> None:
    say(ranks[0], kind="error", code=1, text="Connection reset by peer", network=True, step=3, phase="forward")
    time.sleep(GRACE / 4)
    say(ranks[1], kind="error", code=3, text="a token is no id", network=False, step=3, phase="data")
    for rank in ranks:
        found = verdict(rank)
        assert (found["code"], found["text"], found["origin"]) == (3, "a token is no id", 1)


def test_a_broken_collective_alone_is_a_lost_peer(ranks: list[Connection]) -> None:
    say(ranks[1], kind="error", code=1, text="Connection reset by peer", network=True, step=3, phase="forward")
    found = verdict(ranks[0])
    assert found["code"] == 6 and "rank 1 (here, process 11) lost its connection" in found["text"]


def test_who_waits_is_not_the_one_that_stalls(ranks: list[Connection]) -> None:
    for seconds in range(4):
        beat(ranks[0], "backward", waits=True, since=seconds)
        beat(ranks[1], "backward", waits=False, since=seconds)
        time.sleep(0.1)
    found = verdict(ranks[0])
    assert found["code"] == 6 and found["stacks"]
    assert found["text"].startswith("rank 1 (here, process 11) is in backward of step 3 for 3 s")


def test_a_silent_rank_is_lost(ranks: list[Connection]) -> None:
    for _ in range(40):
        beat(ranks[0], "forward", waits=False)
        if ranks[0].poll(0.1):
            message = json.loads(ranks[0].recv_bytes())
            if message["kind"] == "verdict":
                break
    assert (
        message["verdict"]["code"] == 6 and "rank 1 (here, process 11) has said nothing" in message["verdict"]["text"]
    )


def test_a_rank_that_never_comes_is_named() -> None:
    hub = Hub(4, KEY, WatchdogConfig(timeout=2.0))
    here = [arrive(("127.0.0.1", hub.port), rank) for rank in (0, 2)]
    found = verdict(here[0])
    assert found["code"] == 6 and found["text"].startswith("of 4 ranks these did not connect to rank 0")
    assert found["text"].endswith(": 1, 3")
    for connection in here:
        connection.close()
    hub.join(10)
    with pytest.raises(OSError):  # who comes later does not wait either
        arrive(("127.0.0.1", hub.port), 1)
