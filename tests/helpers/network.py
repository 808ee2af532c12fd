"""A machine without a network, where each attempt to reach one is noted."""
import socket

import pytest


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let every connection and every look-up of a name fail; returns the list that grows by each attempt."""
    attempts: list[object] = []

    def refuse(*asked, **how):
        attempts.append(asked[1:] or asked)
        raise OSError("there is no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"),
                        (socket, "create_connection")):
        monkeypatch.setattr(owner, name, refuse)
    return attempts
