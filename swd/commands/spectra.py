"""`swd spectra`: power of encoded latents by frequency, and the size at which noise covers what a smaller one lacks.

SwD paper, section 3 (Figure 1) and appendix E (Figure 13).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swd import __version__
from swd.commands import keys, shared
from swd.commands.numbers import check_given, check_numbers
from swd.config import build, check
from swd.data.decoders import CacheDecoder
from swd.data.indexed import IndexedShards
from swd.data.job import say
from swd.data.shards import ShardSet
from swd.io.files import claim_folder, write_json, write_text
from swd.io.job_log import JobLog
from swd.metrics.spectrum import NoisedSpectrum, noised, power_in_space, power_in_time
from swd.modules.encoders import draw_latents
from swd.modules.pretrained import Pretrained
from swd.report.spectrum_chart import SpectrumCurve, spectrum_chart
from swd.types import CachedBatch, SeededDraws, Size, UserError

ROOT = keys.SPECTRA
ROWS = "spectra.csv"
SUMMARY = "spectra.json"
UNITS = {"space": "side", "time": "frames"}
"""By axis, the name of the number that says how large a grid is."""
AXES = {"space": "latent side that holds the frequency", "time": "latent frames that hold the frequency"}


@dataclass(frozen=True)
class SpectraPlan:
    """Checked settings; no latents are read yet.

    Attributes:
        model: whose latents and whose process.
        dataset: the cache.
        rows: numbers of the samples that are read.
        size: latent size of finished pictures or videos.
        step: the step of the cache's schedule that has this size.
        levels: noise levels.
    """

    model: Pretrained
    dataset: IndexedShards[Any]
    rows: list[int]
    size: Size
    step: int
    levels: list[float]


@dataclass(frozen=True)
class Spectrum:
    """Power along one axis.

    Attributes:
        axis: "space" or "time".
        length: cells of the shorter side, or frames.
        power: of the clean latents `[K + 1]`, by whole cycles.
        noised: at each level.
    """

    axis: str
    length: int
    power: Tensor
    noised: list[NoisedSpectrum]


def run(cfg: DictConfig) -> None:
    """Measure the spectra of the configuration; prints a table, and where numbers and charts lie."""
    shared.quiet()
    plan = prepare(cfg)
    folder = claim_folder(Path(cfg.folder), ROWS)
    with JobLog(f"spectra of {cfg.cache} into {folder}", len(plan.rows), "sample") as progress:
        powers = mean_powers(plan, cfg.seed, cfg.batch_size, progress.advance)
    process = plan.model.backbone_class.process
    lengths = {"space": min(plan.size[-2:]), "time": plan.size[0]}
    spectra = [
        Spectrum(axis, lengths[axis], power, [noised(power, process, level) for level in plan.levels])
        for axis, power in powers.items()
    ]
    write_spectra(folder, spectra, plan, str(cfg.cache))
    show(spectra)
    print(folder)


def prepare(cfg: DictConfig) -> SpectraPlan:
    """Check every setting against the cache.

    Raises:
        UserError: naming the setting and the fix.
    """
    # Settings alone.
    check_given(cfg, "spectra")
    check(cfg, ROOT)
    check_numbers(cfg, "spectra")
    levels = sorted({float(level) for level in cfg.levels})

    # The cache, and whether it is this model's.
    model, schedule = build(cfg, "model"), build(cfg, "schedule")
    shards = ShardSet(cfg.cache)
    kind = shards.manifest["kind"]
    if kind != "cache":
        raise UserError(
            f"cache={cfg.cache} holds {kind}, not latents; encode them: swd encode data.path={cfg.cache} ..."
        )
    decoder = CacheDecoder(shards.manifest, shards.root)
    decoder.check(model, schedule)
    try:
        dataset = IndexedShards(shards, decoder)
    except UserError as error:
        raise UserError(str(error).replace("data.path=", "cache=")) from None

    # Samples of one size: frequencies of others would mean something else.
    bucket = max(range(len(dataset.members)), key=lambda number: len(dataset.members[number]))
    rows = [int(row) for row in dataset.members[bucket]]
    if len(rows) < len(dataset):
        say(f"of {len(dataset)} samples, the {len(rows)} of the most frequent proportions are measured")
    if cfg.n is not None and cfg.n > len(rows):
        raise UserError(f"n={cfg.n}, but cache={cfg.cache} has {len(rows)} samples of one size; use at most that many")
    sizes = decoder.sizes[bucket]
    return SpectraPlan(model, dataset, rows[: cfg.n], sizes[-1], len(sizes) - 1, levels)


def mean_powers(plan: SpectraPlan, seed: int, batch_size: int, advance: Any) -> dict[str, Tensor]:
    """Mean power by frequency of all samples, in space and, of videos, in time."""
    sums: dict[str, Tensor] = {}
    for x0 in latents(plan, seed, batch_size):
        powers = {"space": power_in_space(x0)} | ({"time": power_in_time(x0)} if x0.ndim == 5 else {})
        for axis, power in powers.items():
            sums[axis] = sums.get(axis, 0) + len(x0) * power
        advance(len(x0))
    return {axis: total / len(plan.rows) for axis, total in sums.items()}


def latents(plan: SpectraPlan, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Clean latents `[B, C, *size]` of all samples, drawn from their posteriors, as a training does."""
    for start in range(0, len(plan.rows), batch_size):
        rows = plan.rows[start : start + batch_size]
        batch = cast(CachedBatch, plan.dataset.batch_of([(row, plan.step) for row in rows]))
        for text in batch.skipped:
            say(f"another sample stands in for one that cannot be read: {text}")
        mean, std = batch.cached.posteriors[plan.size]
        yield draw_latents(mean, std, SeededDraws(seed, first=start))


