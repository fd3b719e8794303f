"""Small folders of runs and evaluations, with texts that would break a page which does not escape them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

EVIL = "a </script><script>document.title='broken'</script></style> '\"& star"


def write_picture(file: Path, colour: str, width: int = 64, height: int = 64) -> Path:
    """A picture of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(file)
    return file


def write_run(
    folder: Path, lines: Sequence[str], sheets: Sequence[int] = (), sizes: Sequence[int] = (2, 4), **config: Any
) -> Path:
    """A run with lines of `metrics.csv` below the header step,train/mmd,train/loss,metrics/fid/128."""
    folder.mkdir(parents=True)
    settings = {
        "name": folder.name,
        "schedule": {"sigmas": [1.0, 0.7], "sizes": list(sizes)},
        "loss": {"mmd": {"weight": 1.0}},
        "callbacks": {"samples": {"prompts": [EVIL, "a ring"]}},
    } | config
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "run.json").write_text(json.dumps({"command": f"train.py name={EVIL}"}))
    (folder / "metrics.csv").write_text("\n".join(["step,train/mmd,train/loss,metrics/fid/128", *lines]) + "\n")
    for iteration in sheets:
        colour = f"#{iteration % 256:02x}8040"
        write_picture(folder / "samples" / f"iteration-{iteration:06d}.png", colour, 8 * sum(sizes) + 2, 66)
    return folder


def model_row(name: str, value: float, **more: Any) -> dict[str, Any]:
    """A row of an evaluation."""
    fid = {"value": value, "low": value - 0.5, "high": value + 0.5, "floor": 0.25, "better": "lower"}
    return {
        "name": name,
        "source": name,
        "steps": 4,
        "evaluations": 8,
        "tflop": 0.0079448,
        "latency": {"per_picture_s": 0.3},
        "peak_memory_bytes": 2_500_000_000,
        "metrics": {"fid": fid},
    } | more


def write_evaluation(folder: Path, pictures: int = 2, **more: Any) -> Path:
    """An evaluation of a teacher and a student with an evil prompt, and pictures of both."""
    results = {
        "format": 1,
        "prompts": {"file": EVIL, "n": 500, "hash": "0"},
        "images_per_prompt": 2,
        "command": f"swd evaluate {EVIL}",
        "models": [model_row("teacher", 2.0), model_row("student", 3.0)],
        "pairs": [{"a": "teacher", "b": "student", "metric": "fid", "difference": 1.0, "low": 0.5, "high": 1.5}],
        "published": [],
    } | more
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    for model, colour in (("teacher", "red"), ("student", "blue")):
        lines = []
        for row in range(pictures):
            write_picture(folder / "pictures" / model / f"{row:08d}.png", colour)
            lines.append(json.dumps({"index": row, "prompt": EVIL, "seed": row, "file": f"{row:08d}.png"}))
        (folder / "pictures" / model / "index.jsonl").write_text("\n".join(lines) + "\n")
    return folder
