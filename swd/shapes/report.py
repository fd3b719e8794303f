"""A self-contained HTML page about one run, which loads no other file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swd.report.charts import LOSSES, frame, plot
from swd.report.page import significant, templates

# Content of a page


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, its explanation, and a function that formats a row's value."""

    title: str
    help: str
    text: Callable[[Mapping[str, Any]], str]


COLUMNS = (
    Column("model", "who draws", lambda row: str(row["name"])),
    Column("steps", "generation steps", lambda row: str(row["steps"])),
    Column("evaluations", "network evaluations per picture; guidance takes two a step", lambda row: str(row["nfe"])),
    Column("GFLOP", "of the network, per picture", lambda row: f"{row['gflop']:.2f}"),
    Column("ms / image", "network and VAE, per picture, mean over batches", lambda row: f"{row['ms_per_image']:.1f}"),
    Column("FID", "Fréchet distance of the judge's features to rendered pictures", lambda row: significant(row["fid"])),
    Column("MMD", "kernel distance of the judge's whitened features, and its interval", lambda row: mmd_text(row)),
    Column("accuracy", "of the prompt's attributes, mean", lambda row: f"{row['prompt_accuracy']:.3f}"),
    Column("exact", "pictures that keep all of their prompt", lambda row: f"{row['exact_match']:.3f}"),
)

RATIOS = {
    "speedup_over_teacher": "the teacher's speed",
    "gflop_of_full_size_steps": "the network cost of as many full-size steps",
    "accuracy_of_teacher": "the teacher's prompt accuracy",
    "fid_of_teacher": "the teacher's FID",
}
"""Denominators of the student's ratios, in words."""


@dataclass(frozen=True)
class Comparison:
    """One prompt with the picture `[3, H, W]` in [-1, 1] and the judge's score of every model, by name of its row."""

    prompt: str
    pictures: Mapping[str, Tensor]
    marks: Mapping[str, str]


@dataclass(frozen=True)
class Progression:
    """One prompt with the student's predictions `[3, H, W]` in [-1, 1] at all steps, each with a label."""

    prompt: str
    steps: Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Page:
    """All data of a report.

    Attributes:
        results: contents of `results.json`.
        comparisons: pictures of all models, prompt by prompt.
        progressions: predictions of the student, step by step.
        curves: every loss, one value per iteration.
        cycle: iterations after which the schedule repeats; curves are averaged over it.
        config: the resolved configuration.
    """

    results: Mapping[str, Any]
    comparisons: Sequence[Comparison]
    progressions: Sequence[Progression]
    curves: Mapping[str, Sequence[float]]
    cycle: int
    config: str


def ratio_lines(results: Mapping[str, Any]) -> list[str]:
    """One line for each ratio, with its expected range."""
    lines = []
    for key, text in RATIOS.items():
        ratio = results["ratios"][key]
        value = "undefined" if ratio["value"] is None else f"{ratio['value']:.2f}"
        verdict = (
            "" if ratio["met"] is None else f"  (expected {ratio['expected']}: {'met' if ratio['met'] else 'missed'})"
        )
        lines.append(f"student: {value} x {text}{verdict}")
    return lines


def mmd_text(row: Mapping[str, Any]) -> str:
    """A row's kernel distance and half the width of its interval; a dash where there is none."""
    mmd = (row.get("distances") or {}).get("mmd")
    return f"{mmd['value']:.1f} ± {(mmd['high'] - mmd['low']) / 2:.1f}" if mmd else "–"


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """For every row but the first, whether its kernel distance differs from the first row's beyond chance."""
    lines = []
    for row in results["rows"][1:]:
        found = (row.get("distances") or {}).get("mmd_over_first")
        if found:
            settled = "worse" if found["low"] > 0 else "better" if found["high"] < 0 else "not told apart"
            numbers = f"{found['value']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"
            lines.append(f"{row['name']}: MMD {numbers} over {results['rows'][0]['name']} ({settled})")
    return lines


# The page


def render_page(page: Page) -> str:
    """The page as one HTML document."""
    results = page.results
    rows = results["rows"]
    order = [*(name for name in LOSSES if name in page.curves), *(name for name in page.curves if name not in LOSSES)]
    template = templates(Path(__file__).parent).get_template("report.html.j2")
    return template.render(
        page=page,
        results=results,
        rows=rows,
        columns=COLUMNS,
        attributes=list(dict.fromkeys(name for row in rows for name in row["attributes"])),
        stored=[row["name"] for row in rows if row["source"] != "live"],
        ratios={text: results["ratios"][key] for key, text in RATIOS.items()},
        differences=difference_lines(results),
        losses={name: LOSSES.get(name, "") for name in order},
        frame=frame(),
        phases=[[name, f"{seconds:.1f}"] for name, seconds in results["wall_seconds"].items()],
        charts={name: plot(page.curves[name], page.cycle, name) for name in order},
    )
