"""`swd evaluate`: the same prompts and seeds drawn by several models, metrics with intervals, and what a picture costs.

Two phases that go on where they were stopped, over all processes: draw, then score.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from swd import __version__
from swd.commands import keys, shared
from swd.commands.group_options import composed, metric_node, option, options
from swd.commands.numbers import check_given, check_numbers
from swd.commands.sample import check_machine, check_tiny_vae, final_size
from swd.config import allowed_here, build_node, check, given_keys, node_of, overrides, to_plain
from swd.evaluation import result_files
from swd.evaluation.candidate_pictures import CandidatePainter, check_levels, check_space, draw_share
from swd.evaluation.candidates import (
    Candidate,
    DrawingModel,
    given_pictures,
    holds_pictures,
    real_pictures,
)
from swd.evaluation.entries import check_row_names, entry_of
from swd.evaluation.plan import Plan, chunks_of, mine
from swd.evaluation.score import Bootstrap, Real, Scoring
from swd.evaluation.timing import Costs, Timing, warn_of_slow_precision
from swd.export.student_folder import build_model, recorded_model, schedule_of
from swd.io import limits
from swd.io.files import only_one
from swd.io.folder_lock import held_share
from swd.io.masking import mask_text
from swd.io.ranks import is_first
from swd.metrics.base import PictureMetric
from swd.modules.adapters import locate
from swd.modules.drawing import DrawingOptions
from swd.modules.hub import is_hub_id
from swd.modules.model_folders import read_json
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Requests, check_filled, read_prompts
from swd.modules.saved_student import load_student
from swd.modules.tokens import warn_beyond
from swd.schedule import ScaleSchedule
from swd.scheduler import ScaleWiseScheduler
from swd.shapes.rendered import RenderedPictures, prompts_of
from swd.types import UserError

ROOT = keys.EVALUATE
LOCK = "scores/lock"
"""File of an evaluation's folder that the process that scores holds."""
TEACHER = "teacher"
SHAPES = "shapes"
"""Value of `prompts` and `reference` that stands for those of the embedded model."""
SHAPES_PROMPTS = 1024
"""Prompts of shapes where no number is given, and rendered pictures at least: as many as assets/shapes-judge is of."""
OF_TEACHERS, OF_STUDENTS = ("steps", "guidance_scale", "sigmas"), ("schedule",)


@dataclass(frozen=True)
class Evaluation:
    """A checked configuration; no weights are loaded yet.

    Attributes:
        plan, scoring: whose pictures are drawn, and how they are scored.
        timing: how latency is measured; None: not at all.
        published: rows of the paper's numbers that stand beside.
    """

    plan: Plan
    scoring: Scoring
    timing: Timing | None
    published: list[dict[str, Any]]


def run(cfg: DictConfig) -> None:
    """Evaluate what the configuration says; prints the table and where it lies."""
    shared.quiet()
    evaluation = prepare(cfg)
    evaluation.plan.claim()
    with held_share(evaluation.plan.folder, *evaluation.plan.share):
        draw_and_score(evaluation)


def draw_and_score(evaluation: Evaluation) -> None:
    """This process's share of drawing and features; the process that finds everything there writes the result_files."""
    plan, scoring = evaluation.plan, evaluation.scoring
    before = results_written_at(plan.folder)
    check_space(plan)
    if scoring.real is not None and isinstance(scoring.real.pictures, RenderedPictures):
        chunks = chunks_of(len(scoring.real.pictures.files), plan.chunk_size)
        scoring.real.pictures.render(row for _, rows in mine(chunks, plan.share) for row in rows)
    shared.use_own_gpu()
    warn_of_long_prompts(plan)
    for candidate in plan.candidates:
        if isinstance(candidate, DrawingModel):
            draw_and_measure(plan, candidate, evaluation.timing)
    scoring.extract_share()
    rank, world = plan.share
    if not is_complete(evaluation):
        print(f"process {rank + 1} of {world} is through; the last one scores")
        return
    with only_one(plan.folder / LOCK) as is_mine:
        if is_mine and not was_written(plan.folder, before):
            score_and_print(evaluation)
        else:
            print(f"process {rank + 1} of {world} is through; another one scores")