# Results


def write_spectra(folder: Path, spectra: list[Spectrum], plan: SpectraPlan, cache: str) -> None:
    """Write all powers as CSV, a chart of each axis, and what they come to as JSON; the CSV last."""
    for spectrum in spectra:
        title = (
            f"{plan.model.name}, {len(plan.rows)} samples of {'x'.join(map(str, plan.size))}: power in {spectrum.axis}"
        )
        write_text(folder / f"{spectrum.axis}.svg", chart_of(spectrum, title))
    about: dict[str, Any] = {
        "swd": __version__,
        "command": shared.given_command("spectra"),
        "model": plan.model.name,
        "cache": cache,
        "samples": len(plan.rows),
        "size": list(plan.size),
        "enough": [
            {"level": level} | {UNITS[each.axis]: each.noised[number].enough for each in spectra}
            for number, level in enumerate(plan.levels)
        ],
    }
    write_json(folder / SUMMARY, about)
    write_text(folder / ROWS, as_csv(spectra))


def as_csv(spectra: list[Spectrum]) -> str:
    """Rows of axis, frequency (cycles), the grid that holds it, level (0: clean), power of signal and of noise."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["axis", "frequency", "grid", "level", "signal", "noise"])
    for spectrum in spectra:
        for level, signal, noise in [
            (0.0, spectrum.power, 0.0),
            *((n.level, n.signal, n.noise) for n in spectrum.noised),
        ]:
            for frequency, power in enumerate(signal.tolist()):
                row = [spectrum.axis, frequency, max(1, 2 * frequency), f"{level:g}", f"{power:.6g}", f"{noise:.6g}"]
                writer.writerow(row)
    return stream.getvalue()


def chart_of(spectrum: Spectrum, title: str) -> str:
    """The clean spectrum, and at each level that of the noised latents over the noise alone, as SVG."""
    curves = [SpectrumCurve("clean", spectrum.power[1:].tolist(), -1)]
    for number, each in enumerate(spectrum.noised):
        curves.append(SpectrumCurve(f"level {each.level:g}", each.total[1:].tolist(), number))
        curves.append(SpectrumCurve("its noise", [each.noise] * (len(each.signal) - 1), number, dashed=True))
    return spectrum_chart(curves, title, AXES[spectrum.axis])


def show(spectra: list[Spectrum]) -> None:
    """Print the size that is enough at each level."""
    print("smallest size at which noise covers all that it lacks:")
    table = Table()
    table.add_column("level", justify="right")
    for spectrum in spectra:
        table.add_column(f"{UNITS[spectrum.axis]} of {spectrum.length}", justify="right")
    for number, first in enumerate(spectra[0].noised):
        table.add_row(f"{first.level:g}", *(str(each.noised[number].enough) for each in spectra))
    Console().print(table)
