"""Tests of pages are skipped without a browser, and fail where one is required."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import NoBrowser, browser_program, unavailable


def test_the_named_browser_comes_first_then_those_that_are_installed(tmp_path: Path) -> None:
    for name in ("google-chrome", "own"):
        (tmp_path / name).touch(mode=0o755)
    path = {"PATH": str(tmp_path)}
    assert browser_program(path) == str(tmp_path / "google-chrome")
    assert browser_program(path | {"SWD_BROWSER": str(tmp_path / "own")}) == str(tmp_path / "own")
    with pytest.raises(NoBrowser, match="SWD_BROWSER=/no/browser is no program"):
        browser_program(path | {"SWD_BROWSER": "/no/browser"})
    (tmp_path / "google-chrome").unlink()
    with pytest.raises(NoBrowser, match="none of chromium, chromium-browser, google-chrome is installed"):
        browser_program(path)


def test_a_missing_browser_skips_or_fails() -> None:
    with pytest.raises(pytest.skip.Exception, match="none is installed"):
        unavailable("none is installed", {})
    with pytest.raises(pytest.fail.Exception, match="none is installed, and SWD_BROWSER_REQUIRED=1"):
        unavailable("none is installed", {"SWD_BROWSER_REQUIRED": "1"})
