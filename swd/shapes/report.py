"""A self-contained HTML page about one run: it opens from disk and loads nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

from swd.io.pictures import to_pil

# What a page is made of


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, its explanation, and how a row's value reads."""

    title: str
    help: str
    text: Callable[[Mapping[str, Any]], str]


COLUMNS = (
    Column("model", "who draws", lambda row: str(row["name"])),
    Column("steps", "generation steps", lambda row: str(row["steps"])),
    Column("evaluations", "network evaluations per picture; guidance takes two a step", lambda row: str(row["nfe"])),
    Column("GFLOP", "of the network, per picture", lambda row: f"{row['gflop']:.2f}"),
    Column("ms / image", "network and VAE, per picture, median over batches", lambda row: f"{row['ms_per_image']:.1f}"),
    Column("FID", "Fréchet distance of the judge's features to rendered pictures", lambda row: significant(row["fid"])),
    Column("accuracy", "of the prompt's attributes, mean", lambda row: f"{row['prompt_accuracy']:.3f}"),
    Column("exact", "pictures that keep all of their prompt", lambda row: f"{row['exact_match']:.3f}"),
)

RATIOS = {
    "speedup_over_teacher": "the teacher's speed",
    "gflop_of_full_size_steps": "the network cost of as many full-size steps",
    "accuracy_of_teacher": "the teacher's prompt accuracy",
    "fid_of_teacher": "the teacher's FID",
}
"""What the student's ratios are ratios to."""

LOSSES = {
    "loss": "total of the student's losses",
    "x0_mse": "squared distance of the student's prediction to the data",
    "mmd": "distance of feature means (MMD)",
    "dmd": "distribution matching against the teacher (DMD)",
    "dmd_gap": "mean distance between fake score and teacher",
    "gan": "student against the discriminator (GAN)",
    "fake_score": "fake score's error on the student's pictures",
    "discriminator": "discriminator's own loss",
    "discriminator_accuracy": "share that the discriminator gets right",
}


@dataclass(frozen=True)
class Comparison:
    """One prompt: the picture `[3, H, W]` in [-1, 1] and the judge's mark of every model, by name of its row."""

    prompt: str
    pictures: Mapping[str, Tensor]
    marks: Mapping[str, str]


@dataclass(frozen=True)
class Progression:
    """One prompt: the student's prediction `[3, H, W]` in [-1, 1] at every step, each with a label."""

    prompt: str
    steps: Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Page:
    """All that a report shows.

    Attributes:
        results: what `results.json` holds.
        comparisons: prompts side by side.
        progressions: the student step by step.
        curves: every loss, one value an iteration.
        cycle: iterations after which the schedule repeats; curves are smoothed over it.
        config: the resolved configuration.
    """

    results: Mapping[str, Any]
    comparisons: Sequence[Comparison]
    progressions: Sequence[Progression]
    curves: Mapping[str, Sequence[float]]
    cycle: int
    config: str


# Numbers as text


def significant(value: float, digits: int = 3) -> str:
    """A number with that many significant digits and no exponent."""
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratio_lines(results: Mapping[str, Any]) -> list[str]:
    """The ratios, one line each, with what is expected of them."""
    lines = []
    for key, text in RATIOS.items():
        ratio = results["ratios"][key]
        value = "undefined" if ratio["value"] is None else f"{ratio['value']:.2f}"
        verdict = (
            "" if ratio["met"] is None else f"  (expected {ratio['expected']}: {'met' if ratio['met'] else 'missed'})"
        )
        lines.append(f"student: {value} x {text}{verdict}")
    return lines


# The page


