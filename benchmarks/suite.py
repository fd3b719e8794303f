"""Training and sampling at real size with random weights: time by phase, memory, utilisation, latency, by family.

    make bench                                     all, most valuable first; each result is written as it is made
    make bench ARGS='--only sd35_medium'           one model; several with commas
    make bench ARGS='--out FOLDER --minutes 10'    start nothing more after ten minutes

On a GPU networks have their published sizes, on the CPU a few narrow blocks. Nothing is downloaded: configurations ship
with the package (`assets/published/`), weights are random, data are encoded already and the same again and again.

FOLDER gets results.csv, results.md and results.svg. Operations are counted without weights (`swd/modules/dry_run.py`):
those that are executed, recomputation included, and no gradients of frozen weights. Utilisation is their number by time
and by the dense bf16 peak of the card.
"""

from __future__ import annotations

import argparse
import csv
import html
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningDataModule, Trainer
from torch import nn

from swd.commands.cli import config_folder
from swd.commands.plan import GPUS
from swd.commands.shared import quiet
from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.losses.base import LossTerm
from swd.losses.update import settle
from swd.metrics.flops import forward_gflop
from swd.modules.backbones import load_family
from swd.modules.backbones.base import Backbone
from swd.modules.device_memory import kept
from swd.modules.distiller import Distiller
from swd.modules.dry_run import trained_on_meta
from swd.modules.iteration_cost import IterationCost, iteration_costs
from swd.modules.pretrained import Pretrained
from swd.modules.published import published, published_folder
from swd.modules.sampling import initial_latents, sample_latents
from swd.schedule import ScaleSchedule
from swd.types import Cached, CachedBatch, Size, UserError

HERE = Path(__file__).resolve().parents[1]
CRITIC_UPDATES = 5
"""Released scripts."""
FIRST = ("sd35_medium", "sd35_large")
"""Models that are measured before the others: those of the released scripts."""
BATCH = {"sd35_medium": 8, "sd35_large": 4}
"""Samples on a GPU: released scripts. Other models have the most of 1, 2, 4 and 8 that fits."""


# The machine and the results


@dataclass(frozen=True)
class Machine:
    """Where this runs.

    Attributes:
        device: "cuda" or "cpu".
        name: of the card or the processor.
        memory: bytes of the card; 0 on the CPU.
        peak: TFLOP/s of dense bf16 matrix products by the maker's data sheet; None where it is not known.
    """

    device: str
    name: str
    memory: int = 0
    peak: float | None = None