def results_written_at(folder: Path) -> int | None:
    """When the results were written, in nanoseconds; None if they are not there."""
    file = folder / result_files.RESULTS
    return file.stat().st_mtime_ns if file.is_file() else None


def was_written(folder: Path, before: int | None) -> bool:
    """Whether another process of this command has written the results, since they were written `before`."""
    if results_written_at(folder) in (None, before):
        return False
    return bool(read_json(folder / result_files.RESULTS).get("command") == shared.given_command("evaluate"))


def score_and_print(evaluation: Evaluation) -> None:
    """Compute what the table holds, write it, and print it."""
    plan = evaluation.plan
    for candidate in plan.candidates:
        plan.write_index(candidate)
    results = results_of(evaluation)
    result_files.write_results(plan.folder, results)
    for grid in result_files.grids(results):
        print_grid(grid)
    print(plan.folder / result_files.HTML)


def draw_and_measure(plan: Plan, candidate: DrawingModel, timing: Timing | None) -> None:
    """This process's share of one model's pictures; the first process also measures what they cost."""
    painter, costs = CandidatePainter(plan, candidate), Costs(plan, candidate, timing)
    draw_share(painter)
    if is_first() and costs.load() is None:
        costs.measure(painter)
    painter.free()


def is_complete(evaluation: Evaluation) -> bool:
    """Whether everything that the results are made of is there, of all processes."""
    plan = evaluation.plan
    drawing = [candidate for candidate in plan.candidates if isinstance(candidate, DrawingModel)]
    drawn = all(file.is_file() for candidate in drawing for file in plan.pictures(candidate).files)
    measured = all(Costs(plan, candidate, evaluation.timing).load() is not None for candidate in drawing)
    return drawn and measured and evaluation.scoring.is_complete


def warn_of_long_prompts(plan: Plan) -> None:
    """Warn once for each base whose text encoder does not see some prompts to their end."""
    prompts, warned = [prompt for prompt, _ in plan.requests.rows], set()
    for candidate in plan.candidates if is_first() else ():
        if isinstance(candidate, DrawingModel) and candidate.model.name not in warned:
            warned.add(candidate.model.name)
            warn_beyond(candidate.model, prompts)


# Results


def results_of(evaluation: Evaluation) -> dict[str, Any]:
    """Everything for `results.json`."""
    plan, scoring = evaluation.plan, evaluation.scoring
    scores = scoring.scores()
    rows = []
    for candidate in plan.candidates:
        costs: Mapping[str, Any] = {}
        if isinstance(candidate, DrawingModel):
            costs = Costs(plan, candidate, evaluation.timing).load() or {}
        known = {key: costs.get(key) for key in ("steps", "evaluations", "tflop", "latency", "peak_memory_bytes")}
        metrics = {name: scores[name]["models"][candidate.name] for name in scoring.metrics}
        rows.append({"name": candidate.name, "source": mask_text(candidate.source), **known, "metrics": metrics})
    return {
        "format": 1,
        "prompts": {"file": plan.prompts, "n": len(plan.requests.rows), "hash": plan.rows_hash},
        "images_per_prompt": plan.requests.copies,
        "seeds": {"first": plan.requests.seed, "own": any(seed is not None for _, seed in plan.requests.rows)},
        "command": shared.given_command("evaluate"),
        "version": __version__,
        "bootstrap": {"draws": scoring.bootstrap.draws, "level": scoring.bootstrap.level},
        "models": rows,
        "pairs": [pair for name in scoring.metrics for pair in scores[name]["pairs"]],
        "published": evaluation.published,
    }


def print_grid(grid: result_files.Grid) -> None:
    """Print a table on standard output."""
    printed = Table(title=grid.title, title_justify="left")
    for i, column in enumerate(grid.columns):
        printed.add_column(column, justify="right" if i else "left")
    for row in grid.rows:
        printed.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(printed, markup=False)


# Configuration


