"""A headless Chromium that opens pages of this package and notes what goes wrong in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""Programs that are looked for, beside the one that SWD_BROWSER names."""
QUIET = (
    "--no-sandbox",  # needed where tests run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
WIDTHS = (1280, 390)
"""Widths in pixels at which every page is looked at: a laptop's and a phone's."""
MINUTE = 60_000.0
"""The longest that a page may take, in milliseconds: machines that run tests may be busy."""


class NoBrowser(Exception):
    """There is no browser to test with; the message says what is missing."""


def browser_program(environment: Mapping[str, str] = os.environ) -> str:
    """Path of the browser.

    Raises:
        NoBrowser: if there is none.
    """
    own = environment.get("SWD_BROWSER")
    path = environment.get("PATH")
    if own:
        found = shutil.which(own, path=path)
        if found is None:
            raise NoBrowser(f"SWD_BROWSER={own} is no program")
        return found
    found = next((program for name in NAMES if (program := shutil.which(name, path=path))), None)
    if found is None:
        raise NoBrowser(f"none of {', '.join(NAMES)} is installed; SWD_BROWSER may name another Chromium")
    return found


def unavailable(reason: str, environment: Mapping[str, str] = os.environ) -> None:
    """Skip the test that needs a browser, or fail it where SWD_BROWSER_REQUIRED=1."""
    if environment.get("SWD_BROWSER_REQUIRED") == "1":
        pytest.fail(f"{reason}, and SWD_BROWSER_REQUIRED=1")
    pytest.skip(reason)


@contextmanager
def running_browser() -> Iterator[Any]:
    """A browser without pages; the test is skipped if there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed")
    try:
        program = browser_program()
    except NoBrowser as error:
        unavailable(str(error))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=list(QUIET), timeout=MINUTE)
        yield browser
        browser.close()


class Visit:
    """A page of a file, open in a browser.

    Args:
        browser: from `running_browser`.
        file: the HTML file.
        width: of the window, in pixels; 844 high if it is a phone's, else 800.

    Attributes:
        page: the page of playwright.
        problems: errors of the page, texts on its console, and requests for anything but the file itself.
    """

    def __init__(self, browser: Any, file: Path, width: int = WIDTHS[0]) -> None:
        phone = width < 600
        self.context = browser.new_context(
            viewport={"width": width, "height": 844 if phone else 800}, has_touch=phone, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(MINUTE)
        self.problems: list[str] = []
        self.address = file.resolve().as_uri()
        self.page.on("console", lambda text: self.problems.append(f"console: {text.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._on_request)
        self.page.goto(self.address, wait_until="load")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")) and request.url != self.address:
            self.problems.append(f"request: {request.url}")

    def overflow(self) -> int:
        """Pixels by which the document is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def close(self) -> None:
        """Close the page, and raise AssertionError if anything went wrong in it."""
        self.context.close()
        assert self.problems == []


@contextmanager
def visit(browser: Any, file: Path, width: int = WIDTHS[0]) -> Iterator[Visit]:
    """Open a page; at the end it must have had no error, written nothing to its console and requested no other file."""
    opened = Visit(browser, file, width)
    yield opened
    opened.close()