def machine_here() -> Machine:
    """This machine, with its first GPU if it has one."""
    if not torch.cuda.is_available():
        return Machine("cpu", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    facts = torch.cuda.get_device_properties(0)
    return Machine("cuda", facts.name, facts.total_memory, peak_of(facts.name))


def peak_of(name: str) -> float | None:
    """Peak of a card by the name that its driver gives it; those on a PCIe card are lower and not listed."""
    plain = name.lower().replace(" ", "")
    if "pcie" in plain:
        return None
    return next((gpu.peak for kind, gpu in GPUS.items() if kind in plain), None)


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        what: "training" or "sampling".
        model: an option of `model/`.
        setting: losses and checkpointing, or the sizes of a schedule.
        size: latent size of the iteration, or of the finished picture.
        batch: samples.
        seconds: of an iteration or of a batch of pictures; median.
        parts: seconds of each phase of an iteration.
        gigabytes: most memory that tensors took, GB of 10^9; 0 on the CPU.
        tflop: counted operations.
        utilisation: share of the peak; None where the peak is not known.
        note: whatever else there is to say.
    """

    what: str
    model: str
    setting: str
    size: str
    batch: int
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    gigabytes: float = 0.0
    tflop: float = 0.0
    utilisation: float | None = None
    note: str = ""


PHASES = ("data", "inputs", "critic", "generator", "optimizer")
COLUMNS = ("what", "model", "setting", "size", "batch", "seconds", *PHASES, "gigabytes", "tflop", "utilisation", "note")


class Results:
    """Rows so far, written as CSV, Markdown and SVG after each.

    Args:
        folder: where to; it is made, and files of an earlier run are replaced.
        machine: where the rows come from.
    """

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder = folder
        self.machine = machine
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Keep a row, print it, and write all files again."""
        self.rows.append(row)
        cells = cells_of(row)
        print("  ".join(str(cells[key]) for key in COLUMNS if cells[key] not in ("", "0")), flush=True)
        self._replace("results.csv", csv_text(self.rows))
        self._replace("results.md", markdown(self.rows, self.machine))
        self._replace("results.svg", plot(self.rows))

    def _replace(self, name: str, text: str) -> None:
        new = self.folder / f".{name}"
        new.write_text(text, encoding="utf-8")
        new.replace(self.folder / name)


def cells_of(row: Row) -> dict[str, str]:
    """A row as text, by the columns' names."""
    plain = asdict(row)
    parts = plain.pop("parts")
    values = plain | {phase: parts.get(phase) for phase in PHASES}
    return {key: number(values[key]) for key in COLUMNS}


def number(value: Any) -> str:
    """A value as text; numbers with three digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def csv_text(rows: Sequence[Row]) -> str:
    """All rows as comma-separated values."""
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells_of(row) for row in rows)
    return text.getvalue()


def markdown(rows: Sequence[Row], machine: Machine) -> str:
    """Machine, versions, command, and a table of all rows."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "diffusers", "peft"))
    peak = f"; dense bf16 peak {machine.peak:g} TFLOP/s" if machine.peak else ""
    command = " ".join(["python", "benchmarks/suite.py", *sys.argv[1:]])
    head = [f"{machine.name}{peak}; Python {platform.python_version()}, {packages}; `{command}`", ""]
    head += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *("| " + " | ".join(cells_of(row).values()) + " |" for row in rows), ""])


def plot(rows: Sequence[Row]) -> str:
    """A bar for each row: utilisation where it is known, else seconds as a share of the longest."""
    longest = max(row.seconds for row in rows)
    bars = []
    for i, row in enumerate(rows):
        share = row.seconds / longest if row.utilisation is None else row.utilisation
        label = f"{row.what} {row.model} {row.setting} {row.size}"
        value = f"{row.seconds:.3g} s" + ("" if row.utilisation is None else f", {row.utilisation:.0%} of the peak")
        colour = "#4c72b0" if row.what == "training" else "#dd8452"
        bars.append(
            f'<text x="4" y="{22 * i + 15}">{html.escape(label)}</text>'
            f'<rect x="420" y="{22 * i + 3}" width="{300 * share:.1f}" height="16" fill="{colour}"/>'
            f'<text x="{426 + 300 * share:.1f}" y="{22 * i + 15}">{value}</text>'
        )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="880" height="{22 * len(rows) + 6}"'
    return f'{head} font-family="sans-serif" font-size="12">{"".join(bars)}</svg>\n'


# Which jobs, in which order


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        what: "training" or "sampling".
        model: an option of `model/` with a published configuration.
        losses: names of the terms; none for sampling.
    """

    what: str
    model: str
    losses: tuple[str, ...] = ()


def jobs(models: Iterable[str]) -> list[Job]:
    """Everything there is to measure, most valuable first.

    The models of the released scripts come first: their training with all losses, then how fast their students draw;
    after that the other models, and MMD alone.
    """
    ordered = sorted(models, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    first = [name for name in ordered if name in FIRST]
    others = [name for name in ordered if name not in FIRST]
    return [
        *(Job("training", name, losses_of(name)) for name in first),
        *(Job("sampling", name) for name in first),
        *(Job(what, name, losses_of(name) if what == "training" else ()) for name in others for what in WHAT),
        *(Job("training", name, ("mmd",)) for name in ordered if losses_of(name) != ("mmd",)),
    ]


WHAT = ("training", "sampling")


def losses_of(name: str) -> tuple[str, ...]:
    """Terms of the loss that a model's recipe has."""
    recipe = yaml.safe_load((config_folder() / "recipe" / f"{name}.yaml").read_text(encoding="utf-8"))
    loss = next(entry["/loss"] for entry in recipe["defaults"] if "/loss" in entry)
    return {"swd": ("dmd", "mmd", "gan"), "dmd_mmd": ("dmd", "mmd"), "dmd_gan": ("dmd", "gan")}.get(loss, ("mmd",))