def render(page: Page) -> str:
    """The page as one HTML document."""
    results = page.results
    sections = (
        _section("Models compared", _models(results)),
        _section("Same prompts, same seeds", _comparisons(page.comparisons)),
        _section("The student, size by size", _progressions(page.progressions)),
        _section("Losses", _curves(page)),
        _section("This run", _run(results, page.config)),
    )
    title = "Scale-wise distillation: demo report"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(results)}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _head(results: Mapping[str, Any]) -> str:
    teacher, student = results["rows"][0], results["rows"][-1]
    sizes = results["schedule"]["pixels"]
    terms = ", ".join(name.upper() for name in results["terms"])
    minutes = results["wall_seconds"]["total"] / 60
    said = (
        f"In {results['iterations']} iterations, a LoRA student was distilled from the embedded text-to-image teacher "
        f"({terms}).",
        f"The student draws in {student['steps']} steps that grow from {'×'.join(map(str, sizes[0]))} to "
        f"{'×'.join(map(str, sizes[-1]))} pixels, without guidance; the teacher takes {teacher['steps']} guided steps "
        "at full size.",
        f"All models drew the same prompts from the same seeds, {results['n_pictures']:,} held-out ones each, in "
        f"combinations that training never showed; the whole took {minutes:.1f} minutes.",
    )
    tiles = "".join(_tile(key, results["ratios"][key]) for key in RATIOS)
    return (
        "<header>\n<p class='eyebrow'>Scale-wise distillation</p>\n"
        f"<h1>{student['ms_per_image']:.0f} ms a picture instead of {teacher['ms_per_image']:.0f} ms</h1>\n"
        f"<p class='lead'>{escape(' '.join(said))}</p>\n<div class='tiles'>{tiles}</div>\n</header>"
    )


def _tile(key: str, ratio: Mapping[str, Any]) -> str:
    value = "–" if ratio["value"] is None else f"{ratio['value']:.2f}×"
    verdict = ""
    if ratio["met"] is not None:
        state, word = ("good", "as expected") if ratio["met"] else ("poor", "missed")
        expected = ratio["expected"].replace(">=", "≥").replace("<=", "≤")
        verdict = f"<span class='verdict {state}'>{word}, {escape(expected)}</span>"
    return f"<div class='tile'><b>{value}</b><span>{escape(RATIOS[key])}</span>{verdict}</div>"


