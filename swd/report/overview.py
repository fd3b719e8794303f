"""`swd report`: one page about any runs and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from swd.report.charts import LOSSES, frame
from swd.report.evaluations import EvaluationSection, is_evaluation, read_evaluation
from swd.report.folders import embedded, evenly_spread, names_of
from swd.report.page import templates
from swd.report.runs import Run, Sheet, differences, is_run, read_run
from swd.types import UserError

MOST_FOLDERS = 24
"""Folders of one page at most: eight colours, each in three dashes."""
COLOURS = 8
DASHES = ("none", "7 4", "2 3")

GROUPS = {
    "train": "Losses",
    "loss": "Losses",
    "metrics": "Metrics over time",
    "val": "Validation",
    "monitor": "Monitor",
    "time": "Time",
}
"""Titles of the groups of curves, by the part of their name before the first slash; in this order, others behind."""
HIDDEN = ("train/interval",)
"""Columns that are no measurement: which step of the schedule an iteration trained."""


@dataclass(frozen=True)
class PageLimits:
    """How much of the pictures goes into a page.

    Attributes:
        megabytes: all embedded pictures together, as files (the page holds them as text, a third larger).
        side: width and height in pixels at most, of a sample sheet and of a picture.
        quality: of WebP, 1 to 100.
        shown: prompts of an evaluation at most.
    """

    megabytes: float
    side: int
    quality: int
    shown: int


@dataclass(frozen=True)
class SheetsOfRun:
    """Sample sheets of a run inside the page.

    Attributes:
        run: its position among the runs.
        iterations: of the sheets.
        pictures: their addresses.
        total: sheets that the run has.
        labels: of the columns, each with its share of the width in pixels; empty if they are unknown.
        prompts: of the rows, from the top; empty if they are unknown.
    """

    run: int
    iterations: list[int]
    pictures: list[str]
    total: int
    labels: list[tuple[str, int]]
    prompts: list[str]


@dataclass(frozen=True)
class SideBySide:
    """One prompt with the pictures of all models, by name."""

    prompt: str
    pictures: dict[str, str]


def read_folders(folders: Sequence[Path]) -> tuple[list[Run], list[EvaluationSection]]:
    """The runs and evaluations in the folders; one that is a run and an evaluation counts as both.

    Raises:
        UserError: if a folder is neither, or there are too many or none.
    """
    if not 1 <= len(folders) <= MOST_FOLDERS:
        raise UserError(f"{len(folders)} folders; give 1 to {MOST_FOLDERS} runs and evaluations: swd report FOLDER ...")
    runs, evaluations = [], []
    names_of(folders)  # none is given twice
    for folder in folders:
        if folder.is_file():
            raise UserError(f"{folder} is no folder; give folders alone, e.g. {folder.parent}/*/")
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; give folders of runs")
        run, evaluation = is_run(folder), is_evaluation(folder)
        if not run and not evaluation:
            inside = any(is_run(each) or is_evaluation(each) for each in folder.iterdir() if each.is_dir())
            right = f"those inside it: {folder}/*/" if inside else "folders that swd train or swd evaluate made"
            raise UserError(
                f"{folder} is neither a run (no config.yaml, no metrics.csv) nor an evaluation (no results.json of swd "
                f"evaluate); give {right}"
            )
        if run:
            runs.append(folder)
        if evaluation:
            evaluations.append(folder)
    return (
        [read_run(folder, name) for folder, name in zip(runs, names_of(runs), strict=True)],
        [read_evaluation(folder, name) for folder, name in zip(evaluations, names_of(evaluations), strict=True)],
    )


def render_overview(
    runs: Sequence[Run], evaluations: Sequence[EvaluationSection], limits: PageLimits, title: str, command: str
) -> str:
    """The page as one HTML document.

    Raises:
        UserError: if a picture cannot be read.
    """
    # Half of the pictures' budget goes to each kind where both are there.
    with_sheets = [index for index, run in enumerate(runs) if run.sheets]
    with_pictures = [evaluation for evaluation in evaluations if evaluation.pictures]
    share = limits.megabytes * 1e6 / max(1, bool(with_sheets) + bool(with_pictures))
    samples = [sheets_of(runs[i], i, limits, share / len(with_sheets)) for i in with_sheets]
    pictures = {e.name: side_by_side(e, limits, share / len(with_pictures)) for e in with_pictures}

    # The data that the script of the page draws.
    groups = curves_of(runs)
    payload = {
        "runs": [{"name": run.name, "cycle": run.cycle} for run in runs],
        "charts": [chart for charts in groups.values() for chart in charts],
        "frame": frame(),
        "iterations": sorted({i for progress in samples for i in progress.iterations}),
        "samples": [{"iterations": p.iterations, "pictures": p.pictures} for p in samples],
    }
    return (
        templates()
        .get_template("runs.html.j2")
        .render(
            title=title,
            command=command,
            runs=runs,
            evaluations=evaluations,
            groups=groups,
            samples=samples,
            pictures=pictures,
            differing=differences(runs),
            limits=limits,
            payload=payload,
            frame=frame(),
            colour=lambda index: index % COLOURS,
            dash=lambda index: DASHES[index // COLOURS % len(DASHES)],
        )
    )


# Curves


def curves_of(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """By group, the charts: a name, an explanation, and a series for each run that has the quantity."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name not in HIDDEN)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        series = [
            {"run": index, "x": run.curves[name].iterations, "y": run.curves[name].values}
            for index, run in enumerate(runs)
            if name in run.curves
        ]
        group, _, rest = name.partition("/")
        title = GROUPS.get(group, group) if rest else "Other values"
        chart = {"name": rest or name, "help": LOSSES.get(rest, ""), "series": series}
        groups.setdefault(title, []).append(chart)
    order = [*dict.fromkeys(GROUPS.values()), *sorted(groups)]
    known = list(LOSSES)
    for charts in groups.values():
        charts.sort(key=lambda chart: known.index(chart["name"]) if chart["name"] in known else len(known))
    return {title: groups[title] for title in dict.fromkeys(order) if title in groups}


