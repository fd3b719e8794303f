"""`swd dashboard`: the panels that a wandb workspace opens on, as a file and, with an account, on wandb."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from swd.commands import keys
from swd.config import check, one_line
from swd.io.files import write_json
from swd.io.job_log import print_line
from swd.types import UserError

ROOT = keys.DASHBOARD
ITERATION = "trainer/global_step"
"""The metric that counts iterations, by Lightning's logger for wandb: the x axis of all others."""
SAMPLES = "samples"
"""Name under which pictures are logged."""
SECTIONS = {
    "loss": "Losses",
    "metrics": "Metrics by size",
    SAMPLES: "Samples",
    "time": "Throughput",
    "validation": "Validation",
    "monitor": "Monitor",
}
"""Groups of metrics, and titles of their sections, in the order of the page."""
OPEN = ("loss", "metrics", SAMPLES, "time")
"""Groups whose sections are open at first."""
COMMON = ("loss/loss", "loss/dmd", "loss/mmd", "loss/gan", "loss/fake_score", "loss/discriminator", "loss/x0_mse")
"""Metrics that get panels where no run has logged any: those of the paper's three losses."""


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        kind: "lines" over iterations, or "pictures".
        metrics: what it shows.
    """

    title: str
    kind: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Charts under one title.

    Attributes:
        title: of the section.
        open: whether it is open at first.
        panels: in their order.
    """

    title: str
    open: bool
    panels: tuple[Panel, ...]


def run(cfg: DictConfig) -> None:
    """Write the panels, and save them on wandb where an entity is named; prints the file."""
    check(cfg, ROOT)
    if cfg.entity is not None and not find_spec("wandb_workspaces"):
        raise UserError(
            f"entity={cfg.entity}: saving a workspace needs the package wandb-workspaces: pip install "
            "wandb-workspaces, and wandb login; leave out entity= to write the panels only"
        )
    page = sections(logged_names(Path(cfg.output)) or COMMON)
    plain = {"title": cfg.title, "project": cfg.project, "x": ITERATION, "sections": [asdict(each) for each in page]}
    print(write_json(Path(cfg.to), plain))
    if cfg.entity is None:
        print_line(
            "to open these panels on wandb: pip install wandb-workspaces, wandb login, swd dashboard entity=NAME"
        )
    else:
        print(save_workspace(cfg, page))


def logged_names(output: Path) -> list[str]:
    """Names of the metrics in the `metrics.csv` of all runs below a folder, sorted."""
    names: set[str] = set()
    for file in output.glob("**/metrics.csv"):
        with file.open(newline="", encoding="utf-8") as stream:
            names.update(next(csv.reader(stream), []))
    return sorted(name for name in names if "/" in name)


def sections(names: Iterable[str]) -> list[Section]:
    """The page for metrics of these names: one chart for each, but all sizes of a metric share one.

    A metric `metrics/fid/128` is FID at 128 pixels. Pictures get a section of their own.
    """
    charts: dict[str, dict[str, list[str]]] = {group: {} for group in SECTIONS}
    for name in names:
        group, _, rest = name.partition("/")
        if group in charts and rest:
            charts[group].setdefault(rest.partition("/")[0], []).append(name)
    panels = {
        group: tuple(Panel(title, "lines", tuple(sorted(m, key=_size))) for title, m in found.items())
        for group, found in charts.items()
    }
    panels[SAMPLES] = (Panel(SAMPLES, "pictures", (SAMPLES,)),)
    return [Section(title, group in OPEN, panels[group]) for group, title in SECTIONS.items() if panels[group]]


def _size(name: str) -> tuple[float, str]:
    """Sizes in the order of numbers, whatever is no size before them."""
    last = name.rpartition("/")[2]
    return (float(last) if last.isdigit() else -1.0, name)


def save_workspace(cfg: DictConfig, page: Iterable[Section]) -> str:
    """Save the workspace on wandb; returns its address.

    Raises:
        UserError: if wandb refuses it, as without an account.
    """
    try:
        built = workspace(cfg, page)
        built.save()
        return str(built.url)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("wandb", "wandb_gql", "wandb_graphql", "requests"):
            raise
        raise UserError(
            f"entity={cfg.entity}: wandb refused the workspace ({one_line(error)[:200]}); run wandb login, and "
            f"check that {cfg.entity}/{cfg.project} exists"
        ) from None


def workspace(cfg: DictConfig, page: Iterable[Section]) -> Any:
    """The workspace as the package wandb-workspaces describes it; sends nothing."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def chart(panel: Panel) -> Any:
        if panel.kind == "pictures":
            return reports.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))
        return reports.LinePlot(title=panel.title, x=ITERATION, y=list(panel.metrics))

    return workspaces.Workspace(
        name=cfg.title,
        entity=cfg.entity,
        project=cfg.project,
        sections=[
            workspaces.Section(name=each.title, panels=[chart(panel) for panel in each.panels], is_open=each.open)
            for each in page
        ],
    )
