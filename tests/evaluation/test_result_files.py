"""The table in all its forms, and the published numbers."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from swd.evaluation import result_files

EVIL = "a|<script>alert('&')</script>"


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": name,
        "steps": 4,
        "evaluations": 8,
        "tflop": 0.0079448,
        "latency": {"batch": 8, "runs": 100, "text_s": 0.01, "denoise_s": 0.25, "decode_s": 0.04, "per_picture_s": 0.3},
        "peak_memory_bytes": 2_500_000_000,
        "metrics": {"fid": {"value": 2.68123, "low": 2.5, "high": 2.9, "better": "lower", "floor": 2.7}},
    } | more


def build_results(**more: Any) -> dict[str, Any]:
    given = row(EVIL, steps=None, evaluations=None, tflop=None, latency=None, peak_memory_bytes=None)
    given["metrics"] = {"fid": {"value": 3.0, "low": None, "high": None, "better": "lower"}}
    return {
        "format": 1,
        "prompts": {"file": EVIL, "n": 1000, "hash": "0"},
        "images_per_prompt": 2,
        "seeds": {"first": 0, "own": False},
        "command": f"swd evaluate {EVIL}",
        "version": "0",
        "bootstrap": {"draws": 1000, "level": 0.95},
        "models": [row("teacher"), given],
        "pairs": [
            {"a": "teacher", "b": EVIL, "metric": "fid", "difference": 0.319, "low": 0.1, "high": 0.5},
            {"a": "teacher", "b": EVIL, "metric": "clip", "difference": -1.0, "low": -2.0, "high": 0.5},
            {"a": "teacher", "b": EVIL, "metric": "kid", "difference": -1.0, "low": None, "high": None},
        ],
        "published": [],
    } | more


class Reader(HTMLParser):
    """The tags of a page, and its cells by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_the_column_of_times_says_how_they_were_taken() -> None:
    time = row("")["latency"]
    for own, title in (
        ({}, "s / picture"),
        ({"precision": "fp16"}, "s / picture (fp16)"),
        ({"compile": "blocks", "tiny_vae": "taesd3"}, "s / picture (compiled, tiny VAE)"),
        (
            {"precision": "fp16", "compile": True, "compile_coders": True, "tiny_vae": "x"},
            "s / picture (fp16, compiled with coders, tiny VAE)",
        ),
    ):
        results = build_results(models=[row("given", latency=None), row("a", latency=time | own)], pairs=[])
        assert result_files.grids(results)[0].columns[-3] == title


def test_rows_hold_values_with_intervals_floor_and_costs(tmp_path: Path) -> None:
    models, pairs = result_files.grids(build_results())
    assert models.title == "Models, 2,000 pictures each" and models.columns[1] == "fid ↓"
    assert models.rows[0][1:] == [
        "2.681 [2.500, 2.900], floor 2.700",
        "4",
        "8",
        "0.007945",
        "0.3000",
        "0.01000 + 0.2500 + 0.04000",
        "2.500",
    ]
    assert models.rows[1][1:] == ["3.000", "–", "–", "–", "–", "–", "–"]
    assert [line[2:] for line in pairs.rows] == [
        ["0.3190 [0.1000, 0.5000]", "yes"],
        ["-1.000 [-2.000, 0.5000]", "no"],
        ["-1.000", "–"],
    ]


def test_every_form_holds_the_same_and_escapes(tmp_path: Path) -> None:
    results = build_results(published=result_files.published_rows())
    result_files.write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    grids = result_files.grids(results)
    page = Reader((tmp_path / "report.html").read_text())
    assert not page.tags & {"script", "link", "img"}
    assert page.rows == [list(line) for grid in grids for line in (grid.columns, *grid.rows)]
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("\\|", "|") for cell in _split(line)] for line in lines]
    assert [line for line in cells if set(line) != {"---"}] == page.rows
    first, second = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert (float(first["fid"]), float(first["fid_low"]), float(first["fid_floor"])) == (2.68123, 2.5, 2.7)
    assert float(first["latency_per_picture_s"]) == 0.3 and second["name"] == EVIL and second["fid_low"] == ""


def test_intervals_of_few_prompts_are_marked() -> None:
    titles = {}
    for n in (49, 50):
        results = build_results(prompts={"file": "few.txt", "n": n, "hash": "0"})
        titles[n] = [grid.title for grid in result_files.grids(results)]
    doubt = " (49 prompts: intervals of fewer than 50 are too narrow)"
    assert titles[49] == [f"Models, 98 pictures each{doubt}", f"Differences to teacher{doubt}"]
    assert titles[50] == ["Models, 100 pictures each", "Differences to teacher"]
    for row in results["models"]:
        row["metrics"]["fid"]["low"] = None
    results["prompts"]["n"] = 49
    assert result_files.models_grid(results).title == "Models, 98 pictures each"  # it has no interval


def _split(line: str) -> list[str]:
    """Cells of a line of Markdown, their bars still escaped."""
    return [part.replace("\0", "\\|") for part in line.replace("\\|", "\0").strip("|").split("|")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (4, "4"), (0.0, "0.000"), (1234.5, "1234"), (2e-5, "2e-05"), (123456.0, "1.23e+05"), ("a", "a")],
)
def test_numbers_have_four_digits(value: Any, text: str) -> None:
    assert result_files.number_text(value) == text


def test_published_numbers_are_those_of_the_paper_and_marked() -> None:
    rows = result_files.published_rows()
    found = {(row["name"], row["data"]): row for row in rows}
    assert found["SD3.5-M-SwD", "MJHQ-30K"]["metrics"] == {
        "pickscore": 21.8,
        "hpsv3": 10.7,
        "imagereward": 1.10,
        "fid": 13.4,
    }
    assert {row["steps"]: row["per_picture_s"] for row in rows if row["name"] == "FLUX, scale-wise"} == {
        6: 0.97,
        4: 0.72,
    }
    assert all("arxiv.org/abs/2503.16397" in row["source"] for row in rows)
    grid = result_files.grids(build_results(published=rows))[-1]
    assert grid.title.startswith("Published, not measured here")
    assert ["SD3.5-L-SwD", "COCO-30K", "4", "22.80", "12.80", "1.200", "20.60", "–", "–"] in grid.rows