def prepare(cfg: DictConfig) -> Evaluation:
    """Check everything that can be checked before anything is drawn.

    Raises:
        UserError: naming what is wrong and the fix.
    """
    check_given(cfg, "evaluate")
    check(cfg, ROOT)
    check_numbers(cfg, "evaluate")
    timing = timing_of(cfg)
    requests = evaluated_requests(cfg)
    metrics, settings = metrics_of(cfg)
    candidates = candidates_of(cfg, requests)
    if timing is not None:
        check_timing(timing, candidates)
    plan = Plan(Path(cfg.folder), Path(cfg.prompts).name, requests, candidates, cfg.batch_size, cfg.chunk_size)
    bootstrap = Bootstrap(cfg.bootstrap.draws, cfg.bootstrap.level, cfg.bootstrap.seed)
    scoring = Scoring(plan, metrics, real_of(cfg, requests), bootstrap, settings)
    scoring.check()
    return Evaluation(plan, scoring, timing, published_of(cfg, candidates))


def published_of(cfg: DictConfig, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The paper's numbers that were asked for: those of the models in the table, or all.

    Raises:
        UserError: for another value, or models that the paper has no numbers of.
    """
    if cfg.published not in (True, False, "all"):
        raise UserError(f"published={cfg.published}; use true for the models in the table, all, or false")
    if cfg.published is False:
        return []
    everything = result_files.published_rows()
    if cfg.published == "all":
        return everything
    # A model is known by the last part of its path, so that a copy in a folder of that name is found too.
    names = {each: Path(option("model", each, "published")["path"]).name for each in {r["model"] for r in everything}}
    there = {Path(candidate.model.name).name for candidate in candidates if isinstance(candidate, DrawingModel)}
    found = result_files.published_rows({each for each, name in names.items() if name in there})
    if not found:
        raise UserError(
            f"published=true: the paper has no numbers of {', '.join(sorted(there)) or 'these pictures'}; use "
            "published=all for those of all its models, or leave it out"
        )
    return found


def timing_of(cfg: DictConfig) -> Timing | None:
    """How latency is measured; None: not at all.

    Raises:
        UserError: for an option that this machine lacks something for.
    """
    if cfg.timing is None:
        return None
    given = to_plain(cfg.timing)
    settings = {key: given.pop(key) for key in ("tiny_vae", "compile", "compile_coders") if key in given}
    timing = Timing(**given, options=DrawingOptions(**settings))
    check_machine(timing.options, "timing.")
    return timing


def check_timing(timing: Timing, candidates: Sequence[Candidate]) -> None:
    """Raise UserError for a tiny VAE that does not fit one of the models; warn of a precision that is slow here."""
    warn_of_slow_precision(timing.precision)
    for candidate in candidates:
        if timing.options.tiny_vae is not None and isinstance(candidate, DrawingModel):
            check_tiny_vae(timing.options.tiny_vae, candidate.model, "timing.tiny_vae")


def evaluated_requests(cfg: DictConfig) -> Requests:
    """The first `n` prompts of the list, with their seeds.

    Raises:
        UserError: if the list cannot be read, or is too short.
    """
    if cfg.prompts == SHAPES and not Path(SHAPES).exists():
        count = SHAPES_PROMPTS if cfg.n is None else cfg.n
        limits.whole("n", count, 2, limits.MOST_ROWS, "more than one folder holds")
        return Requests([(prompt, None) for prompt in prompts_of(count)], cfg.images_per_prompt, cfg.seed)
    rows = read_prompts(Path(cfg.prompts), "prompts", ("prompt", "caption"))
    if cfg.n is not None and cfg.n > len(rows):
        raise UserError(f"n={cfg.n}, but {cfg.prompts} has {len(rows)} prompts; use at most that many")
    rows = rows[: cfg.n]
    check_filled(rows, cfg.prompts)
    return Requests(rows, cfg.images_per_prompt, cfg.seed)


def real_of(cfg: DictConfig, requests: Requests) -> Real | None:
    """The reference of the metrics; of shapes, at least twice as many as each model draws: halves make a floor.

    Raises:
        UserError: if it is neither a folder of pictures nor a file of statistics.
    """
    if cfg.reference is None:
        return None
    path = Path(cfg.reference)
    if cfg.reference == SHAPES and not path.exists():
        count = max(2 * len(requests), SHAPES_PROMPTS)
        return Real(pictures=RenderedPictures.at(Path(cfg.folder) / "reference", count))
    if path.is_dir():
        return Real(pictures=real_pictures(path))
    if path.is_file() and path.suffix == ".npz":
        return Real(statistics=path)
    reason = "is no folder and no .npz" if path.exists() else "does not exist"
    raise UserError(f"reference={path} {reason}; give a folder of real pictures, or an .npz with mu and sigma")


# Metrics


def metrics_of(cfg: DictConfig) -> tuple[dict[str, PictureMetric], dict[str, Any]]:
    """The metrics by the name of their column, and their options as plain values.

    Raises:
        UserError: for an entry that is none, a name that two have, or an option that is wrong.
    """
    metrics: dict[str, PictureMetric] = {}
    settings: dict[str, Any] = {}
    for entry in to_plain(cfg.metrics):
        name, node = metric_node(entry)
        metric = build_node(node, f"metrics.{name}" if name else "metrics", allowed_here(cfg))
        if not isinstance(metric, PictureMetric):
            raise UserError(f"metrics: {entry!r} is a {type(metric).__name__}, no metric of pictures")
        name = name or metric.name
        check_row_names([name])
        if name in metrics:
            raise UserError(f"metrics: two are called {name}; give one another name: {{name: NAME, metric: ...}}")
        metrics[name], settings[name] = metric, node
    if not metrics:
        raise UserError(f"metrics is empty; choose some of {', '.join(options('metric'))}")
    return metrics, settings


# Models


def candidates_of(cfg: DictConfig, requests: Requests) -> tuple[Candidate, ...]:
    """The candidates, in order.

    Raises:
        UserError: for an entry that is none, a name that two have, or pictures of different sizes.
    """
    entries = [entry_of(entry) for entry in to_plain(cfg.models)]
    if not entries:
        raise UserError("models is empty; give models='[teacher, RUN]'")
    names = [entry["name"] for entry in entries]
    check_row_names(names)
    found = tuple(candidate_of(entry, entries, cfg, requests) for entry in entries)
    given = [key for key in given_keys() if key.partition(".")[0] == "schedule"]
    if given and not any(isinstance(c, DrawingModel) and c.student for c in found):
        raise UserError(f"{given[0]} is of a student, and models has none; remove it")
    sizes = {c.name: c.model.pixel_size(c.size) for c in found if isinstance(c, DrawingModel)}
    for name, size in sizes.items():
        first = next(iter(sizes))
        if size != sizes[first]:
            raise UserError(
                f"models: {name} draws {_pixels(size)} and {first} {_pixels(sizes[first])} pixels; give one size to "
                "all: height= and width="
            )
    return found


def _pixels(size: Sequence[int]) -> str:
    return "x".join(map(str, reversed(size)))


def candidate_of(
    entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], cfg: DictConfig, requests: Requests
) -> Candidate:
    """One model, or one folder of pictures."""
    name, source = entry["name"], entry["model"]
    if source == TEACHER:
        refuse_keys(entry, OF_STUDENTS, "a teacher has no schedule of sizes")
        base = base_of(entry)["model"] if "base" in entry else teacher_node(entries, cfg)
        return teacher_candidate(entry, base, cfg)
    if not is_hub_id(source) and is_pictures(source, cfg):
        refuse_keys(entry, ("base", *OF_TEACHERS, *OF_STUDENTS), "these pictures are drawn already")
        return given_pictures(name, source, requests)
    refuse_keys(entry, OF_TEACHERS, "a student draws as its schedule says, without guidance")
    return student_candidate(entry, cfg)


def refuse_keys(entry: Mapping[str, Any], keys: Sequence[str], why: str) -> None:
    """Raise UserError for an option that an entry cannot have."""
    for key in keys:
        if key in entry:
            raise UserError(f"models: {entry['name']} has {key}, but {why}; leave it out")


def is_pictures(source: str, cfg: DictConfig) -> bool:
    """Whether a path holds pictures and no student.

    Raises:
        UserError: if it holds neither.
    """
    try:
        locate(source, Path(cfg.output), "models")
        return False
    except UserError as error:
        if source != "latest" and holds_pictures(Path(source)):
            return True
        hint = " or a folder of pictures" if source != "latest" else ""
        raise UserError(f"{error}{hint}") from None


def teacher_node(entries: Sequence[Mapping[str, Any]], cfg: DictConfig) -> Any:
    """The teacher of the first student that has one recorded, unless the command line names a model."""
    for entry in entries:
        source = entry["model"]
        if source != TEACHER and (is_hub_id(source) or not is_pictures(source, cfg)):
            return recorded_model(locate(source, Path(cfg.output), "models"), cfg)
    return node_of(cfg, "model")


def teacher_candidate(entry: Mapping[str, Any], node: Any, cfg: DictConfig) -> DrawingModel:
    """The teacher with its own sampler, its steps and its guidance, or those of the entry."""
    name = entry["name"]
    model = build_pictures_model(node, name, cfg)
    sigmas = entry.get("sigmas")
    if sigmas is not None:
        if "steps" in entry:
            raise UserError(f"models: {name} has both steps and sigmas; each sigma is a step, give one of them")
        check_levels(name, sigmas, model)
    steps = len(sigmas) if sigmas is not None else entry.get("steps", model.teacher_steps)
    limits.whole(f"models: steps of {name}", steps, 1, limits.STEPS)
    model.draw_with(steps, entry.get("guidance_scale"))
    levels = None if sigmas is None else tuple(map(float, sigmas))
    return DrawingModel(name, TEACHER, model, None, None, final_size(cfg, model), steps, levels)


def student_candidate(entry: Mapping[str, Any], cfg: DictConfig) -> DrawingModel:
    """An adapter or a network with its schedule, or the one of the entry."""
    name = entry["name"]
    source = locate(entry["model"], Path(cfg.output), "models")
    found = load_student(source)
    node = recorded_model(source, cfg)
    if "base" in entry:
        cfg = on_base(cfg, base_of(entry))
        node = node_of(cfg, "model")
    model = build_pictures_model(node, name, cfg)
    found = found.fitted(model)
    schedule = own_schedule(entry["schedule"], model, cfg) if "schedule" in entry else schedule_of(source, cfg, model)
    size = final_size(cfg, model, schedule.base_sizes[-1])
    return DrawingModel(name, entry["model"], model, found, schedule, size, len(schedule.config.sigmas))


def base_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The model of conf/model that an entry names as its base, and the schedule that its students have by default.

    Raises:
        UserError: if there is no such model.
    """
    return composed("model", entry["base"], f"models: base of {entry['name']}")


def on_base(cfg: DictConfig, base: Mapping[str, Any]) -> DictConfig:
    """The configuration with another model, and with its schedule unless the command line names one."""
    other = cfg.copy()
    OmegaConf.set_struct(other, False)
    chosen = any(re.match(r"\+*schedule[.=@]", override) for override in overrides())
    for group in ("model",) if chosen else ("model", "schedule"):
        other[group] = base[group]
    return other


def own_schedule(given: str | dict[str, Any], model: Pretrained, cfg: DictConfig) -> ScaleWiseScheduler:
    """The sampler of a schedule that an entry names, or gives as sigmas and sizes."""
    node = option("schedule", given, "models") if isinstance(given, str) else given
    target = {"_target_": "swd.schedule.ScaleSchedule"}
    schedule: ScaleSchedule = build_node(target | node, "models.schedule", allowed_here(cfg))
    sampler = schedule.scheduler(model.limits.divisor, model.backbone_class.process.prediction_type)
    for size in sampler.base_sizes:
        model.limits.check_size(size)
    return sampler


def build_pictures_model(node: Any, name: str, cfg: DictConfig) -> Pretrained:
    """A base that draws pictures; each row has one of its own, since steps and guidance are set on it."""
    model = build_model(node, cfg)
    if model.backbone_class.video:
        raise UserError(f"models: {name} draws videos, and these metrics are of pictures; sample it with swd sample")
    return model