def schedule_of(name: str) -> dict[str, Any]:
    """Arguments of the schedule that a model's students have."""
    model = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    key = "/schedule@_global_.schedule"
    option = next(entry[key] for entry in model["defaults"] if isinstance(entry, dict) and key in entry)
    found = yaml.safe_load((config_folder() / "schedule" / f"{option}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key in ("sigmas", "sizes", "process")}


@dataclass(frozen=True)
class Choice:
    """How an iteration at one size is run.

    Attributes:
        batch: samples.
        checkpointing: whether activations are computed again.
    """

    batch: int
    checkpointing: bool


def choice(
    weights: float, plain: IterationCost, recomputed: IterationCost, memory: float, batches: Sequence[int]
) -> Choice | None:
    """The first batch that fits, with activations kept if they do too; None if nothing fits.

    Args:
        weights: bytes of weights, gradients and moments.
        plain: cost of a sample.
        recomputed: the same with checkpointing.
        memory: bytes of the card.
        batches: in the order of preference.
    """
    free = 0.95 * memory - weights  # the rest is CUDA's, and gaps between tensors
    for batch in batches:
        for checkpointing, cost in ((False, plain), (True, recomputed)):
            if batch * cost.peak <= free:
                return Choice(batch, checkpointing)
    return None


# Models with random weights

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "dual_attention_layers": [0],
    "num_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "ffn_dim": 128,
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": [1, 1, 1],
    "cross_attention_head_dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "dim": 256,
    "approximator_hidden_dim": 64,
    "approximator_layers": 2,
}
"""Entries of a network's configuration that make it small; those that it has are replaced."""


class RandomWeights(Pretrained):
    """A pretrained model with random weights in place of its own."""

    def network(self, device: torch.device | str = "cpu") -> Backbone:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype(device))  # never twice in memory
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = self.network_class.from_config(self.network_config)
        finally:
            torch.set_default_dtype(before)
        return self.backbone_class(nn.Module.to(network, self.dtype(device)), self.embedded_guidance)


def random_model(name: str, folder: Path, small: bool) -> RandomWeights:
    """A model by its published configuration, or a small one of its family."""
    given = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    base = yaml.safe_load((config_folder() / "model_base.yaml").read_text(encoding="utf-8"))
    options = {key: value for key, value in (base | given).items() if key not in ("_target_", "defaults")}
    path = published_folder(name, options["family"], folder)
    if small:
        shrink(path / load_family(options["family"]).subfolder / "config.json")
        options |= {"rank": 4, "feature_blocks": [0], "max_text_tokens": min(16, options["max_text_tokens"])}
        options["precision"] = "fp32"
    return RandomWeights(**options | {"path": str(path)})


def shrink(file: Path) -> None:
    """Make a network's configuration small, in place."""
    config = json.loads(file.read_text(encoding="utf-8"))
    width = SMALL["num_attention_heads"] * (config.get("attention_head_dim") or 0 if "num_layers" in config else 0)
    config |= {key: value for key, value in SMALL.items() if key in config}
    # Widths that must agree with the number of heads.
    config |= {key: width for key in ("caption_projection_dim", "cross_attention_dim") if key in config and width}
    if "num_cross_attention_heads" in config:
        config["cross_attention_head_dim"] = width // config["num_cross_attention_heads"]
    if "block_out_channels" in config:
        config |= {"attention_head_dim": [2, 2, 2]}
    file.write_text(json.dumps(config), encoding="utf-8")


