"""Prefect's server as llmill starts it: it takes a browser's requests from its own pages only
(`flows.prefect.own_pages`), and on SQLite writers wait for one another.

Whoever can send it requests can have its workers do things, and its own default lets the pages of all sites do so.

Prefect's own transactions take SQLite's write lock only when they first write, which SQLite refuses where another one
has written since they began to read. The server then answers 503, and its clients ask again two seconds later; and with
four clients that write all the time, everything stands still until a lock times out, a minute later. A transaction that
takes the lock as it begins waits for some milliseconds instead.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import uvicorn
from prefect.server.api.server import create_app
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config
from prefect.server.utilities.database import get_dialect
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_API_KEEPALIVE_TIMEOUT,
    PREFECT_SERVER_API_WEBSOCKET_PING_INTERVAL,
    PREFECT_SERVER_API_WEBSOCKET_PING_TIMEOUT,
    PREFECT_SERVER_CORS_ALLOWED_ORIGINS,
    PREFECT_SERVER_LOGGING_LEVEL,
    PREFECT_UI_API_URL,
    temporary_settings,
)
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from flows.prefect.own_pages import OwnPages, own_names


class OneWriter(AioSqliteConfiguration):
    """A SQLite database each of whose transactions begins as ``BEGIN IMMEDIATE``; a session without one only reads."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with session.begin() as transaction:
            # How to begin is a variable of the context. What is opened or started within this block would inherit it,
            # and wait for a lock that we hold, or hold it for as long as it reads.
            token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
            try:
                await session.connection()
            finally:
                SQLITE_BEGIN_MODE.reset(token)
            yield transaction


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m flows.prefect.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--allow-host", action="append", default=[], help="another name of this server")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    names = [*own_names(options.host), *options.allow_host]
    origins = [f"http://{name}:{options.port}" for name in names]
    if (given := PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value()) != "*":  # that is Prefect's default
        origins += [origin.strip() for origin in given.split(",")]
    ours: dict[Any, str] = {PREFECT_SERVER_CORS_ALLOWED_ORIGINS: ",".join(origins)}
    if not {"PREFECT_UI_API_URL", "PREFECT_SERVER_UI_API_URL"} & os.environ.keys():
        ours[PREFECT_UI_API_URL] = "/api"  # the pages ask under the name and port by which they were opened
    database = PREFECT_API_DATABASE_CONNECTION_URL.value()
    with ExitStack() as stack:
        if get_dialect(database).name == "sqlite":
            stack.enter_context(temporary_database_config(OneWriter(connection_url=database)))
        stack.enter_context(temporary_settings(ours))
        app = create_app(final=True)
        gc.freeze()  # what is there now stays: to look for garbage in it would hold requests up for 0.3 s each time
        uvicorn.run(
            OwnPages(app, names, origins),
            host=options.host,
            port=options.port,
            timeout_keep_alive=PREFECT_SERVER_API_KEEPALIVE_TIMEOUT.value(),
            ws_ping_interval=PREFECT_SERVER_API_WEBSOCKET_PING_INTERVAL.value(),
            ws_ping_timeout=PREFECT_SERVER_API_WEBSOCKET_PING_TIMEOUT.value(),
            log_level=PREFECT_SERVER_LOGGING_LEVEL.value().lower(),
        )


if __name__ == "__main__":
    main()
