"""Checks what a demo left behind: the table, falling losses and a report that opens without a network.

    python .ci/check_demo.py outputs/demo [--since UNIX_SECONDS]

Prints every failure, one line each, and exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

ROW_NUMBERS = ("steps", "nfe", "gflop", "ms_per_image", "fid", "prompt_accuracy")
MIN_ROWS = 3  # the teacher as intended, the teacher at the student's steps, the student
RATIOS = ("gflop_of_full_size_steps", "accuracy_of_teacher", "fid_of_teacher", "speedup_over_teacher")
# Measured on the same pictures with the same draws: training losses of a short run differ more between batches than
# training changes them: mmd of the student before and after, fake_score of the teacher and of the trained fake on the
# student's outputs. The adversarial losses need not fall, and dmd is normalised to about one.
FALLING_LOSSES = ("mmd", "fake_score")

COMMON_VOID_TAGS = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta"}
VOID_TAGS = {*COMMON_VOID_TAGS, "source", "track", "wbr"}
TABLE_PARTS = {"tr", "td", "th", "thead", "tbody", "tfoot", "colgroup"}
OPTIONAL_END_TAGS = {"html", "head", "body", "p", "li", "dt", "dd", "option", *TABLE_PARTS}
# A link that the reader may follow (<a href>) is not loaded when the page opens.
LOADING_ATTRIBUTES = {"src", "srcset", "poster", "data", "href", "xlink:href", "action"}
REMOTE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
REMOTE_IN_CSS = re.compile(r"(url\(\s*['\"]?|@import\s+['\"])\s*(https?:)?//", re.IGNORECASE)
REMOTE_IN_SCRIPT = re.compile(r"https?://(?!www\.w3\.org/)", re.IGNORECASE)


class ReportParser(HTMLParser):
    """Collects a page's text, its unclosed or stray tags and everything it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open_tags: list[str] = []
        self.text: list[str] = []
        self.problems: list[str] = []
        self.has_doctype = False
        self.embedded_images = 0

    def handle_decl(self, decl: str) -> None:
        self.has_doctype |= decl.lower().startswith("doctype html")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.check_attributes(tag, attrs)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.check_attributes(tag, attrs)

    def check_attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        line = self.getpos()[0]
        for name, value in attrs:
            value = value or ""
            addresses = value.split(",") if name == "srcset" else [value]
            if name in LOADING_ATTRIBUTES and tag != "a" and any(map(REMOTE.match, addresses)):
                self.problems.append(f"<{tag} {name}={value[:60]!r}> at line {line} needs a network")
            if name == "style" and REMOTE_IN_CSS.search(value):
                self.problems.append(f"<{tag} style> at line {line} needs a network")
            if tag in ("img", "image") and value.startswith("data:image/"):
                self.embedded_images += 1

    def handle_endtag(self, tag: str) -> None:
        while self.open_tags and self.open_tags[-1] != tag and self.open_tags[-1] in OPTIONAL_END_TAGS:
            self.open_tags.pop()
        if self.open_tags and self.open_tags[-1] == tag:
            self.open_tags.pop()
        elif tag not in OPTIONAL_END_TAGS:
            self.problems.append(f"</{tag}> at line {self.getpos()[0]} closes nothing")

    def handle_data(self, data: str) -> None:
        inside = self.open_tags[-1] if self.open_tags else ""
        if inside == "style" and REMOTE_IN_CSS.search(data):
            self.problems.append(f"<style> near line {self.getpos()[0]} needs a network")
        elif inside == "script" and REMOTE_IN_SCRIPT.search(data):
            self.problems.append(f"<script> near line {self.getpos()[0]} names an address on the network")
        elif inside not in ("style", "script"):
            self.text.append(data)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_rows(rows: object) -> list[str]:
    if not isinstance(rows, list) or len(rows) < MIN_ROWS or not all(isinstance(row, dict) for row in rows):
        return [f"rows: expected a list of at least {MIN_ROWS} objects, got {str(rows)[:80]}"]
    failures = []
    for index, row in enumerate(rows):
        name = row.get("name")
        if not isinstance(name, str) or not name:
            failures.append(f"rows[{index}]: no name")
        for key in ROW_NUMBERS:
            if not is_number(row.get(key)) or row[key] < 0:
                failures.append(f"rows[{index}] ({name}): {key} is {row.get(key)!r}, expected a number >= 0")
        if is_number(row.get("prompt_accuracy")) and row["prompt_accuracy"] > 1:
            failures.append(f"rows[{index}] ({name}): prompt_accuracy {row['prompt_accuracy']} is above 1")
    names = [row.get("name") for row in rows]
    if len(set(map(str, names))) < len(names):
        failures.append(f"rows: names are not unique: {names}")
    return failures


