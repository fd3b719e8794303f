"""Required keys and ranges of numbers at the root of commands' configurations; nothing large is imported for them.

`swd.commands.early` checks them before a command is imported, and the command once more, for those who call it from
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omegaconf import DictConfig, OmegaConf

from swd.io import limits
from swd.types import UserError

REQUIRED: Mapping[str, Mapping[str, str]] = {
    "generate": {"prompts": "give prompts=prompts.csv", "out": "give out=folder"},
    "encode": {"out": "give out=FOLDER"},
    "export": {"to": "give to=FOLDER"},
    "evaluate": {
        "models": "give models='[teacher, RUN]'",
        "prompts": "give prompts=coco.csv, or shapes with the embedded model",
        "metrics": "give metrics='[fid, clip]', or '[shapes_accuracy]' with the embedded model",
    },
    "spectra": {"cache": "encode pictures or videos first: swd encode ... out=FOLDER, then cache=FOLDER"},
}
"""For commands that take long to import, the keys that have no default, and the way out."""
MOST_DRAWS = 10**6
"""Resamples, or timed batches, at most: a thousand times what a stable interval needs."""


def check_given(cfg: DictConfig, command: str) -> None:
    """Raise UserError for a required key that is missing."""
    for key, advice in REQUIRED.get(command, {}).items():
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"{key} is missing; {advice}")


def check_numbers(cfg: DictConfig, command: str) -> None:
    """Raise UserError for a number at the root of the command's configuration that is out of range.

    Args:
        cfg: the configuration, whose values have the right types.
        command: its name; of others than those of `NUMBERS` nothing is checked here.
    """
    if command in NUMBERS:
        NUMBERS[command](cfg)


def check_sides(cfg: DictConfig) -> None:
    """Raise UserError for a height or a width in pixels that no model draws."""
    for key in ("height", "width"):
        limits.whole(key, cfg[key], 1, limits.SIDE, "eight times what models are trained on")


def _sample(cfg: DictConfig) -> None:
    limits.whole("images_per_prompt", cfg.images_per_prompt, 1)
    limits.whole("batch_size", cfg.batch_size, 1, limits.AT_ONCE, "no device draws more at once")
    limits.whole("fps", cfg.fps, 1, limits.FPS)
    limits.seed("seed", cfg.seed)
    check_sides(cfg)


def _generate(cfg: DictConfig) -> None:
    limits.whole("images_per_prompt", cfg.images_per_prompt, 1)
    limits.whole("batch_size", cfg.batch_size, 1, limits.AT_ONCE, "no device draws more at once")
    limits.whole("shard_size", cfg.shard_size, 1, limits.MOST_IN_A_SHARD, "a shard is one file")
    limits.whole("fps", cfg.fps, 1, limits.FPS)
    limits.whole("steps", cfg.steps, 1, limits.STEPS, "the noise levels that models are trained on")
    limits.number("guidance_scale", cfg.guidance_scale, 1, limits.GUIDANCE, limits.NO_GUIDANCE)
    if not 1 <= cfg.quality <= 100:
        raise UserError(f"quality={cfg.quality}; use 1 to 100")
    limits.seed("seed", cfg.seed)
    check_sides(cfg)


def _encode(cfg: DictConfig) -> None:
    why = "a shard is kept in memory until it is complete"
    limits.whole("shard_size", cfg.shard_size, 1, limits.MOST_IN_A_SHARD, why)
    limits.whole("limit", cfg.limit, 1)
    limits.number("max_bad", cfg.max_bad, 0, 1, "a share of the samples")


def _evaluate(cfg: DictConfig) -> None:
    # Pictures.
    limits.whole("n", cfg.n, 2)
    limits.whole("images_per_prompt", cfg.images_per_prompt, 1)
    limits.whole("batch_size", cfg.batch_size, 1, limits.AT_ONCE, "no device draws more at once")
    limits.whole("chunk_size", cfg.chunk_size, 1, limits.MOST_IN_A_SHARD, "the features of a chunk are one file")
    limits.seed("seed", cfg.seed)
    check_sides(cfg)

    # Intervals.
    limits.whole("bootstrap.draws", cfg.bootstrap.draws, 2, MOST_DRAWS, "far more than an interval needs")
    if not 0 < cfg.bootstrap.level < 1:
        raise UserError(f"bootstrap.level={cfg.bootstrap.level}; use a number between 0 and 1, e.g. 0.95")
    limits.seed("bootstrap.seed", cfg.bootstrap.seed)

    # Latency.
    if cfg.timing is not None:
        limits.whole("timing.batch", cfg.timing.batch, 1, limits.AT_ONCE, "no device draws more at once")
        limits.whole("timing.runs", cfg.timing.runs, 1, MOST_DRAWS)
        limits.whole("timing.warmup", cfg.timing.warmup, 0, MOST_DRAWS)


def _spectra(cfg: DictConfig) -> None:
    limits.whole("n", cfg.n, 1)
    limits.whole("batch_size", cfg.batch_size, 1, limits.AT_ONCE)
    if not cfg.levels or not all(0 < level < 1 for level in cfg.levels):
        raise UserError(f"levels={list(cfg.levels)}; use numbers between 0 (clean) and 1 (pure noise), e.g. [0.6,0.8]")


def _demo(cfg: DictConfig) -> None:
    for key, least in (("n_pictures", 2), ("shown", 1), ("timing_batches", 1), ("minutes", 1)):
        limits.whole(key, cfg[key], least)
    if cfg.shown > cfg.n_pictures:
        raise UserError(f"shown={cfg.shown} is more than n_pictures={cfg.n_pictures}; use at most that many")
    if cfg.trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps}; the demo distils for at least 1 iteration")


NUMBERS: Mapping[str, Callable[[DictConfig], None]] = {
    "sample": _sample,
    "generate": _generate,
    "encode": _encode,
    "evaluate": _evaluate,
    "spectra": _spectra,
    "demo": _demo,
}
"""Checks of the commands that take long to import. Those of `swd plan` are in `swd.commands.gpus`."""
