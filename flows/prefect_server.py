"""Prefect's server as llmill starts it: on SQLite, writers wait for one another.

Prefect's own transactions take SQLite's write lock only when they first write, which SQLite refuses where another one
has written since they began to read. The server then answers 503, and its clients ask again two seconds later; and with
four clients that write all the time, everything stands still until a lock times out, a minute later. A transaction that
takes the lock as it begins waits for some milliseconds instead.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager

import uvicorn
from prefect.server.api.server import create_app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config
from prefect.server.utilities.database import get_dialect
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_API_KEEPALIVE_TIMEOUT,
    PREFECT_SERVER_API_WEBSOCKET_PING_INTERVAL,
    PREFECT_SERVER_API_WEBSOCKET_PING_TIMEOUT,
    PREFECT_SERVER_LOGGING_LEVEL,
)
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class OneWriter(AioSqliteConfiguration):
    """A SQLite database each of whose transactions begins as ``BEGIN IMMEDIATE``."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    database = PREFECT_API_DATABASE_CONNECTION_URL.value()
    with ExitStack() as stack:
        if get_dialect(database).name == "sqlite":
            stack.enter_context(temporary_database_config(OneWriter(connection_url=database)))
        app = create_app(final=True)
        gc.freeze()  # what is there now stays: to look for garbage in it would hold requests up for 0.3 s each time
        uvicorn.run(
            app,
            host=options.host,
            port=options.port,
            timeout_keep_alive=PREFECT_SERVER_API_KEEPALIVE_TIMEOUT.value(),
            ws_ping_interval=PREFECT_SERVER_API_WEBSOCKET_PING_INTERVAL.value(),
            ws_ping_timeout=PREFECT_SERVER_API_WEBSOCKET_PING_TIMEOUT.value(),
            log_level=PREFECT_SERVER_LOGGING_LEVEL.value().lower(),
        )


if __name__ == "__main__":
    main()
