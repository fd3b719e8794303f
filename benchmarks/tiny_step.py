"""CPU time of one iteration with all losses on a tiny network, through Lightning, on one thread.

    python benchmarks/tiny_step.py                   this checkout alone
    python benchmarks/tiny_step.py --against PATH    and another checkout: the two alternate, iteration by iteration

The network is an SD3 transformer of 4 blocks with 4 heads of 16 channels; latents have 16 channels and sides 8, 10, 12
and 16, batches 8 samples of 24 text tokens; LoRA of rank 8, features of block 1, 5 critic updates, data encoded before.
At this size nearly half of an iteration is overhead: it tells how many operations are started, not how fast large ones
are.

Both checkouts run in processes of their own, with the packages of the interpreter that runs this file. The ratio is the
median over pairs of neighbouring iterations of the same size, in CPU time, so that it depends little on other load.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SIGMAS, SIDES = (1.0, 0.9, 0.75, 0.5), (8, 10, 12, 16)
BATCH, CHANNELS, TOKENS, TEXT_WIDTH = 8, 16, 24, 32
WARM_UP = len(SIDES)


# The process that measures one checkout


def work(root: Path, checkpointing: bool) -> None:
    """Train the tiny network with the package under `root`: an iteration for each line of input, its time printed."""
    sys.path.insert(0, str(root))
    import swd

    assert Path(swd.__file__).is_relative_to(root), f"{swd.__file__} is not under {root}"
    import torch
    from lightning import Callback, Trainer

    from swd.losses import DMD, GAN, MMD
    from swd.modules.distiller import Distiller
    from swd.schedule import ScaleSchedule

    torch.set_num_threads(1)

    class Timer(Callback):
        """Waits for a line before an iteration, and prints the CPU seconds after it."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if not sys.stdin.readline():
                trainer.should_stop = True
            self.start = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            print(f"seconds {time.process_time() - self.start}", flush=True)

    schedule = ScaleSchedule(SIGMAS, SIDES)
    terms = {"dmd": DMD(), "mmd": MMD(blocks=(1,)), "gan": GAN(blocks=(1,))}
    task = Distiller(tiny_model(), schedule, terms, critic_updates=5, checkpointing=checkpointing)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_steps=10**6, accelerator="cpu", devices=1, callbacks=[Timer()], **quiet)
    trainer.fit(task, datamodule=encoded_data(task.batches_per_iteration))


def tiny_model() -> Any:
    """Stands for a pretrained model: what the distiller asks of it, without a folder."""
    import torch
    from diffusers import SD3Transformer2DModel

    from swd.modules.backbones.sd3 import SD3Backbone
    from swd.modules.networks import SharedBase

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=SIDES[-1],
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=SIDES[-1] // 2,
        qk_norm="rms_norm",
    )
    return SimpleNamespace(
        family="sd3",
        tuning="lora",
        init_adapter=None,
        backbone_class=SD3Backbone,
        limits=SD3Backbone.limits_of(dict(network.config)),
        channels=CHANNELS,
        check_targets=lambda: None,
        unconditional=lambda empty: empty,
        networks=lambda roles, seed=0, device="cpu": SharedBase(SD3Backbone(network), 8, roles=roles, seed=seed),
    )


def encoded_data(per_iteration: int) -> Any:
    """Endless encoded batches: one, again and again, since the values do not change the time."""
    import torch
    from lightning import LightningDataModule

    from swd.data.iterations import Iterations
    from swd.types import Cached, CachedBatch, Conditioning

    def prompts(batch: int) -> Conditioning:
        return Conditioning(torch.randn(batch, TOKENS, TEXT_WIDTH), torch.randn(batch, TEXT_WIDTH))

    latents = {(side, side): torch.randn(BATCH, CHANNELS, side, side) for side in SIDES}
    posteriors = {size: (mean, torch.full_like(mean, 0.1)) for size, mean in latents.items()}
    batch = CachedBatch(Cached(prompts(BATCH), posteriors), prompts=["a prompt"] * BATCH)
    empty = prompts(1)

    class Encoded(LightningDataModule):
        is_cache = True

        def empty(self, bucket: Any) -> Any:
            return empty

        def train_dataloader(self) -> Any:
            return Iterations([batch] * (per_iteration * 10**4), per_iteration)

    return Encoded()


# The process that lets them alternate


class Worker:
    """A process that runs iterations of one checkout on demand."""

    def __init__(self, root: Path, checkpointing: bool) -> None:
        command = [sys.executable, __file__, "--work", str(root), *(["--checkpointing"] if checkpointing else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": ""}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **pipes)

    def iteration(self) -> float:
        """CPU seconds of the next iteration."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit("a worker ended; run this file with --work CHECKOUT, and enter a line, to see why")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(roots: list[Path], rounds: int, checkpointing: bool) -> list[list[float]]:
    """CPU seconds of the iterations of each checkout after the warm-up, in alternation."""
    workers = [Worker(root, checkpointing) for root in roots]
    try:
        rows = [[worker.iteration() for worker in workers] for _ in range(WARM_UP + rounds)]
    finally:
        for worker in workers:
            worker.end()
    return [list(column) for column in zip(*rows[WARM_UP:], strict=True)]


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line."""

    def error(self, message: str) -> Any:
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Measure as the command line says, and print the times and the ratio."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--against", type=Path, help="another checkout, or a folder that holds its swd/")
    parser.add_argument("--rounds", type=int, default=12, help="iterations of each; a multiple of 4 takes sizes alike")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds {given.rounds}; give 2 or more")
    if given.against and not (given.against / "swd" / "__init__.py").is_file():
        parser.error(f"--against {given.against} holds no swd/__init__.py")
    if given.work:
        warnings.filterwarnings("ignore")
        work(given.work.resolve(), given.checkpointing)
        return
    roots = [HERE, *([given.against.resolve()] if given.against else [])]
    times = measure(roots, given.rounds, given.checkpointing)
    for root, column in zip(roots, times, strict=True):
        print(f"{statistics.median(column) * 1000:7.0f} ms  {root}")
    if given.against:
        ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} alternations)")


if __name__ == "__main__":
    main()
