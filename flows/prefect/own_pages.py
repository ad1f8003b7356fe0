"""Requests of a browser that a server takes: those of its own pages, under a name of its own.

Neither Prefect nor MLflow asks who one is, and a page of any site can have a browser send requests to this machine. A
browser says in ``Origin`` whose page it shows, and in ``Host`` by which name it found the server: a foreign origin is a
foreign page, a foreign name one that was bent to this address (DNS rebinding). Clients that are no browsers send no
``Origin``. MLflow checks both by itself (``MLFLOW_SERVER_ALLOWED_HOSTS``); Prefect's server does here.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import psutil

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def own_names(host: str) -> list[str]:
    """Names and addresses by which a server that listens on ``host`` is reached, as a URL has them."""
    names = [*LOOPBACK]
    if host in ("0.0.0.0", "::"):
        names += [socket.gethostname(), socket.getfqdn(), *(in_url(address) for address in own_addresses())]
    else:
        names.append(in_url(host))
    return list(dict.fromkeys(names))


def own_addresses() -> list[str]:
    """IP addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    return [entry.address.partition("%")[0] for entry in entries if entry.family in families]


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class OwnPages:
    """An ASGI application that answers 403 to what a browser sends for a page that is not its own.

    Args:
        app: what takes all other requests.
        names: by which the server is reached; numbers are always taken, for no name is bent to them.
        origins: of pages that are its own although they are served elsewhere (a proxy), besides ``http(s)://Host``.
    """

    def __init__(self, app: Any, names: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        elsewhere = [urlsplit(origin).hostname or "" for origin in self._origins]
        self._names = {name.lower().strip("[]") for name in [*names, *elsewhere]}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if not refusal:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refusal})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"{refusal}\n".encode()})

    def _refusal(self, scope: Any) -> str:
        """Why a request is not taken; empty where it is."""
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_own_name(host):
            return f"this server is not known as {host!r}: start it with --allow-host NAME"
        own = origin is None or origin in self._origins or origin in (f"http://{host}", f"https://{host}")
        return "" if own else f"requests of the pages of {origin} are not taken"

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or is_address(name)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
