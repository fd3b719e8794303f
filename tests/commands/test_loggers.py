"""A run in its loggers: metrics by iteration, pictures with captions, the configuration, and no credential."""

from __future__ import annotations

import csv
import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import composed, overrides

from swd.commands import loggers, train
from swd.types import UserError

DRAWN = ["callbacks=[checkpoint,adapter,samples,students]", "callbacks.samples.prompts=[a red star]"]
OFFLINE = ["logger=wandb", "logger.offline=true"]


def fit(model: Path, folder: Path, *arguments: str, **options: Any) -> None:
    more = {"loss": "mmd", "output": folder.parents[1]} | options
    train.fit(composed([*overrides(model, folder, **more), *DRAWN, *arguments]))


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as stream:
        return list(csv.DictReader(stream))


def record(run: Path) -> bytes:
    """All that wandb wrote down of a run, to be uploaded later."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return file.read_bytes()


def test_wandb_gets_a_run_of_its_own_that_a_resumed_one_continues(tiny_model: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "tiny" / name for name in ("first", "second", "resumed")]
    fit(tiny_model, runs[0], *OFFLINE, task__lr=0.0123)
    fit(tiny_model, runs[1], *OFFLINE, task__lr=0.0456)
    fit(tiny_model, runs[2], *OFFLINE, f"resume={runs[0]}", task__lr=0.0123, trainer__max_steps=3)
    ids = [json.loads((run / "run.json").read_text())["wandb_id"] for run in runs]
    assert ids[0] != ids[1] and ids[0] == ids[2]
    for run, own, other in zip(runs, (b"0.0123", b"0.0456", b"0.0123"), (b"0.0456", b"0.0123", b"0.0456"), strict=True):
        written = record(run)
        assert own in written and other not in written  # the configuration
        assert f"tiny/{run.name}".encode() in written  # the name
        assert b"loss/mmd" in written and b"trainer/global_step" in written
        assert b"a red star" in written and list(run.glob("wandb/*/files/media/images/samples_*.png"))
    assert [row["step"] for row in table(runs[2]) if row["loss/mmd"]] == ["3"]
    assert [row["step"] for row in table(runs[0]) if row["loss/mmd"]] == ["1", "2"]


def events(folder: Path) -> list[Any]:
    """The events of a TensorBoard file: each is a length of 8 bytes, a checksum of 4, the event, a checksum of 4."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.out.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard_gets_metrics_pictures_and_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run = tmp_path / "tiny" / "run"
    fit(tiny_model, run, "logger=tensorboard", task__lr=0.0123)
    values = [(event.step, value) for event in events(run / "tensorboard") for value in event.summary.value]
    losses = {step: value.simple_value for step, value in values if value.tag == "loss/mmd"}
    expected = {int(row["step"]): float(row["loss/mmd"]) for row in table(run)}
    assert losses == pytest.approx(expected, rel=1e-6) and list(losses) == [1, 2]
    ((step, picture),) = [(step, value.image) for step, value in values if value.tag == "samples"]
    assert (step, picture.height) == (2, picture.height) and picture.encoded_image_string.startswith(b"\x89PNG")
    assert any(b"a red star" in value.SerializeToString() for _, value in values if "caption" in value.tag)
    assert "lr: 0.0123" in (run / "tensorboard" / "hparams.yaml").read_text()


def test_without_a_writer_for_tensorboard_it_is_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger=tensorboard needs .*pip install tensorboardX"):
        fit(tiny_model, tmp_path / "tiny" / "run", "logger=tensorboard")
    assert not (tmp_path / "tiny" / "run").exists()


SECRETS = {"WANDB_API_KEY": "local-0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_PlantedPlantedPlanted"}


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_no_file_of_a_run_holds_a_credential(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    if logger == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
        pytest.skip("tensorboardX is not installed")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    given = ["+logger.settings.api_key=typed-key-0123456789"] if logger == "wandb" else []
    given += OFFLINE[1:] if logger == "wandb" else []
    # A URL with a password, in a plain value that is written down.
    typed = ["++model.revision=https://me:PassWord77@host/x", f"logger={logger}", *given]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed, f"+hub_token={SECRETS['HF_TOKEN']}"])
    run = tmp_path / "tiny" / "run"
    fit(tiny_model, run, *typed)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    planted = [*SECRETS.values(), "typed-key-0123456789", "PassWord77"]
    found = {(file.name, text) for file in files for text in planted if text.encode() in file.read_bytes()}
    assert not found and len(files) > 8
    assert b"revision: https://***@host/x" in (run / "config.yaml").read_bytes()


def test_names_differ_within_a_sweep_and_lie_below_output(tmp_path: Path) -> None:
    plain = ["name=x", f"output={tmp_path}"]
    names = [
        loggers.run_name(composed([*plain, f"folder={tmp_path / 'sweep' / 'monday' / job}"])) for job in ("0_x", "1_x")
    ]
    assert names == ["sweep/monday/0_x", "sweep/monday/1_x"]
    assert loggers.run_name(composed([*plain, "folder=/elsewhere/run"])) == "run"


@pytest.mark.parametrize("text", ['{"wandb_id": "../x"}', '{"wandb_id": 5}', "[]", "no json"])
def test_an_id_that_is_none_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    fresh = loggers.wandb_id(str(tmp_path / "checkpoints" / "x.ckpt"))
    assert len(fresh) == 8 and fresh.isalnum()
