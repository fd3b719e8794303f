"""Training and sampling at real size with random weights: time by phase, memory, utilisation, latency, by family.

    make bench                                     all, most valuable first; each result is written as it is made
    make bench ARGS='--only sd35_medium'           one model; several with commas
    make bench ARGS='--out FOLDER --minutes 10'    start nothing more after ten minutes
    make bench ARGS='--counts FILE'                count operations and memory once, and read them from FILE afterwards
    make bench ARGS='--counts FILE --count-only'    only count at real size, ahead: no GPU is needed

On a GPU networks have their published sizes, on the CPU a few narrow blocks. Nothing is downloaded: configurations ship
with the package (`assets/published/`), weights are random, data are encoded already and the same again and again.

FOLDER gets results.csv, results.md and results.svg, all three again after every result. A result that fails is named in
results.md and at the end, the others are still made, and the exit status is 1. Operations are counted without weights
(`swd/modules/dry_run.py`): those that are executed, recomputation included, and no gradients of frozen weights.
Utilisation is their number by time and by the dense bf16 peak of the card.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import html
import json
import math
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
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where swd is not installed

import torch
import yaml
from lightning import Callback, LightningDataModule, Trainer
from torch import nn

from benchmarks.tiny_step import Parser
from swd.commands.cli import config_folder
from swd.commands.gpus import GPUS
from swd.commands.shared import quiet
from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.losses.base import LossTerm
from swd.losses.update import settle
from swd.metrics.flops import forward_gflop
from swd.modules.attention import Attention, use_attention
from swd.modules.backbones import load_family
from swd.modules.backbones.base import Backbone
from swd.modules.device_memory import permanent_parts, usable
from swd.modules.distiller import Distiller
from swd.modules.dry_run import UpdateCost, trained_on_meta
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


@dataclass(frozen=True)
class Missing:
    """A result that there is not.

    Attributes:
        label: which one.
        reason: the error's first line, or that it does not fit the card.
        failed: False where it is no error: the card is too small by the count.
        out_of_memory: whether the card's memory was at its end.
    """

    label: str
    reason: str
    failed: bool = True
    out_of_memory: bool = False


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
        self.missing: list[Missing] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Keep a row, print it, and write all files again."""
        self.rows.append(row)
        cells = cells_of(row)
        print("  ".join(str(cells[key]) for key in COLUMNS if cells[key] not in ("", "0")), flush=True)
        self._write()

    def lack(self, missing: Missing) -> None:
        """Keep what there is no row of, print it, and write all files again."""
        self.missing.append(missing)
        print(f"{missing.label}: {missing.reason}", flush=True)
        self._write()

    @property
    def failed(self) -> list[Missing]:
        """Results that an error prevented."""
        return [each for each in self.missing if each.failed]

    def _write(self) -> None:
        self._replace("results.csv", csv_text(self.rows))
        self._replace("results.md", markdown(self.rows, self.machine, self.missing))
        if self.rows:
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


RULE = (
    "`tflop` is what is executed: recomputation counts, a multiply-add is two, and no gradient of a frozen weight is "
    "computed or counted; `utilisation` is tflop by seconds and by the dense bf16 peak."
)


