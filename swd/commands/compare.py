"""`swd compare`: a page for blind votes between two folders of pictures, and the win rate that votes give."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swd.commands import keys
from swd.config import check
from swd.io import limits
from swd.io.files import write_json
from swd.io.job_log import print_line
from swd.report import pairs, votes
from swd.report.page import check_page_size, check_replaceable, write_page
from swd.report.votes import WinRate
from swd.types import UserError

ROOT = keys.COMPARE
MOST_CRITERIA = 10
"""Criteria at most: each asks for a vote on each pair."""


def run(cfg: DictConfig) -> None:
    """Write the page of two folders and print its path, or print the win rates of files of votes."""
    prepare(cfg)
    paths = [Path(path) for path in cfg.paths]
    if paths[0].suffix == ".json":
        count_votes(cfg, paths)
        return
    study = pairs.read_study(paths[0], paths[1], list(cfg.criteria), cfg.n)
    if any(study.alone):
        a, b = study.alone
        print_line(f"left out, without a partner: {a} of {paths[0]}, {b} of {paths[1]}")
    layout = pairs.Layout(cfg.title, cfg.seed, cfg.side, cfg.quality, cfg.megabytes)
    counts = [(len(study.pairs), "pair"), (len(study.criteria), "vote")]
    print_line("{}, {} on each".format(*(f"{count} {word}{'s' * (count > 1)}" for count, word in counts)))
    print(write_page(Path(cfg.out or "compare.html"), pairs.render_pairs(study, layout)))


def prepare(cfg: DictConfig) -> None:
    """Check every setting.

    Raises:
        UserError: naming the setting and the fix.
    """
    if OmegaConf.is_missing(cfg, "paths"):
        raise UserError("nothing is given; give two folders of pictures, or files of votes: swd compare A B")
    check(cfg, ROOT)
    if not 1 <= len(cfg.criteria) <= MOST_CRITERIA:
        raise UserError(f"criteria={list(cfg.criteria)}; give 1 to {MOST_CRITERIA}")
    if len(set(cfg.criteria)) < len(cfg.criteria) or not all(name.strip() for name in cfg.criteria):
        raise UserError(f"criteria={list(cfg.criteria)}; give each a name of its own")
    limits.whole("n", cfg.n, 1)
    limits.seed("seed", cfg.seed)
    check_page_size(cfg.megabytes, cfg.side, cfg.quality)
    limits.number("level", cfg.level, 0.5, 0.9999)
    counting = [path.endswith(".json") for path in cfg.paths]
    if any(counting) and not all(counting):
        raise UserError("both folders and files of votes are given; give two folders, or .json files alone")
    if not any(counting) and len(cfg.paths) != 2:
        raise UserError(f"{len(cfg.paths)} folders are given; give two: swd compare A B")
    if not any(counting):
        check_replaceable(Path(cfg.out or "compare.html"))
    elif cfg.out is not None and Path(cfg.out).exists():
        raise UserError(f"out={cfg.out} exists already; choose another name")


def count_votes(cfg: DictConfig, files: Sequence[Path]) -> None:
    """Print the win rates of files of votes, and write them where `out` says."""
    ballots = [votes.read_ballot(file) for file in files]
    votes.check_together(ballots)
    rates = votes.win_rates(ballots, cfg.level)
    names = ballots[0].names
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(names, rates, cfg.level, len(ballots)))
    if cfg.out is not None:
        print(write_json(Path(cfg.out), votes.as_dict(names, rates, cfg.level, files)))


def table_of(names: Sequence[str], rates: Sequence[WinRate], level: float, people: int) -> Table:
    """The win rates as a table for the terminal."""
    a, b = names
    title = f"{a} against {b}: votes of {people} {'people' if people > 1 else 'person'}, {level:.0%} intervals"
    table = Table(title=Text(title), title_justify="left")
    counted = ("votes", "prompts", "pairs", f"{a} wins", "ties", f"{b} wins")
    columns = ("criterion", *counted, f"win rate of {a}", "settled")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left")
    for rate in rates:
        counts = map(str, (rate.votes, rate.prompts, rate.pairs, rate.wins, rate.ties, rate.losses))
        interval = f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
        cells = (rate.criterion, *counts, interval, "yes" if rate.settled else "no")
        table.add_row(*map(Text, cells))
    agreed = [rate.agreement for rate in rates if rate.agreement is not None]
    if agreed:
        table.caption = f"pairs on which all people agree: {sum(agreed) / len(agreed):.0%}"
    return table
