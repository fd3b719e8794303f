"""The table of an evaluation, from its results: in Markdown, CSV and HTML, and as text for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from swd.io.files import write_json, write_text
from swd.metrics.bootstrap import FEW

RESULTS, MARKDOWN, CSV, HTML = "results.json", "table.md", "table.csv", "report.html"
PUBLISHED = Path(__file__).with_name("published.json")

ARROWS = {"higher": "↑", "lower": "↓"}
"""Which way a metric is better."""

Results = Mapping[str, Any]
"""The content of `results.json`."""


@dataclass(frozen=True)
class Grid:
    """A table as text: its title, the titles of its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def published_rows(models: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The published numbers, each row with where it is from.

    Args:
        models: of these models of conf/model alone; None: of all.
    """
    known = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = [row | {"source": known["source"]} for row in known["rows"]]
    return [row for row in rows if models is None or row["model"] in models]


def write_results(folder: Path, results: Results) -> None:
    """Write the results and every form of the table."""
    tables = grids(results)
    write_json(folder / RESULTS, results)
    write_text(folder / MARKDOWN, markdown(tables))
    write_text(folder / CSV, comma_separated(results))
    write_text(folder / HTML, html(results, tables))


# Content


def grids(results: Results, detailed: bool = True) -> list[Grid]:
    """The tables of a report: models, differences to the first one, and published numbers if they are there.

    Args:
        results: of an evaluation; costs and differences that are absent are shown as dashes.
        detailed: whether the parts of a picture's time and published times have columns.
    """
    found = [models_grid(results, detailed)]
    if results.get("pairs"):
        found.append(pairs_grid(results))
    if results.get("published"):
        found.append(published_grid(results, detailed))
    return found


def models_grid(results: Results, detailed: bool = True) -> Grid:
    """One row a model: metrics with intervals and costs."""
    names = metric_names(results)
    better = {name: metric.get("better") for row in results["models"] for name, metric in row["metrics"].items()}
    columns = ["model", *(f"{name} {ARROWS.get(better[name], '')}".strip() for name in names)]
    columns += ["steps", "evaluations", "TFLOP", f"s / picture{how_timed(results)}"]
    columns += ["text + denoising + decoding"] if detailed else []
    columns += ["memory, GB"]
    rows = []
    for row in results["models"]:
        time = row.get("latency") or {}
        parts = [number_text(time.get(name)) for name in ("text_s", "denoise_s", "decode_s")] if time else []
        memory = row.get("peak_memory_bytes")
        rows.append(
            [
                str(row["name"]),
                *(with_interval(row["metrics"].get(name)) for name in names),
                *(number_text(row.get(name)) for name in ("steps", "evaluations", "tflop")),
                number_text(time.get("per_picture_s")),
                *([" + ".join(parts) or number_text(None)] if detailed else []),
                number_text(None if memory is None else memory / 1e9),
            ]
        )
    n = results["prompts"]["n"] * results.get("images_per_prompt", 1)
    return Grid(f"Models, {n:,} pictures each{doubt(results)}", columns, rows)


def how_timed(results: Results) -> str:
    """In brackets, what the timed pipelines had that those which drew the pictures had not; empty if nothing.

    It is the same for all rows.
    """
    times = [row.get("latency") or {} for row in results["models"]]
    time = next((each for each in times if each), {})
    parts = [str(time.get("precision", ""))]
    parts += ["compiled" + (" with coders" if time.get("compile_coders") else "") if time.get("compile") else ""]
    parts += ["tiny VAE" if time.get("tiny_vae") else ""]
    found = ", ".join(part for part in parts if part)
    return f" ({found})" if found else ""


def doubt(results: Results) -> str:
    """A warning for the title of a table whose intervals rest on few prompts; empty otherwise."""
    n = results["prompts"]["n"]
    known = [metric.get("low") for row in results["models"] for metric in row["metrics"].values()]
    few = n < FEW and any(low is not None for low in known)
    return f" ({n} prompts: intervals of fewer than {FEW} are too narrow)" if few else ""


def pairs_grid(results: Results) -> Grid:
    """Differences to the first model; they are settled where the interval leaves out 0."""
    rows = []
    for pair in results["pairs"]:
        low, high = pair.get("low"), pair.get("high")
        verdict = "–" if low is None else "yes" if low > 0 or high < 0 else "no"
        text = with_interval({**pair, "value": pair["difference"]})
        rows.append([str(pair["b"]), str(pair["metric"]), text, verdict])
    first = results["pairs"][0]["a"]
    return Grid(f"Differences to {first}{doubt(results)}", ["model", "metric", f"minus {first}", "settled"], rows)


def published_grid(results: Results, detailed: bool = True) -> Grid:
    """Published numbers: measured by others, with other programs, on other machines."""
    found = results["published"]
    names = list(dict.fromkeys(str(name) for row in found for name in row.get("metrics", {})))
    rows = [
        [
            str(row["name"]),
            str(row["data"]),
            number_text(row.get("steps")),
            *(number_text(row.get("metrics", {}).get(name)) for name in names),
            *([number_text(row.get("per_picture_s"))] if detailed else []),
        ]
        for row in found
    ]
    columns = ["model", "data", "steps", *names, *(["s / picture"] if detailed else [])]
    return Grid(f"Published, not measured here ({found[0]['source']})", columns, rows)


def metric_names(results: Results) -> list[str]:
    """Names of all metrics, in order."""
    return list(dict.fromkeys(str(name) for row in results["models"] for name in row["metrics"]))


def with_interval(metric: Mapping[str, Any] | None) -> str:
    """A value as "2.68 [2.51, 2.90]", with its floor where it has one."""
    if metric is None:
        return number_text(None)
    text = number_text(metric["value"])
    if metric.get("low") is not None:
        text += f" [{number_text(metric['low'])}, {number_text(metric['high'])}]"
    return f"{text}, floor {number_text(metric['floor'])}" if metric.get("floor") is not None else text


def number_text(value: Any) -> str:
    """A number with 4 significant digits, a whole number as it is, and a dash for none."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:#.4g}".rstrip(".") if 1e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


# Forms


def markdown(tables: Sequence[Grid]) -> str:
    """Tables in Markdown; a bar inside a cell is escaped."""
    parts = []
    for grid in tables:
        lines = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"**{grid.title}**\n\n{body}\n")
    return "\n".join(parts)


def comma_separated(results: Results) -> str:
    """One line a model, one column a number, at full precision."""
    names = metric_names(results)
    found = [_flat(row) for row in results["models"]]
    columns = ["name", "source", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))]
    columns += list(dict.fromkeys(key for row in found for key in row if key not in columns))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return stream.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in ("name", "source", "steps", "evaluations", "tflop", "peak_memory_bytes")}
    for key, value in (row["latency"] or {}).items():
        flat[f"latency_{key}"] = value
    for name, metric in row["metrics"].items():
        for key, value in metric.items():
            flat[name if key == "value" else f"{name}_{key}"] = value
    return flat


def html(results: Results, tables: Sequence[Grid]) -> str:
    """A page that loads no other file; all texts are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("results.html.j2").render(results=results, grids=tables)