def markdown(rows: Sequence[Row], machine: Machine, missing: Sequence[Missing] = ()) -> str:
    """Machine, versions, command, a table of all rows, means over sizes, and what is missing."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "diffusers", "peft"))
    peak = f"; dense bf16 peak {machine.peak:g} TFLOP/s" if machine.peak else ""
    command = " ".join(["python", "benchmarks/suite.py", *sys.argv[1:]])
    lines = [f"{machine.name}{peak}; Python {platform.python_version()}, {packages}; `{command}`", "", RULE, ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells_of(row).values()) + " |" for row in rows]
    means = means_over_sizes(rows, machine.peak)
    lines += ["", *means] if means else []
    lines += ["", "Missing:", "", *(f"* {each.label}: {each.reason}" for each in missing)] if missing else []
    return "\n".join([*lines, ""])


def means_over_sizes(rows: Sequence[Row], peak: float | None) -> list[str]:
    """For each model and loss, the utilisation of iterations at all sizes that were measured together."""
    if peak is None:
        return []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.what == "training":
            groups.setdefault((row.model, row.setting.split(",")[0]), []).append(row)
    lines = []
    for (model, losses), found in groups.items():
        tflop, seconds = sum(row.tflop for row in found), sum(row.seconds for row in found)
        sizes = ", ".join(row.size for row in found)
        lines.append(f"* {model}, {losses}, over {sizes}: {tflop / seconds / peak:.1%} of the peak")
    return lines


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
        attention: kernel, as `model.attention`.
        compiled: whether a training compiles its networks' blocks, as `task.compiled`.
    """

    what: str
    model: str
    losses: tuple[str, ...] = ()
    attention: str | None = None
    compiled: bool = False

    @property
    def label(self) -> str:
        """The job in words."""
        return " ".join([self.what, self.model, *(["+".join(self.losses)] if self.losses else [])])

    @property
    def kernel(self) -> str:
        """The kernel of attention, and whether it is compiled, for the setting of a row."""
        compiled = ", compiled" if self.compiled and self.what == "training" else ""
        return (f", {self.attention}" if self.attention else "") + compiled


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
    free = usable(memory) - weights
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
        use_attention(network, self.attention, torch.device(device))
        return self.backbone_class(nn.Module.to(network, self.dtype(device)), self.embedded_guidance)


def random_model(name: str, folder: Path, small: bool, attention: str | None = None) -> RandomWeights:
    """A model by its published configuration, or a small one of its family."""
    given = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    base = yaml.safe_load((config_folder() / "model_base.yaml").read_text(encoding="utf-8"))
    options = {key: value for key, value in (base | given).items() if key not in ("_target_", "defaults")}
    path = published_folder(name, options["family"], folder)
    if small:
        shrink(path / load_family(options["family"]).subfolder / "config.json")
        options |= {"rank": 4, "feature_blocks": [0], "max_text_tokens": min(16, options["max_text_tokens"])}
        options["precision"] = "fp32"
    return RandomWeights(**options | {"path": str(path), "attention": attention})


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


LEAST = {"z_image": 5}
"""Patches along the side of the first small size, where 2 would cost what the others do: Z-Image adds tokens up to a
multiple of 32."""


def small_sizes(sizes: Sequence[Any], divisor: int, least: int = 2) -> list[Any]:
    """Sizes for the CPU that grow as the given ones do, from `least` patches along a side."""

    def side(rank: int) -> int:
        return divisor * (rank + least)

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
    model: Pretrained,
    terms: Mapping[str, LossTerm],
    schedule: ScaleSchedule,
    how: Choice,
    iterations: int,
    device: str,
    compiled: bool,
) -> list[dict[str, float]]:
    """Seconds of each iteration after the first, through Lightning; the schedule has one step."""
    options = {"critic_updates": CRITIC_UPDATES, "checkpointing": how.checkpointing, "compiled": compiled}
    task = TimedDistiller(model, schedule, terms, **options)
    watch = Stopwatch()
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer = Trainer(max_steps=iterations, accelerator=accelerator, devices=1, callbacks=[watch], **off)
    sizes = {size for i in range(len(schedule)) for size in (schedule.interval(i).source, schedule.interval(i).target)}
    trainer.fit(task, datamodule=Encoded(model, sizes, how.batch, task.batches_per_iteration, iterations))
    return watch.iterations[1:]


def training_rows(job: Job, machine: Machine, folder: Path, counts: Counts) -> Iterator[Row | Missing]:
    """A row for each size of the model's schedule, the largest first; on the CPU for the largest and the smallest."""
    small = machine.device == "cpu"
    model = random_model(job.model, folder, small, job.attention)
    whole = schedule_with(model, job.model, small)
    counted = counts.training(job, model, whole)
    batches = [b for b in (8, 4, 2, 1) if b <= BATCH.get(job.model, 8)]
    steps = whole.steps_of(model.backbone_class.process)[::-1]  # one of several experts trains its own alone
    for step in dict.fromkeys((steps[0], steps[-1])) if small else steps:
        size = "x".join(map(str, whole.interval(step).target))
        how: Choice | None = Choice(2, False)
        if not small:
            costs = counted.plain[step], counted.recomputed[step]
            how = choice(counted.weights, *costs, machine.memory, batches)
        if how is None:
            yield Missing(f"{job.label} {size}", f"more than {machine.memory / 1e9:.0f} GB by the count", failed=False)
            continue
        yield first_that_fits(job, model, Single(whole, step), how, counted, step, machine)


