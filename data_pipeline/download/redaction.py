"""Redaction of addresses and of what others report of them: nothing secret may be logged or kept."""

from __future__ import annotations

import os
import re

SECRETS = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL", "CONNECTION_STRING", "SAS", "FSSPEC_")
"""Words in names of environment variables whose values are secret."""


def without_secrets(text: str) -> str:
    """Return ``text`` without what stands in addresses before ``@`` or behind ``?`` (passwords, signatures), and
    without the values of environment variables that are named like a secret."""
    for name, value in os.environ.items():
        if any(word in name.upper() for word in SECRETS):
            # Of options in JSON (FSSPEC_S3) each string.
            for secret in [value, *re.findall(r'"([^"]*)"', value)]:
                text = text.replace(secret, "***") if len(secret) > 5 else text
    text = re.sub(r"(?<=://)[^/\s@'\"]+@", "***@", text)
    return re.sub(r"(?<=[\w/%.-])\?[^\s'\"<>)]*=[^\s'\"<>)]*", "?***", text)
