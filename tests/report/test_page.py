"""Data inside a page cannot end its element, and only pages of this program are replaced."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report_folders import EVIL

from swd.report.page import data, templates, write_page
from swd.types import UserError


def test_data_is_the_same_value_and_holds_no_markup() -> None:
    value = {EVIL: [f"{EVIL}\u2028\u2029<!--", 1.5, None]}
    text = str(data(value))
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == value
    with pytest.raises(ValueError):
        data([math.nan])


def test_only_pages_of_this_program_are_replaced(tmp_path: Path) -> None:
    html = templates().from_string("<!doctype html>{{ generator }}{{ text }}").render(text=EVIL)
    assert "<script" not in html
    file = write_page(tmp_path / "new" / "page.html", html)
    assert write_page(file, html + "2").read_text().endswith("2")
    file.write_text("mine")
    with pytest.raises(UserError, match="is there already and no page of swd"):
        write_page(file, html)
    assert file.read_text() == "mine"