def schedule_with(model: Pretrained, name: str, small: bool) -> ScaleSchedule:
    """The schedule that a model's students have, or one of its kind with small sizes."""
    given = schedule_of(name)
    sizes = small_sizes(given["sizes"], model.limits.divisor, LEAST.get(name, 2)) if small else given["sizes"]
    return ScaleSchedule(given["sigmas"], sizes, given.get("process"))


def first_that_fits(
    job: Job, model: Pretrained, schedule: ScaleSchedule, how: Choice, counted: Counted, step: int, machine: Machine
) -> Row | Missing:
    """A row as chosen by the count; where memory ends all the same, recomputed, and then with fewer samples."""
    found: Row | Missing
    tries = [how, *(Choice(batch, True) for batch in (how.batch, how.batch // 2) if batch)]
    for number, each in enumerate(dict.fromkeys(tries)):
        cost = (counted.recomputed if each.checkpointing else counted.plain)[step]
        label = f"{job.label} {'x'.join(map(str, schedule.interval(0).target))}, batch {each.batch}"
        found = attempt(label, partial(one_size, job, model, schedule, each, cost, machine))
        if isinstance(found, Row):
            return replace(found, note="by the count more would fit") if number else found
        if not found.out_of_memory:
            break
    return found


def attempt(label: str, work: Callable[[], Row]) -> Row | Missing:
    """A row, or why there is none: of any error, since the other results are worth having."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return Missing(label, reason_of(error), out_of_memory=True)
    except UserError as error:
        return Missing(label, reason_of(error))
    except Exception as error:
        traceback.print_exc()
        return Missing(label, reason_of(error))


def reason_of(error: Exception) -> str:
    """Kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def release(device: str) -> None:
    """Give back the memory of what is no longer used; trainers and their tasks refer to each other in circles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


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
    release(machine.device)
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = train(model, terms_of(model, job.losses), schedule, how, 3, machine.device, job.compiled)
    middle = {key: statistics.median(row.get(key, 0.0) for row in found) for key in found[0]}
    seconds = middle.pop("whole")
    tflop = how.batch * cost.flop / 1e12
    return Row(
        "training",
        job.model,
        "+".join(job.losses) + (", recomputed" if how.checkpointing else ", kept") + job.kernel,
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


# What is counted without weights


@dataclass(frozen=True)
class Counted:
    """Costs of a training, for a sample.

    Attributes:
        plain: of an iteration at each step of the schedule, with all activations kept.
        recomputed: the same with checkpointing.
        weights: bytes of weights, gradients and moments.
    """

    plain: list[IterationCost]
    recomputed: list[IterationCost]
    weights: int


class Counts:
    """What was counted already, in a file: it takes up to a minute a model, in which a lent GPU would idle.

    Args:
        file: it is read if it is there and of this source code, and written after every count; None: nothing is kept.

    Raises:
        UserError: if the file holds something else.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._source = source_digest()
        self._known: dict[str, Any] = {}
        if file is not None and file.is_file():
            self._known = self._read(file)

    def _read(self, file: Path) -> dict[str, Any]:
        """Counts of this source code in a file; none where they are of another."""
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return dict(stored["counts"]) if stored["source"] == self._source else {}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--counts {file} is no file of counts; name another, which is made") from None

    def training(self, job: Job, model: Pretrained, schedule: ScaleSchedule) -> Counted:
        """Costs of a training at each step."""

        def count() -> dict[str, Any]:
            terms = settled(model, job.losses)
            plain, again = (iteration_costs(model, schedule, terms, CRITIC_UPDATES, each) for each in (False, True))
            parts = permanent_parts(*trained_on_meta(model, terms))
            return asdict(Counted(plain, again, sum(parts.values())))

        found = self._get(job, schedule, count)
        return Counted(*(list(map(cost_of, found[key])) for key in ("plain", "recomputed")), found["weights"])

    def sampling(self, job: Job, model: Pretrained, schedule: ScaleSchedule) -> dict[Size, float]:
        """TFLOP of one pass at each size, of one sample."""

        def count() -> list[float]:
            text = model.backbone_class.random_conditioning(model.network_config, 1, model.text_tokens)
            return [forward_gflop(model, size, text) / 1000 for size in schedule.sizes]

        return dict(zip(schedule.sizes, self._get(job, schedule, count), strict=True))

    def _get(self, job: Job, schedule: ScaleSchedule, count: Callable[[], Any]) -> Any:
        key = f"{job.label} {schedule.sizes}"
        if key not in self._known:
            self._known[key] = count()
            if self.file is not None:
                new = self.file.with_name(f".{self.file.name}")
                new.write_text(json.dumps({"source": self._source, "counts": self._known}), encoding="utf-8")
                new.replace(self.file)
        return self._known[key]


def cost_of(stored: Mapping[str, Any]) -> IterationCost:
    """A cost from its plain values."""
    critic = stored["critic"]
    return IterationCost(
        UpdateCost(**stored["generator"]), None if critic is None else UpdateCost(**critic), stored["critic_updates"]
    )


def source_digest() -> str:
    """A hash of the package, its configurations and this file: counts of other ones are not used."""
    files = [Path(__file__), *(HERE / "swd").rglob("*.py"), *config_folder().rglob("*.yaml")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def count_all(chosen: Iterable[Job], counts: Counts) -> list[Missing]:
    """Count the jobs at their real size; returns those that failed."""
    missing = []
    for job in chosen:
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = random_model(job.model, Path(folder) / "model", small=False)
                schedule = schedule_with(model, job.model, small=False)
                (counts.training if job.what == "training" else counts.sampling)(job, model, schedule)
                print(f"counted {job.label}", flush=True)
        except Exception as error:  # of any kind; the other counts are worth having
            missing.append(Missing(job.label, reason_of(error)))
            print(f"{job.label}: {missing[-1].reason}", flush=True)
    return missing


# Sampling


def sampling_rows(job: Job, machine: Machine, folder: Path, counts: Counts) -> Iterator[Row | Missing]:
    """Time of one picture or video: scale by scale, and at full size in as many, four and two steps."""
    small = machine.device == "cpu"
    model = random_model(job.model, folder, small, job.attention)
    own = schedule_with(model, job.model, small)
    known = counts.sampling(job, model, own)
    networks = model.networks(("student",), 0, machine.device).to(machine.device).eval()
    full = [own.sizes[-1]]
    four = own.sigmas if len(own) == 4 else (1.0, 0.9, 0.74, 0.6)
    first: Row | None = None
    for setting, sigmas, sizes in (
        ("scale by scale", own.sigmas, own.sizes),
        ("full size, 4 steps", four, full * 4),
        ("full size, 2 steps", (four[0], four[2]), full * 2),
    ):
        schedule = ScaleSchedule(sigmas, sizes, own.process)
        label = f"{job.label} {setting} ({len(sigmas)})"
        work = sum(known[size] for size in schedule.sizes)
        found = attempt(label, partial(drawn, job, model, networks, schedule, setting, work, machine))
        if isinstance(found, Row):
            first = first or found
            if found is not first and first.setting.startswith("scale by scale"):
                speed, ideal = found.seconds / first.seconds, found.tflop / first.tflop
                note = f"scale by scale is {speed:.2f} times as fast, by the work {ideal:.2f} times"
                found = replace(found, note=note)
        yield found


def drawn(
    job: Job, model: Pretrained, networks: Any, schedule: ScaleSchedule, setting: str, tflop: float, machine: Machine
) -> Row:
    """Time of one picture by a schedule; `tflop` is its work."""
    text = model.backbone_class.random_conditioning(model.network_config, 1, model.text_tokens).to(machine.device)
    start = initial_latents([0], model.channels, schedule.sizes[0]).to(machine.device)
    kind = model.backbone_class.process.prediction_type

    def draw() -> None:
        # The base plays the student: once LoRA is folded into the weights, it costs the same.
        sample_latents(networks, schedule.scheduler(model.limits.divisor, kind), start, text, role="teacher")

    on_gpu = machine.device == "cuda"
    release(machine.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(draw, 10 if on_gpu else 3, machine.device)
    return Row(
        "sampling",
        job.model,
        f"{setting} ({len(schedule)}){job.kernel}",
        "x".join(map(str, schedule.sizes[-1])),
        1,
        seconds,
        gigabytes=torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        tflop=tflop,
        utilisation=None if machine.peak is None else tflop / seconds / machine.peak,
    )


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


# The command


def run(chosen: Sequence[Job], machine: Machine, results: Results, minutes: float, counts: Counts) -> None:
    """Do the jobs one after the other; what fails is reported and the next one begins."""
    end = time.monotonic() + 60 * minutes
    for job in chosen:
        if time.monotonic() > end:
            print(f"{minutes:g} minutes are over: {job.label} and what follows is left out", flush=True)
            return
        print(f"-- {job.label}", flush=True)
        measure = training_rows if job.what == "training" else sampling_rows
        try:
            with tempfile.TemporaryDirectory() as folder:
                for found in measure(job, machine, Path(folder) / "model", counts):
                    results.add(found) if isinstance(found, Row) else results.lack(found)
                    if time.monotonic() > end:
                        break
        except Exception as error:  # of any kind; the results of the other jobs are worth having
            if not isinstance(error, UserError | torch.OutOfMemoryError):
                traceback.print_exc()
            results.lack(Missing(job.label, reason_of(error)))
        release(machine.device)


def arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, checked, and what of it is for the tiny iteration."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", help="models, with commas")
    parser.add_argument("--out", type=Path, default=HERE / "outputs" / "bench", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=30, help="nothing begins after this")
    parser.add_argument("--counts", type=Path, help="file that keeps counted operations and memory")
    parser.add_argument("--count-only", action="store_true", help="measure nothing: only count at real size")
    parser.add_argument("--attention", choices=get_args(Attention), help="kernel, as model.attention")
    parser.add_argument("--compiled", action="store_true", help="trainings compile their networks' blocks")
    parser.add_argument("--against", type=Path, help="another checkout: only the tiny iteration, in alternation")
    given, more = parser.parse_known_args(words)
    known = published()
    given.only = known if given.only is None else given.only.split(",")
    wrong = [name for name in given.only if name not in known]
    if wrong:
        parser.error(f"--only names {wrong[0]!r}; models are {', '.join(known)}")
    if not 0 < given.minutes < math.inf:
        parser.error(f"--minutes {given.minutes:g} is no number above 0")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out {given.out} is no folder")
    if given.count_only and given.counts is None:
        parser.error("--count-only needs --counts FILE, which keeps what is counted")
    if given.counts is not None and (given.counts.is_dir() or not given.counts.absolute().parent.is_dir()):
        parser.error(f"--counts {given.counts} is no file in a folder that there is")
    return given, more


def main() -> int:
    """Measure as the command line says; returns the exit status."""
    given, more = arguments(sys.argv[1:])
    tiny = [sys.executable, str(HERE / "benchmarks" / "tiny_step.py"), *more]
    if given.against or more:
        return subprocess.call([*tiny, *(["--against", str(given.against)] if given.against else [])])
    warnings.filterwarnings("ignore")
    quiet()
    chosen = [replace(job, attention=given.attention, compiled=given.compiled) for job in jobs(given.only)]
    try:
        counts = Counts(given.counts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.count_only:
        return int(bool(count_all(chosen, counts)))
    machine = machine_here()
    if given.attention and machine.device == "cpu":
        print(f"error: --attention {given.attention} needs an NVIDIA GPU, and this machine has none", file=sys.stderr)
        return 2
    results = Results(given.out, machine)
    print(f"{machine.name}; results go to {given.out}", flush=True)
    run(chosen, machine, results, given.minutes, counts)
    print("-- the tiny iteration, on one thread of the CPU", flush=True)
    status = subprocess.call(tiny)
    for each in results.failed:
        print(f"failed: {each.label}: {each.reason}", file=sys.stderr)
    return 1 if results.failed or not results.rows else status


if __name__ == "__main__":
    sys.exit(main())