def check_ratios(ratios: object) -> list[str]:
    """Each has a ``value``; whether it is as ``expected`` is for the full demo to say, not for a shortened one."""
    if not isinstance(ratios, dict):
        return [f"ratios: expected an object, got {ratios!r}"]
    values = {name: ratios[name].get("value") if isinstance(ratios.get(name), dict) else None for name in RATIOS}
    failures = [f"ratios: {name} is {value!r}" for name, value in values.items() if not is_number(value)]
    cost = values["gflop_of_full_size_steps"]
    if is_number(cost) and cost > 0.56:  # counted, not measured: training cannot excuse it
        failures.append(f"ratios: the student takes {cost:.2f} of the cost of full-size steps, more than 0.56")
    return failures


def check_wall_seconds(wall_seconds: object) -> list[str]:
    if not isinstance(wall_seconds, dict) or not wall_seconds:
        return [f"wall_seconds: expected seconds by phase, got {wall_seconds!r}"]
    if "total" not in wall_seconds:
        return ["wall_seconds: total is missing"]
    wrong = {phase: value for phase, value in wall_seconds.items() if not is_number(value) or value < 0}
    return [f"wall_seconds: {phase} is {value!r}" for phase, value in wrong.items()]


def check_losses(losses: object, falling: tuple[str, ...] = ()) -> list[str]:
    """``losses`` maps a name to its value at first and at last; those named in ``falling`` must be there and fall."""
    if not isinstance(losses, dict):
        return [f"losses: expected {{name: [first, last]}}, got {losses!r}"]
    failures = []
    for name, pair in losses.items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_number, pair)):
            failures.append(f"losses: {name} is {pair!r}, expected two finite numbers")
        elif name in falling and pair[1] >= pair[0]:
            failures.append(f"losses: {name} did not fall: {pair[0]:.4g} at first, {pair[1]:.4g} at last")
    failures += [f"losses: {name} is missing" for name in falling if name not in losses]
    return failures


def check_report(html: str, names: list[str]) -> list[str]:
    parser = ReportParser()
    parser.feed(html)
    parser.close()
    unclosed = [tag for tag in parser.open_tags if tag not in OPTIONAL_END_TAGS]
    # Whitespace in the source is not whitespace on the page.
    text = " ".join(" ".join(parser.text).split())
    failures = [f"report.html: {problem}" for problem in parser.problems]
    if not parser.has_doctype:
        failures.append("report.html: does not begin with <!doctype html>")
    if unclosed:
        failures.append(f"report.html: never closed: {unclosed}")
    if not parser.embedded_images:
        failures.append("report.html: no embedded picture (an <img> with a data: address)")
    missing = [name for name in names if " ".join(name.split()) not in text]
    failures += [f"report.html: row {name!r} is not in it" for name in missing]
    return failures


def check_demo(folder: Path, since: float = 0.0) -> list[str]:
    """All failures in a demo's output folder, as lines; ``since`` refuses files from an earlier run."""
    results, report = folder / "results.json", folder / "report.html"
    failures = [f"{path}: missing" for path in (results, report) if not path.is_file()]
    if failures:
        return failures
    stale = [f"{path}: left by an earlier run" for path in (results, report) if path.stat().st_mtime < since]
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except ValueError as error:
        return [*stale, f"{results}: not JSON: {error}"]
    if not isinstance(found, dict):
        return [*stale, f"{results}: expected an object"]

    rows = found.get("rows")
    row_failures = check_rows(rows)
    names = [str(row["name"]) for row in rows] if isinstance(rows, list) and not row_failures else []
    return [
        *stale,
        *row_failures,
        *check_ratios(found.get("ratios")),
        *check_wall_seconds(found.get("wall_seconds")),
        *check_losses(found.get("losses")),
        *check_losses(found.get("fixed_losses"), FALLING_LOSSES),
        *check_report(report.read_text(encoding="utf-8"), names),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--since", type=float, default=0.0, help="refuse files older than this (Unix time)")
    arguments = parser.parse_args()
    failures = check_demo(arguments.folder, arguments.since)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failures:
        print(f"{arguments.folder}: results and report are in order")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