def _models(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    table = _table(
        [c.title for c in COLUMNS], [[c.text(row) for c in COLUMNS] for row in rows], [c.help for c in COLUMNS]
    )
    names = list(dict.fromkeys(name for row in rows for name in row["attributes"]))
    parts = [[row["name"], *(f"{row['attributes'].get(name, math.nan):.3f}" for name in names)] for row in rows]
    by_attribute = _table(["accuracy by attribute", *names], parts)
    stored = [row["name"] for row in rows if row["source"] != "live"]
    notes = [
        "GFLOP count the network alone (a multiply-add is two). Times include the VAE, not the text encoders; they "
        "were taken on this machine, in this run.",
        "Accuracy and FID are a small classifier's: it reads shape, colour, size, place and background, and its "
        f"features serve FID. Two sets of as many rendered pictures are {significant(results['fid_floor'])} apart: no "
        "model can be expected to come below.",
    ]
    if stored:
        notes.append(
            f"Accuracy and FID of {' and '.join(stored)} come from statistics stored with the weights (recompute=true "
            "draws the pictures again); its time was taken in this run."
        )
    return table + by_attribute + "".join(f"<p class='note'>{escape(note)}</p>\n" for note in notes)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], helps: Sequence[str] = ()) -> str:
    hints = [f' title="{escape(text)}"' for text in helps] or [""] * len(titles)
    head = "".join(f"<th scope='col'{hint}>{escape(text)}</th>" for text, hint in zip(titles, hints, strict=True))
    body = "".join(
        f"<tr><th scope='row'>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    return f"<div class='wide'><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    cards = []
    for comparison in comparisons:
        figures = [
            _figure(picture, comparison.prompt, name, comparison.marks[name])
            for name, picture in comparison.pictures.items()
        ]
        cards.append(_card(comparison.prompt, figures, "row"))
    note = (
        "The first prompts of the evaluation, none left out. The mark says how many of the prompt's statements the "
        "judge finds in the picture."
    )
    return f"<p class='note'>{escape(note)}</p>\n<div class='cards'>{''.join(cards)}</div>"


def _progressions(progressions: Sequence[Progression]) -> str:
    cards = [
        _card(p.prompt, [_figure(picture, p.prompt, label) for label, picture in p.steps], "row sizes")
        for p in progressions
    ]
    note = (
        "What the student would return after each step, at its true relative size. Every prediction is enlarged, "
        "noised to the next level σ, and refined."
    )
    return f"<p class='note'>{escape(note)}</p>\n<div class='cards'>{''.join(cards)}</div>"


def _card(prompt: str, figures: Sequence[str], kind: str) -> str:
    return f"<article><h3>{escape(prompt)}</h3><div class='{kind}'>{''.join(figures)}</div></article>\n"


def _figure(picture: Tensor, prompt: str, label: str, mark: str = "") -> str:
    caption = escape(label) + (f" <span class='mark'>{escape(mark)}</span>" if mark else "")
    return f"<figure>{image(picture, f'{label}: {prompt}')}<figcaption>{caption}</figcaption></figure>"


def _curves(page: Page) -> str:
    if not page.curves:
        return "<p class='note'>This run kept no losses (logger=none).</p>"
    order = [*(name for name in LOSSES if name in page.curves), *(name for name in page.curves if name not in LOSSES)]
    charts = "".join(
        f"<figure><figcaption><b>{escape(name)}</b> {escape(LOSSES.get(name, ''))}</figcaption>"
        f"{chart(page.curves[name], page.cycle, name)}</figure>\n"
        for name in order
    )
    legend = (
        "<p class='legend'><span><i class='raw'></i>each iteration</span>"
        f"<span><i class='mean'></i>mean over the schedule's {page.cycle} steps</span></p>"
    )
    note = (
        "dmd, mmd and their sum should fall over hundreds of iterations; batches differ far more. Adversarial "
        "and fake-score losses need not, nor x0_mse: "
        "sharp pictures are further from the data than blurred ones."
    )
    return f"{legend}\n<div class='charts'>{charts}</div>\n<p class='note'>{note}</p>"


def _run(results: Mapping[str, Any], config: str) -> str:
    times = [[name, f"{seconds:.1f}"] for name, seconds in results["wall_seconds"].items()]
    facts = [
        ["command", results["command"]],
        ["folder", results["folder"]],
        ["machine", _listed(results["machine"])],
        ["versions", _listed(results["versions"])],
    ]
    return (
        f"<div class='pair'><div>{_table(['phase', 'seconds'], times)}</div>"
        f"<div class='facts'>{_table(['about', ''], facts)}</div></div>\n"
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


# Pictures


def image(pixels: Tensor, alt: str) -> str:
    """An `<img>` that holds the picture `[3, H, W]` in [-1, 1] itself, as PNG."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[1:]
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}" title="{escape(alt)}">'
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 210, 56, 12, 10, 30
"""Of a chart, in its own units: outer size and margins."""


def chart(values: Sequence[float], cycle: int, name: str) -> str:
    """A curve as inline SVG: every value faintly, and its mean over whole cycles on top."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return "<p class='note'>no finite value</p>"
    ticks = nice_ticks(min(known), max(known))
    low, high = min(*ticks, *known), max(*ticks, *known)
    last = max(len(values), 2)

    def x(iteration: float) -> float:
        return LEFT + (iteration - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[tuple[float, float]], kind: str) -> str:
        text = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points if math.isfinite(v))
        return f'<polyline class="{kind}" points="{text}"/>'

    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 3.5:.1f}" text-anchor="end">{tick_text(t, ticks)}</text>'
        for t in ticks
    )
    marks = sorted({1, *(int(t) for t in nice_ticks(1, last) if 1 <= t <= last)})
    if len(marks) > 1 and marks[1] - marks[0] < last / 12:
        marks.pop(1)
    axis = "".join(f'<text x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{i}</text>' for i in marks)
    smooth = rolling_mean(values, cycle)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} by iteration">{grid}{axis}'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">iteration</text>'
        f"{path(list(enumerate(values, 1)), 'raw')}{path(smooth, 'mean')}</svg>"
    )


