"""The demo's page in a browser: it is whole, fits a laptop and a phone, and its configuration opens by keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import WIDTHS, visit
from demo_page import build_page

from swd.shapes import report


@pytest.mark.parametrize("width", WIDTHS)
def test_the_demos_page_in_a_browser(browser: Any, tmp_path: Path, width: int) -> None:
    file = tmp_path / "report.html"
    file.write_text(report.render_page(build_page()), encoding="utf-8")
    with visit(browser, file, width) as opened:
        assert opened.overflow() <= 0
        pictures = opened.page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
        assert pictures == [[True, 16], [True, 16], [True, 16], [True, 6], [True, 16]]
        assert opened.page.locator("svg").count() == 2
        details = opened.page.locator("details")
        assert details.get_attribute("open") is None
        opened.page.focus("summary")
        opened.page.keyboard.press("Enter")
        assert details.get_attribute("open") is not None
