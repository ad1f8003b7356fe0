"""Web archives as crawlers write them."""

from __future__ import annotations

import io
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

DATE = "2024-03-01T12:00:00Z"


def web_archive(gzip: bool, records: list[tuple[str, str, bytes, dict[str, Any]]]) -> bytes:
    """A WARC file of (type, content type, content, more) records."""
    sink = io.BytesIO()
    writer = WARCWriter(sink, gzip=gzip)
    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "test"}))
    for n, (kind, media, content, more) in enumerate(records):
        http = None
        if kind == "response":
            status = more.get("status", "200 OK")
            http = StatusAndHeaders(status, [("Content-Type", media), *more.get("http", [])], "HTTP/1.1")
        writer.write_record(
            writer.create_warc_record(
                f"http://example.org/{n}",
                kind,
                payload=io.BytesIO(content),
                http_headers=http,
                warc_content_type="application/http; msgtype=response" if http else media,
                warc_headers_dict={"WARC-Date": DATE},
            )
        )
    return sink.getvalue()
