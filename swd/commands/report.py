"""`swd report`: one page about runs and evaluations."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from swd.commands import keys, shared
from swd.config import check
from swd.io import limits
from swd.report import overview
from swd.report.page import check_page_size, check_replaceable, write_page
from swd.types import UserError

ROOT = keys.REPORT


def run(cfg: DictConfig) -> None:
    """Read all folders and write the page; prints its path."""
    prepare(cfg)
    runs, evaluations = overview.read_folders([Path(folder) for folder in cfg.folders])
    counts = [(len(runs), "run"), (len(evaluations), "evaluation")]
    title = cfg.title or " and ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in counts if n)
    kept = overview.PageLimits(cfg.megabytes, cfg.side, cfg.quality, cfg.shown)
    command = shared.given_command("report")
    print(write_page(Path(cfg.out), overview.render_overview(runs, evaluations, kept, title, command)))


def prepare(cfg: DictConfig) -> None:
    """Check every setting.

    Raises:
        UserError: naming the setting and the fix.
    """
    if OmegaConf.is_missing(cfg, "folders"):
        raise UserError("no folder is given; give runs or evaluations: swd report FOLDER ...")
    check(cfg, ROOT)
    check_page_size(cfg.megabytes, cfg.side, cfg.quality)
    limits.whole("shown", cfg.shown, 0)
    check_replaceable(Path(cfg.out))