# Pictures


def sheets_of(run: Run, index: int, limits: PageLimits, quota: float) -> SheetsOfRun:
    """As many sheets of a run as fit into `quota` bytes, evenly spread, the first and the last among them."""
    kept, pictures = fitting(run.sheets, limits, quota)
    return SheetsOfRun(
        run=index,
        iterations=[sheet.iteration for sheet in kept],
        pictures=pictures,
        total=len(run.sheets),
        labels=columns_of(run, run.sheets[-1]),
        prompts=run.prompts,
    )


def fitting(sheets: Sequence[Sheet], limits: PageLimits, quota: float) -> tuple[list[Sheet], list[str]]:
    """The sheets that fit, and their addresses; one that is alone is made smaller until it fits."""
    made: dict[int, str] = {}
    wanted, side = len(sheets), limits.side
    # The last sheet says about how many fit, so that the others are not all encoded in vain.
    last = len(embedded(sheets[-1].file, side, limits.quality)) * 0.75
    wanted = max(1, min(wanted, int(quota / last)))
    while True:
        chosen = evenly_spread(len(sheets), wanted)
        for i in chosen:
            made.setdefault(i, embedded(sheets[i].file, side, limits.quality))
        size = sum(len(made[i]) for i in chosen) * 0.75
        if size <= quota or (wanted == 1 and side <= 64):
            return [sheets[i] for i in chosen], [made[i] for i in chosen]
        if wanted == 1:
            side, made = side // 2, {}
        else:
            wanted = max(1, min(wanted - 1, int(wanted * quota / size)))


def columns_of(run: Run, sheet: Sheet) -> list[tuple[str, int]]:
    """Size and width of each column of a sheet; empty if the schedule does not fit the sheet's width.

    A sheet has a gap of 2 pixels between columns (`swd.io.pictures.grid`).
    """
    sizes = run.sizes
    widths = [size[-1] for size in sizes]
    if not widths:
        return []
    with Image.open(sheet.file) as image:
        pixels = image.width - 2 * (len(widths) - 1)
    factor, rest = divmod(pixels, sum(widths))
    if rest or not factor:
        return []
    return [
        ("×".join(str(n * factor) for n in size[-2:]), width * factor)
        for size, width in zip(sizes, widths, strict=True)
    ]


def side_by_side(evaluation: EvaluationSection, limits: PageLimits, quota: float) -> list[SideBySide]:
    """The first prompts that all models drew, as many as fit into `quota` bytes."""
    folders = evaluation.pictures
    first, *others = folders.values()
    common = [key for key in first.pictures if all(key in folder.pictures for folder in others)]
    found: list[SideBySide] = []
    used = 0.0
    for key in common[: limits.shown]:
        pictures = {
            name: embedded(folder.pictures[key].file, min(limits.side, 512), limits.quality)
            for name, folder in folders.items()
        }
        used += sum(map(len, pictures.values())) * 0.75
        if used > quota:
            break
        found.append(SideBySide(first.pictures[key].prompt or f"picture {key}", pictures))
    return found
