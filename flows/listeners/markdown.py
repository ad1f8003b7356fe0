"""Text of people within Markdown that MLflow's and Prefect's pages show: it stays text, whatever is in it."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
TAGS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def plain(text: str) -> str:
    """``text`` on one line, so that it is read as it is: no emphasis, link, heading or HTML begins in it."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split())).translate(TAGS)


def code(text: str) -> str:
    """``text`` on one line as code, between more backticks than it holds in a row."""
    text = " ".join(text.split("\n"))
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, gap = "`" * (longest + 1), " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{gap}{text}{gap}{fence}"


def link(text: str, address: str) -> str:
    """``text`` that leads to an address, whatever is in both."""
    safe = address.replace("(", "%28").replace(")", "%29").replace(" ", "%20")
    return f"[{plain(text)}](<{safe}>)" if "<" not in safe and ">" not in safe else plain(text)
