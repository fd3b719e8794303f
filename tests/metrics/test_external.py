"""Scoring outside: scripts in front of stand-ins for the other projects' packages, and the metric that runs them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swd.metrics import external
from swd.metrics.base import Drawn
from swd.metrics.external import External, OutsideScorer
from swd.types import UserError

PROMPTS = ["a red circle", "a „blue“ square", "a red circle"]
STAND_INS = {
    "torch.py": "import contextlib\nno_grad = contextlib.nullcontext\n",
    "hpsv3.py": """
class HPSv3RewardInferencer:
    def __init__(self, device, checkpoint_path):
        self.device = device

    def reward(self, image_paths, prompts):
        with open(__file__ + ".calls", "a") as log:
            log.write(f"{len(prompts)}\\n")
        return [(len(prompt) + len(open(path).read()) / 100, 0.0) for path, prompt in zip(image_paths, prompts)]
""",
    "hpsv3-1.0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: hpsv3\nVersion: 1.0.0\n",
}
"""A package whose score is the prompt's length plus a hundredth of the picture's."""
EXPECTED = [12.01, 15.02, 12.03]


def script(name: str) -> ModuleType:
    """One of the scripts, as a module."""
    modules = list(dict.fromkeys(("contract", name)))
    for module in modules:
        spec = importlib.util.spec_from_file_location(module, external.SCRIPTS / f"{module}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    found = sys.modules[name]
    for module in modules:
        del sys.modules[module]
    return found


def draw(folder: Path, prompts: Sequence[str] = PROMPTS, ending: str = "png") -> Path:
    """A folder as `swd` draws it; picture i holds i + 1 letters."""
    folder.mkdir()
    rows = [{"file": f"{i:05}.{ending}", "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        (folder / str(row["file"])).write_text("x" * (i + 1))
    external.write_picture_index(folder, rows)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw(tmp_path / "pictures")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with the stand-ins."""
    folder = tmp_path / "packages"
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def interpreter(folder: Path, packages: Path) -> Path:
    """An interpreter of another environment, which has the stand-ins."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    file.chmod(0o755)
    return file


def score(name: str, packages: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(external.SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(packages)})


# The scripts


def test_a_script_scores_a_folder(pictures: Path, packages: Path) -> None:
    done = score("hpsv3", packages, pictures, "--batch", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads((pictures / "hpsv3.json").read_text())
    assert found["scores"] == pytest.approx({f"{i:05}.png": EXPECTED[i] for i in range(3)})
    assert (found["package"], found["higher_is_better"]) == ("hpsv3 1.0.0", True)
    assert (packages / "hpsv3.py.calls").read_text().split() == ["2", "1"]
    assert sorted(file.name for file in pictures.iterdir() if file.name.startswith(".")) == []


def test_a_killed_script_goes_on_where_it_was(pictures: Path, packages: Path) -> None:
    contract = script("contract")
    left = {"index_sha256": contract.index_hash(pictures), "scores": {"00000.png": 5.0, "00001.png": 6.0}}
    (pictures / ".hpsv3.json.partial").write_text(json.dumps(left))
    assert score("hpsv3", packages, pictures).returncode == 0
    found = json.loads((pictures / "hpsv3.json").read_text())["scores"]
    assert found == pytest.approx({"00000.png": 5.0, "00001.png": 6.0, "00002.png": EXPECTED[2]})
    # Scores left over from another index count for nothing.
    (pictures / ".hpsv3.json.partial").write_text(json.dumps(left | {"index_sha256": "0"}))
    assert score("hpsv3", packages, pictures).returncode == 0
    assert json.loads((pictures / "hpsv3.json").read_text())["scores"]["00000.png"] == pytest.approx(EXPECTED[0])


@pytest.mark.parametrize("name", [*external.NAMES, "contract"])
def test_every_script_imports_without_its_packages(name: str) -> None:
    found = script(name)
    if name != "contract":
        assert found.SCORER.name == name
        requirements = external.SCRIPTS.parents[1] / "requirements" / "external" / f"{name}.txt"
        lines = [line for line in requirements.read_text().splitlines() if not line.startswith("#")]
        assert lines and all("==" in line for line in lines)
        assert not found.SCORER.package or any(line.startswith(f"{found.SCORER.package}==") for line in lines)


def test_absent_packages_are_one_line(tmp_path: Path, pictures: Path) -> None:
    done = score("imagereward", tmp_path, pictures)
    assert done.returncode == 2
    assert done.stderr.startswith("error: imagereward needs the package ImageReward, which ")
    assert "requirements/external/imagereward.txt" in done.stderr and done.stderr.count("\n") == 1
    assert not (pictures / "imagereward.json").exists()


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "index.jsonl is not there; give a folder"),
        ("", "names no pictures"),
        ('{"file": "00000.png", "prompt": "a"}\n{', "line 2 is no JSON object"),
        ('{"file": "00000.png", "prompt": 3}', "line 1 is no JSON object"),
        ('["00000.png"]', "line 1 is no JSON object"),
        ('{"file": "9.png", "prompt": "a"}', "9.png, which is not there; draw the folder again"),
        ('{"file": "00000.png", "prompt": "a"}\n' * 2, "names 1 pictures twice"),
    ],
)
def test_a_wrong_index_is_one_line(pictures: Path, packages: Path, index: str | None, message: str) -> None:
    (pictures / "index.jsonl").unlink()
    if index is not None:
        (pictures / "index.jsonl").write_text(index)
    done = score("hpsv3", packages, pictures)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "/nowhere/HPSv3.safetensors"], "--weights /nowhere/HPSv3.safetensors is not there; download"),
        (["--batch", "0"], "--batch 0 is not valid"),
        (["--out", "/proc/x.json"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line(pictures: Path, packages: Path, arguments: list[str], message: str) -> None:
    done = score("hpsv3", packages, pictures, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_score_that_is_no_number_is_refused(pictures: Path, packages: Path) -> None:
    (packages / "hpsv3.py").write_text(STAND_INS["hpsv3.py"].replace("len(prompt) +", "float('nan') +"))
    done = score("hpsv3", packages, pictures)
    assert done.returncode == 2 and "hpsv3 gave nan for" in done.stderr


# Layouts of benchmarks

BENCHMARK = [
    {"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
]


def geneval_repository(folder: Path) -> Path:
    """A clone of GenEval, whose program finds pictures right that hold an even number of letters."""
    (folder / "prompts").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "detector").mkdir()
    (folder / "prompts" / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, BENCHMARK)) + "\n")
    (folder / "evaluation" / "evaluate_images.py").write_text("""