def terms_of(model: Pretrained, names: Sequence[str]) -> dict[str, LossTerm]:
    """The loss with its default weights."""
    every: dict[str, Callable[[], LossTerm]] = {
        "dmd": lambda: DMD(guidance_scale=model.dmd_guidance_scale),
        "mmd": lambda: MMD(blocks=model.feature_blocks),
        "gan": lambda: GAN(blocks=model.feature_blocks),
    }
    return {name: every[name]() for name in names}


def small_sizes(sizes: Sequence[Any], divisor: int) -> list[Any]:
    """Sizes for the CPU: the least that grow as the given ones do."""

    def side(rank: int) -> int:
        return divisor * (rank + 2)

    flat = [size if isinstance(size, list) else [size] for size in sizes]
    order = sorted({tuple(size) for size in flat})
    found = [
        [1, side(r), side(r)] if len(size) == 3 else [side(r)] for size in flat for r in [order.index(tuple(size))]
    ]
    return [size if len(size) == 3 else size[0] for size in found]


# Training


class Encoded(LightningDataModule):
    """Encoded data: one batch of random numbers, again and again."""

    is_cache = True

    def __init__(
        self, model: Pretrained, sizes: Iterable[Size], batch: int, per_iteration: int, iterations: int
    ) -> None:
        super().__init__()
        text = model.backbone_class.random_conditioning(model.network_config, batch, model.text_tokens)
        latents = {size: torch.randn(batch, model.channels, *size) for size in sizes}
        posteriors = {size: (mean, torch.full_like(mean, 0.1)) for size, mean in latents.items()}
        self.batch = CachedBatch(Cached(text, posteriors), prompts=["a prompt"] * batch)
        self.per_iteration = per_iteration
        self.iterations = iterations

    def empty(self, bucket: Size | None) -> Any:
        """Conditioning of the empty prompt, one row."""
        return self.batch.cached.conditioning.rows(slice(0, 1))

    def train_dataloader(self) -> Any:
        return Iterations([self.batch] * (self.per_iteration * self.iterations), self.per_iteration)


def wait() -> None:
    """Until the GPU has done what it was given; nothing on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TimedDistiller(Distiller):
    """A distillation that waits for the GPU at the end of each phase, so that its time is the phase's own."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wait()
        with super().phase(name):
            yield
            wait()


class Stopwatch(Callback):
    """Seconds of every iteration and of its phases; the optimizers' steps are a part of their updates' phases."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.optimizer = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        wait()
        self.began = time.perf_counter()

    def _after(self, *_: Any) -> None:
        wait()
        self.optimizer += time.perf_counter() - self.began

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.seconds.clear()
        self.optimizer = 0.0
        wait()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        wait()
        whole = time.perf_counter() - self.start
        self.iterations.append({"whole": whole, "optimizer": self.optimizer, **pl_module.seconds})


def train(
    model: Pretrained, terms: Mapping[str, LossTerm], schedule: ScaleSchedule, how: Choice, iterations: int, device: str
) -> list[dict[str, float]]:
    """Seconds of each iteration after the first, through Lightning; the schedule has one step."""
    task = TimedDistiller(model, schedule, terms, critic_updates=CRITIC_UPDATES, checkpointing=how.checkpointing)
    watch = Stopwatch()
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer = Trainer(max_steps=iterations, accelerator=accelerator, devices=1, callbacks=[watch], **off)
    sizes = {size for i in range(len(schedule)) for size in (schedule.interval(i).source, schedule.interval(i).target)}
    trainer.fit(task, datamodule=Encoded(model, sizes, how.batch, task.batches_per_iteration, iterations))
    return watch.iterations[1:]


def training_rows(job: Job, machine: Machine, folder: Path) -> Iterator[Row]:
    """A row for each size of the model's schedule, the largest first; on the CPU for the largest and the smallest."""
    small = machine.device == "cpu"
    model = random_model(job.model, folder, small)
    given = schedule_of(job.model)
    sizes = small_sizes(given["sizes"], model.limits.divisor) if small else given["sizes"]
    whole = ScaleSchedule(given["sigmas"], sizes, given.get("process"))
    costs = [iteration_costs(model, whole, settled(model, job.losses), CRITIC_UPDATES, each) for each in (False, True)]
    weights = kept_bytes(model, job.losses)
    batches = [b for b in (8, 4, 2, 1) if b <= BATCH.get(job.model, 8)]
    steps = whole.steps_of(model.backbone_class.process)[::-1]  # one of several experts trains its own alone
    for step in dict.fromkeys((steps[0], steps[-1])) if small else steps:
        interval = whole.interval(step)
        how = Choice(2, False)
        if not small:
            found = choice(weights, costs[0][step], costs[1][step], machine.memory, batches)
            if found is None:
                print(f"{job.model} at {interval.target}: more than {machine.memory / 1e9:.0f} GB", flush=True)
                continue
            how = found
        yield one_size(job, model, Single(whole, step), how, costs[how.checkpointing][step], machine)