def rolling_mean(values: Sequence[float], cycle: int) -> list[tuple[float, float]]:
    """Means of `cycle` neighbours, each with the middle of their iterations (from 1)."""
    width = max(1, min(cycle, len(values)))
    return [
        (start + (width + 1) / 2, sum(values[start : start + width]) / width)
        for start in range(len(values) - width + 1)
    ]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that span `low`..`high`."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as tell it from its neighbours."""
    step = abs(ticks[1] - ticks[0])
    if step < 1e-4 or abs(tick) >= 1e5:
        return f"{tick:.1e}" if tick else "0"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1c1d1f; --soft: #63666b; --line: #e2e2de;
  --accent: #2459c4; --raw: #a9bfe9; --good: #1c7a43; --poor: #a8500a; --tint: #eef3fd; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1c1e21; --ink: #ececea; --soft: #a0a4aa;
  --line: #313439; --accent: #86aefc; --raw: #3d5485; --good: #6fce93; --poor: #eda65e; --tint: #1f2937; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 72px; }
h1 { font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  margin: 0 0 14px; text-wrap: balance; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 14px; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 10px; line-height: 1.35; }
section { margin-top: 52px; }
.eyebrow { margin: 0 0 8px; color: var(--accent); font-weight: 600; font-size: .9rem; }
.lead { max-width: 76ch; margin: 0; font-size: 1.05rem; color: var(--soft); }
.note { max-width: 82ch; margin: 10px 0; font-size: .9rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin-top: 26px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; }
.tile span { display: block; font-size: .87rem; color: var(--soft); }
.tile .verdict { margin-top: 6px; font-weight: 600; }
.tile .good { color: var(--good); } .tile .poor { color: var(--poor); }
.wide { overflow-x: auto; margin-bottom: 14px;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap; }
thead th { font-weight: 600; font-size: .83rem; color: var(--soft); border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
tbody th { font-weight: 400; } tbody tr + tr > * { border-top: 1px solid var(--line); }
section:first-of-type tbody tr:last-child > * { background: var(--tint); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 14px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.row { display: flex; gap: 12px; } .row figure { flex: 1 1 0; min-width: 0; }
.sizes { align-items: flex-end; } .sizes figure { flex: 0 1 auto; }
figure { margin: 0; } figcaption { font-size: .8rem; line-height: 1.35; color: var(--soft); margin-top: 5px; }
img { display: block; width: 100%; height: auto; border-radius: 5px; }
.sizes img { width: auto; max-width: 100%; border-radius: 3px; image-rendering: pixelated; }
.mark { font-variant-numeric: tabular-nums; color: var(--ink); font-weight: 600; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; }
.charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px 8px;
  display: flex; flex-direction: column; justify-content: space-between; }
.charts figcaption { margin: 0 0 6px; } .charts b { color: var(--ink); font-size: .9rem; margin-right: 4px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
polyline { fill: none; stroke-linejoin: round; }
polyline.raw { stroke: var(--raw); stroke-width: 1; } polyline.mean { stroke: var(--accent); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 0 0 12px; font-size: .87rem; color: var(--soft); }
.legend i { display: inline-block; width: 22px; margin-right: 8px; vertical-align: middle;
  border-top: 2px solid var(--accent); }
.legend i.raw { border-color: var(--raw); border-top-width: 1px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 14px; align-items: start; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; } .facts th { text-align: left; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 16px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media print { body { background: #fff; } section { break-inside: avoid-page; } }
"""
