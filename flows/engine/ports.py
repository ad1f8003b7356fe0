"""Addresses on this machine, and whether something answers there."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request

import psutil

from data_pipeline.core.errors import UserError


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, ValueError, urllib.error.URLError):
        return False


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on ``host``."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def listener(host: str, port: int) -> str:
    """Who listens on a port, as far as the system reports; empty where nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return ""
        except PermissionError:
            return "the system: it is not allowed to you"
        except OSError as error:
            if isinstance(error, socket.gaierror):
                raise UserError(f"--host {host}: {error.strerror}") from None
    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            listens = connection.status == psutil.CONN_LISTEN and address and address.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass
    return "another process"


GIVEN_SECONDS = 5


def answers_soon(url: str) -> bool:
    """Whether a server answers now or in a few seconds; it may just be starting again."""
    deadline = time.monotonic() + GIVEN_SECONDS
    while not answers(url):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def answers(url: str | None) -> bool:
    """Whether something speaks HTTP at this address, if there is one; it may well ask who we are first."""
    if not url:
        return False
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError, http.client.HTTPException):
        return False


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