import json, os, sys
folder, out = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
with open(out, "w") as results:
    for number in sorted(os.listdir(folder), reverse=True):
        metadata = json.load(open(os.path.join(folder, number, "metadata.jsonl")))
        for name in os.listdir(os.path.join(folder, number, "samples")):
            path = os.path.join(folder, number, "samples", name)
            right = len(open(path).read()) % 2 == 0
            results.write(json.dumps({"filename": path, "tag": metadata["tag"], "correct": right}) + "\\n")
""")
    return folder


def test_geneval_reads_its_own_layout(tmp_path: Path) -> None:
    geneval = script("geneval")
    folder = draw(tmp_path / "pictures", ["two dogs", "a photo of a bench", "two dogs"])
    drawn = script("contract").read_index(folder)
    files = geneval.write_layout(BENCHMARK, drawn, tmp_path / "layout")
    found = sorted(str(file.relative_to(tmp_path / "layout")) for file in (tmp_path / "layout").rglob("*.*"))
    assert found == [
        "00000/metadata.jsonl",
        "00000/samples/0000.png",
        "00001/metadata.jsonl",
        "00001/samples/0000.png",
        "00001/samples/0001.png",
    ]
    assert json.loads((tmp_path / "layout" / "00001" / "metadata.jsonl").read_text()) == BENCHMARK[1]
    assert (tmp_path / "layout" / "00001" / "samples" / "0001.png").read_text() == "xxx"
    assert files[tmp_path / "layout" / "00000" / "samples" / "0000.png"] == "00001.png"


def test_geneval_is_the_mean_over_tasks(tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mmdet", "open_clip", "clip_benchmark", "pandas"):
        (packages / f"{name}.py").write_text("")
    repository = geneval_repository(tmp_path / "geneval")
    folder = draw(tmp_path / "pictures", ["two dogs", "a photo of a bench", "two dogs"])
    arguments = f"--repository {repository} --detector {repository / 'detector'}"
    monkeypatch.setenv("SWD_SCORER_GENEVAL", f"{interpreter(tmp_path, packages)} {arguments}")
    metric = External("geneval")
    metric.check()
    rows = metric.outside(folder)
    assert rows.tolist() == [[0, 0], [1, 1], [0, 0]]
    found = metric.score(Drawn({"outside-geneval": rows}))
    assert found.values == {"geneval": 0.5}  # of pictures a third is right

    # A prompt that is not the benchmark's, and a benchmark that is not there.
    draw(tmp_path / "others")
    done = score("geneval", packages, tmp_path / "others", *arguments.split())
    assert done.returncode == 2 and "none of GenEval's; draw with prompts/evaluation_metadata.jsonl" in done.stderr
    (repository / "prompts" / "evaluation_metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl is not there; clone"):
        metric.check()


def test_geneval2_reads_one_picture_a_prompt(tmp_path: Path) -> None:
    geneval2 = script("geneval2")
    folder = draw(tmp_path / "pictures", ["b", "a", "b"])
    rounds = geneval2.rounds_of(script("contract").read_index(folder))
    assert [[picture.file for picture in part] for part in rounds] == [["00000.png", "00001.png"], ["00002.png"]]
    benchmark = {name: {"prompt": name, "vqa_list": [["?", "Yes"]]} for name in "abc"}
    entries, paths = geneval2.write_layout(benchmark, rounds[0], tmp_path / "0")
    assert [json.loads(line)["prompt"] for line in entries.read_text().splitlines()] == ["b", "a"]
    assert json.loads(paths.read_text()) == {"b": str(folder / "00000.png"), "a": str(folder / "00001.png")}


def test_geneval2_scores(tmp_path: Path, packages: Path) -> None:
    repository = tmp_path / "GenEval2"
    repository.mkdir()
    (packages / "transformers.py").write_text("")
    (packages / "scipy.py").write_text("")
    entries = [{"prompt": name, "vqa_list": []} for name in ("a", "b", "c")]
    (repository / "geneval2_data.jsonl").write_text("\n".join(map(json.dumps, entries)))
    # Answers 0.5 and a tenth of the picture's number of letters.
    (repository / "evaluation.py").write_text("""