class Single(ScaleSchedule):
    """One step of a schedule, with the source size that it has there, in every iteration."""

    def __init__(self, whole: ScaleSchedule, step: int) -> None:
        interval = whole.interval(step)
        super().__init__([1.0] if step == 0 else [interval.sigma], [whole.sizes[step]], whole.process)
        self._interval = interval

    def interval(self, i: int) -> Any:
        return self._interval


def one_size(
    job: Job, model: Pretrained, schedule: ScaleSchedule, how: Choice, cost: IterationCost, machine: Machine
) -> Row:
    """Train for a few iterations at one size."""
    if machine.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = train(model, terms_of(model, job.losses), schedule, how, 3, machine.device)
    middle = {key: statistics.median(row.get(key, 0.0) for row in found) for key in found[0]}
    seconds = middle.pop("whole")
    tflop = how.batch * cost.flop / 1e12
    return Row(
        "training",
        job.model,
        "+".join(job.losses) + (", recomputed" if how.checkpointing else ", kept"),
        "x".join(map(str, schedule.interval(0).target)),
        how.batch,
        seconds,
        middle,
        torch.cuda.max_memory_allocated() / 1e9 if machine.device == "cuda" else 0.0,
        tflop,
        None if machine.peak is None else tflop / seconds / machine.peak,
    )


def settled(model: Pretrained, names: Sequence[str]) -> dict[str, LossTerm]:
    """A loss that is ready to be counted."""
    terms = terms_of(model, names)
    settle(terms)
    return terms


def kept_bytes(model: Pretrained, losses: Sequence[str]) -> int:
    """Bytes of weights, gradients and moments."""
    return kept(*trained_on_meta(model, settled(model, losses))).total


# Sampling


