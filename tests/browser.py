"""A real browser on the pages of real servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

SECONDS = 120
QUIET = ("--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run")  # fmt: skip


@contextmanager
def open_browser() -> Iterator[Page]:
    """A page of headless Chromium that waits long for what is looked for; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium is installed here (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, chromium_sandbox=False, args=list(QUIET))
        page = browser.new_page()
        page.set_default_timeout(SECONDS * 1000)
        yield page
        browser.close()