import json, sys
value = lambda name: sys.argv[sys.argv.index(name) + 1]
paths = json.load(open(value("--image_filepath_data")))
prompts = [json.loads(line)["prompt"] for line in open(value("--benchmark_data"))]
json.dump([[0.5, len(open(paths[p]).read()) / 10] for p in prompts], open(value("--output_file"), "w"))
""")
    folder = draw(tmp_path / "pictures", ["b", "a", "b"])
    for method, expected in (
        ("soft_tifa_gm", [100 * math.sqrt(0.5 * n / 10) for n in (1, 2, 3)]),
        ("soft_tifa_am", [30, 35, 40]),
    ):
        done = score("geneval2", packages, folder, "--repository", repository, "--method", method)
        assert done.returncode == 0, done.stderr
        found = json.loads((folder / "geneval2.json").read_text())["scores"]
        assert list(found.values()) == pytest.approx(expected)
    assert script("geneval2").score_of([0.0, 1.0], "soft_tifa_gm") == 0


def test_vbench_names_videos_by_their_prompts(tmp_path: Path, packages: Path) -> None:
    (packages / "torch.py").write_text("device = str\n")
    (packages / "vbench-0.1.5.dist-info").mkdir()
    (packages / "vbench-0.1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5")
    (packages / "vbench.py").write_text("""
import json, os
class VBench:
    def __init__(self, device, prompts, out):
        self.out = out
        os.makedirs(out)
    def evaluate(self, videos_path, name, dimension_list):
        rows = [{"video_path": os.path.join(videos_path, each), "video_results": 10.0 * len(each)}
                for each in os.listdir(videos_path) if each.startswith("a dog")]
        json.dump({dimension_list[0]: [0.5, rows]}, open(f"{self.out}/{name}_eval_results.json", "w"))
