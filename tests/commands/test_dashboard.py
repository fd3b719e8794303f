"""`swd dashboard`: panels for what runs logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import composed

from swd.commands import dashboard
from swd.types import UserError


def written(tmp_path: Path, *arguments: str) -> dict[str, list[tuple[str, list[str]]]]:
    """Panels by title of their section."""
    dashboard.run(composed([f"output={tmp_path}", *arguments], "dashboard"))
    page = json.loads((tmp_path / "dashboard.json").read_text())
    assert page["x"] == "trainer/global_step"
    return {
        each["title"]: [(panel["title"], panel["metrics"]) for panel in each["panels"]] for each in page["sections"]
    }


def logged(run: Path, *names: str) -> None:
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text(",".join(["epoch", *names, "step"]) + "\n")


def test_panels_are_those_of_the_metrics_that_runs_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path / "a" / "1", "loss/mmd", "metrics/fid/128", "metrics/fid/64", "time/samples", "train/old")
    logged(tmp_path / "b" / "2", "loss/dmd", "metrics/clip/512", "metrics/fid/1024")
    assert written(tmp_path) == {
        "Losses": [("dmd", ["loss/dmd"]), ("mmd", ["loss/mmd"])],
        "Metrics by size": [
            ("clip", ["metrics/clip/512"]),
            ("fid", ["metrics/fid/64", "metrics/fid/128", "metrics/fid/1024"]),
        ],
        "Samples": [("samples", ["samples"])],
        "Throughput": [("samples", ["time/samples"])],
    }
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'dashboard.json'}\n"
    assert "swd dashboard entity=NAME" in err and err.count("\n") == 1


def test_without_runs_the_losses_of_the_paper_are_there(tmp_path: Path) -> None:
    assert [metrics for _, (metrics,) in written(tmp_path)["Losses"]] == list(dashboard.COMMON)


def test_saving_needs_a_package_and_says_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"entity=me: saving a workspace needs the package wandb-workspaces: pip"):
        written(tmp_path, "entity=me")
    assert not (tmp_path / "dashboard.json").exists()


class Refusal(Exception):
    __module__ = "wandb.errors"


@pytest.mark.parametrize("refused", [False, True])
def test_the_workspace_has_the_panels_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: bool
) -> None:
    """A stand-in for the package, whose `save` takes an account: it keeps what it is given."""
    made: list[dict[str, Any]] = []

    class Kept(dict[str, Any]):
        url = "https://wandb.ai/me/swd?nw=1"

        def __init__(self, **given: Any) -> None:
            super().__init__(given)

        def save(self) -> None:
            if refused:
                raise Refusal("api_key not configured")
            made.append(self)

    reports = SimpleNamespace(v2=SimpleNamespace(LinePlot=Kept, MediaBrowser=Kept))
    package = SimpleNamespace(reports=reports, workspaces=SimpleNamespace(Workspace=Kept, Section=Kept))
    for name, module in (("", package), (".reports", reports), (".reports.v2", reports.v2)):
        monkeypatch.setitem(sys.modules, f"wandb_workspaces{name}", module)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", package.workspaces)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: name)
    if refused:
        with pytest.raises(UserError, match=r"entity=me: wandb refused the workspace \(api_key not configured\); run"):
            written(tmp_path, "entity=me")
        return
    page = written(tmp_path, "entity=me")
    assert [(each["name"], each["is_open"]) for each in made[0]["sections"]] == [(title, True) for title in page]
    lines, pictures = made[0]["sections"]
    assert [panel["y"] for panel in lines["panels"]] == [metrics for _, metrics in page["Losses"]]
    assert {panel["x"] for panel in lines["panels"]} == {"trainer/global_step"}
    assert pictures["panels"] == [{"title": "samples", "media_keys": ["samples"]}]
    assert Kept.url in capsys.readouterr().out