def sampling_rows(job: Job, machine: Machine, folder: Path) -> Iterator[Row]:
    """Time of one picture or video: scale by scale, and at full size in as many, four and two steps."""
    small = machine.device == "cpu"
    model = random_model(job.model, folder, small)
    given = schedule_of(job.model)
    sizes = small_sizes(given["sizes"], model.limits.divisor) if small else given["sizes"]
    networks = model.networks(("student",), 0, machine.device).to(machine.device).eval()
    text = model.backbone_class.random_conditioning(model.network_config, 1, model.text_tokens).to(machine.device)
    full = [sizes[-1]]
    own = given["sigmas"]
    first: Row | None = None
    four = own if len(own) == 4 else [1.0, 0.9, 0.74, 0.6]
    for setting, sigmas, at in (
        ("scale by scale", own, sizes),
        ("full size, 4 steps", four, full * 4),
        ("full size, 2 steps", [four[0], four[2]], full * 2),
    ):
        schedule = ScaleSchedule(sigmas, at, given.get("process"))
        kind = model.backbone_class.process.prediction_type
        start = initial_latents([0], model.channels, schedule.sizes[0]).to(machine.device)

        def draw(schedule: ScaleSchedule = schedule, start: torch.Tensor = start, kind: Any = kind) -> None:
            # The base plays the student: once LoRA is folded into the weights, it costs the same.
            sample_latents(networks, schedule.scheduler(model.limits.divisor, kind), start, text, role="teacher")

        if not small:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(draw, 3 if small else 10, machine.device)
        row = Row(
            "sampling",
            job.model,
            f"{setting} ({len(sigmas)})",
            "x".join(map(str, schedule.sizes[-1])),
            1,
            seconds,
            gigabytes=0.0 if small else torch.cuda.max_memory_allocated() / 1e9,
            tflop=forward_tflop(model, schedule.sizes),
        )
        row = replace(row, utilisation=None if machine.peak is None else row.tflop / seconds / machine.peak)
        first = first or row
        if row is not first:
            speed, ideal = row.seconds / first.seconds, row.tflop / first.tflop
            row = replace(row, note=f"scale by scale is {speed:.2f} times as fast, by the work {ideal:.2f} times")
        yield row


def timed(work: Callable[[], None], repeats: int, device: str) -> float:
    """Median seconds of `work`, after one warm-up; on a GPU by its own clock."""
    work()
    found = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def forward_tflop(model: Pretrained, sizes: Sequence[Size]) -> float:
    """Operations of one pass at each size, of one sample."""
    text = model.backbone_class.random_conditioning(model.network_config, 1, model.text_tokens)
    known = {size: forward_gflop(model, size, text) / 1000 for size in set(sizes)}
    return sum(known[size] for size in sizes)


# The command


def run(chosen: Sequence[Job], machine: Machine, results: Results, minutes: float) -> None:
    """Do the jobs one after the other; one that fails is reported and the next one begins."""
    end = time.monotonic() + 60 * minutes
    for job in chosen:
        if time.monotonic() > end:
            print(f"{minutes:g} minutes are over: {job.what} of {job.model} and what follows is left out", flush=True)
            return
        print(f"-- {job.what} {job.model} {'+'.join(job.losses)}", flush=True)
        measure = training_rows if job.what == "training" else sampling_rows
        try:
            with tempfile.TemporaryDirectory() as folder:
                for row in measure(job, machine, Path(folder) / "model"):
                    results.add(row)
        except Exception as error:  # of any kind; the results of the other jobs are worth having
            if not isinstance(error, UserError | torch.OutOfMemoryError):
                traceback.print_exc()
            print(f"{job.what} {job.model}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        if machine.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models, with commas")
    parser.add_argument("--out", type=Path, default=HERE / "outputs" / "bench", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=30, help="no job begins after this")
    parser.add_argument("--against", type=Path, help="another checkout: only the tiny iteration, in alternation")
    given, more = parser.parse_known_args()
    tiny = [sys.executable, str(HERE / "benchmarks" / "tiny_step.py"), *more]
    if given.against or more:
        sys.exit(subprocess.call([*tiny, *(["--against", str(given.against)] if given.against else [])]))
    known = published()
    wanted = given.only.split(",") if given.only else known
    wrong = sorted(set(wanted) - set(known))
    if wrong:
        sys.exit(f"error: --only {wrong[0]} is unknown; models are {', '.join(known)}")
    warnings.filterwarnings("ignore")
    quiet()
    machine = machine_here()
    results = Results(given.out, machine)
    print(f"{machine.name}; results go to {given.out}", flush=True)
    run(jobs(wanted), machine, results, given.minutes)
    print("-- the tiny iteration, on one thread of the CPU", flush=True)
    sys.exit(subprocess.call(tiny))


if __name__ == "__main__":
    main()