""")
    folder = draw(tmp_path / "videos", ["a cat", "a dog", "a dog"], "mp4")
    names = script("vbench").write_layout(script("contract").read_index(folder), tmp_path / "layout")
    assert names == {"a cat-0.mp4": "00000.mp4", "a dog-0.mp4": "00001.mp4", "a dog-1.mp4": "00002.mp4"}
    assert (tmp_path / "layout" / "a dog-1.mp4").read_text() == "xxx"
    done = score("vbench", packages, folder, "--dimension", "imaging_quality")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "vbench.json").read_text())["scores"]
    assert found == {"00000.mp4": None, "00001.mp4": 1.1, "00002.mp4": 1.1}
    done = score("vbench", packages, draw(tmp_path / "many", ["a dog"] * 6), "--dimension", "color")
    assert done.returncode == 2 and "VBench reads 5 videos a prompt" in done.stderr


# The metric


def test_the_metric_is_the_mean_of_scores(
    tmp_path: Path, pictures: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWD_SCORER_HPSV3", f"{interpreter(tmp_path, packages)} --batch 3")
    metric = External("hpsv3")
    metric.check()
    assert not (packages / "hpsv3.py.calls").exists()
    rows = metric.outside(pictures)
    assert rows[:, 0].tolist() == pytest.approx(EXPECTED)
    found = metric.score(Drawn({"outside-hpsv3": rows}))
    assert found.values["hpsv3"] == pytest.approx(sum(EXPECTED) / 3)
    assert found.parts is not None and found.parts.tolist() == pytest.approx(EXPECTED)
    # Stored scores are read again, also by those who have no interpreter.
    monkeypatch.delenv("SWD_SCORER_HPSV3")
    assert torch.equal(External("hpsv3", run=False).outside(pictures), rows)
    assert (packages / "hpsv3.py.calls").read_text().split() == ["3"]


def test_another_environment_does_not_see_this_ones_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/here")
    monkeypatch.setenv("VIRTUAL_ENV", "/here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert external.environment() == {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }


def test_pictures_without_a_score_and_groups_by_hand() -> None:
    values = torch.tensor([1.0, math.nan, 0, 1, 4], dtype=torch.float64)
    groups = torch.tensor([0, 0, 2, 2, 2])
    parts = external.mean_of_groups(values, groups)
    assert parts.mean().item() == pytest.approx((1 + 5 / 3) / 2)
    assert parts[1].item() == pytest.approx((1 + 5 / 3) / 2)
    # The derivative of the value when one picture counts for more, by finite differences.
    step, i = 1e-6, 4
    weights = torch.ones(5, dtype=torch.float64)
    weights[i] += step
    heavier = (1 + (weights[2:] @ values[2:]) / weights[2:].sum()) / 2
    slope = (heavier.item() - parts.mean().item()) / step
    assert (parts[i] - parts.mean()).item() / 5 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "SWD_SCORER_HPSV3 does not name one; set it to that environment's python"),
        ("/nowhere/python", "SWD_SCORER_HPSV3: /nowhere/python is no program"),
        ('"/nowhere', "close its quotes"),
        (sys.executable, "hpsv3 cannot be scored: hpsv3 needs the package hpsv3, which "),
        (f"{sys.executable} --dimension color", "unrecognized arguments: --dimension"),
    ],
)
def test_an_absent_interpreter_or_package_is_one_line_before_anything_is_drawn(
    given: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SWD_SCORER_HPSV3", raising=False)
    if given is not None:
        monkeypatch.setenv("SWD_SCORER_HPSV3", given)
    with pytest.raises(UserError) as raised:
        External("hpsv3").check()
    assert message in str(raised.value) and "\n" not in str(raised.value)


GOOD = {"format": 1, "metric": "hpsv3", "scores": {f"{i:05}.png": float(i) for i in range(3)}}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no JSON"),
        ([], 'has no "format": 1'),
        (GOOD | {"format": 2}, 'has no "format": 1'),
        (GOOD | {"metric": "imagereward"}, "is of the metric 'imagereward'"),
        (GOOD | {"scores": [1, 2, 3]}, 'has no "scores" by file'),
        (GOOD | {"scores": {"00000.png": "high"}}, "gives 00000.png the score 'high', which is no finite number"),
        (GOOD | {"scores": {"00000.png": math.inf}}, "gives 00000.png the score inf"),
        (GOOD | {"scores": {"00000.png": True}}, "gives 00000.png the score True"),
        (GOOD | {"scores": {"00000.png": None}}, "has a score for none of the pictures"),
        (GOOD | {"groups": {"00000.png": 1}}, 'has "groups" that are no texts'),
        (GOOD | {"index_sha256": "0"}, "is of other pictures than"),
        (GOOD | {"scores": {"00000.png": 1.0}}, "has no score of 00001.png"),
    ],
)
def test_a_wrong_json_is_one_line_that_names_it(pictures: Path, content: Any, message: str) -> None:
    if isinstance(content, dict):
        content = {"index_sha256": script("contract").index_hash(pictures)} | content
    if content is not None:
        (pictures / "hpsv3.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as raised:
        OutsideScorer("hpsv3", run=False)(pictures)
    text = str(raised.value)
    assert message in text and str(pictures / "hpsv3.json") in text and "score the folder again" in text
    assert "\n" not in text


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match=r"scorer=hpsv2 is not known; use one of hpsv3"):
        External("hpsv2")
    with pytest.raises(UserError, match="no scores of hpsv3; score their folder first"):
        External("hpsv3").score(Drawn({"inception": torch.zeros(2, 3)}))
