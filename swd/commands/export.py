"""`swd export`: a student as one folder for diffusers, peft and, mostly, ComfyUI."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from swd.commands import keys, shared
from swd.commands.numbers import check_given
from swd.config import check
from swd.export.student_folder import build_model, check_target, export, recorded_model, schedule_of
from swd.io.job_log import JobLog
from swd.modules.adapters import locate
from swd.modules.saved_student import load_student

ROOT = keys.EXPORT


def run(cfg: DictConfig) -> None:
    """Export the student that `run` names; prints the folder."""
    check_given(cfg, "export")
    check(cfg, ROOT)
    shared.quiet()
    target = Path(cfg.to)
    check_target(target)
    source = locate(cfg.run, Path(cfg.output), "run", cfg.ema)
    student = load_student(source, cfg.ema)
    model = build_model(recorded_model(source, cfg), cfg)
    student = student.fitted(model)
    schedule = schedule_of(source, cfg, model)
    task = f"exporting {source} of {model.name} to {target}" + (", and loading it back" if cfg.verify else "")
    with JobLog(task, 1, "student") as progress:
        folder = export(student, model, schedule, target, cfg.verify)
        progress.advance()
    print(folder)
