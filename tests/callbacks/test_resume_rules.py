"""The table of settings that a run may change when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import composed, overrides

from swd.callbacks.resume_rules import RULES, config_difference, rule_for, sayings
from swd.commands.train import record

CHANGED = {
    "seed": (1, "refuse"),
    "data.batch_size": (2, "refuse"),
    "data.workers": (1, "free"),
    "schedule.sizes": ([4, 4, 8], "refuse"),
    "model.rank": (8, "refuse"),
    "loss.mmd.weight": (3.0, "refuse"),
    "loss.dmd": ("null", "refuse"),
    "task.lr": (0.5, "refuse"),
    "task.critic_updates": (1, "refuse"),
    "task.checkpointing": ("true", "free"),
    "task.skips_in_all": (7, "free"),
    "+trainer.accumulate_grad_batches": (4, "refuse"),
    "+trainer.gradient_clip_val": (1.0, "refuse"),
    "+trainer.precision": ("bf16-mixed", "say"),
    "trainer.max_steps": (5, "say"),
    "trainer.strategy": ("ddp", "free"),
    "callbacks.checkpoint.every": (3, "free"),
    "name": ("other", "free"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one would lie beside the configuration of its run."""
    run = tmp_path_factory.mktemp("run")
    record(composed(overrides(Path("model"), run, loss="swd")), run, None)
    return run / "checkpoints" / "iteration-2.ckpt"


@pytest.mark.parametrize("key", CHANGED)
def test_a_change_is_refused_said_or_free(checkpoint: Path, key: str) -> None:
    value, verdict = CHANGED[key]
    given = f"~{key}" if value == "null" else f"{key}={value}"
    cfg = composed([*overrides(Path("model"), checkpoint.parent.parent, loss="swd"), given])
    name = key.removeprefix("+")
    assert rule_for(name).verdict == verdict
    found = config_difference(checkpoint, cfg)
    lines = sayings(checkpoint, cfg)
    assert (found is not None and found.startswith(f"{name} was ")) == (verdict == "refuse")
    assert len(lines) == (verdict == "say")
    assert all(line.startswith(f"going on with {name} was ") and rule_for(name).meaning in line for line in lines)


def test_every_rule_is_reached_and_says_what_it_means() -> None:
    reached = [rule_for(pattern.replace("*", "x")) for rule in RULES for pattern in rule.keys]
    assert reached == [rule for rule in RULES for _ in rule.keys]
    assert all(rule.meaning for rule in RULES)
    assert rule_for("loss.mmd.kernel").verdict == "refuse" and rule_for("losses").verdict == "free"


def test_the_same_configuration_differs_in_nothing(checkpoint: Path) -> None:
    cfg = composed(overrides(Path("model"), checkpoint.parent.parent, loss="swd"))
    assert config_difference(checkpoint, cfg) is None and sayings(checkpoint, cfg) == []
    assert OmegaConf.select(cfg, "task.lr") is not None
