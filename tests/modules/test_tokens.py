"""Prompts and captions beyond the length that a model sees."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from PIL import Image
from shards import make_pictures

from swd.callbacks import Samples
from swd.data.datamodule import PairData
from swd.data.picture_files import FolderDataset
from swd.data.webdataset import ShardData
from swd.losses import DMD
from swd.modules.distiller import Distiller
from swd.modules.pretrained import Pretrained
from swd.modules.tokens import Beyond, TextLimit, evenly, warn_beyond
from swd.schedule import ScaleSchedule

SHORT = "a red star above a blue ring"
LONG = " and ".join([SHORT] * 6)
LENGTH = {
    # Words, with T5's end of the text, or with CLIP's beginning and end.
    "sd3": 6 * 7 + 5 + 1,
    "sd35_medium": 6 * 7 + 5 + 1,
    "flux": 6 * 7 + 5 + 1,
    "sdxl": 6 * 7 + 5 + 2,
    "wan": 6 * 7 + 5 + 1,
    "sana": 6 * 7 + 5 + 1,
    "qwen_image": 6 * 7 + 5 + 5,  # with the end of the chat
    # With the one token of its template for chats.
    "flux2_klein": 6 * 7 + 5 + 1,
    "z_image": 6 * 7 + 5 + 3,
    "chroma": 6 * 7 + 5 + 1,
}
AROUND = dict.fromkeys(families.FAMILIES, 1) | {"sdxl": 2, "qwen_image": 5, "z_image": 3}
"""Special tokens that the text has room beside."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else families.save(name, root / name)

    return folder


@pytest.mark.parametrize("name", families.FAMILIES)
def test_tokens_are_counted_as_the_pipeline_counts_them(saved: Any, name: str) -> None:
    model = families.pretrained(name, saved(name))
    limit = TextLimit(model)
    assert limit.limit == 24 and limit.counts([LONG]) == [LENGTH[name]]
    found = limit.beyond([SHORT, LONG, LONG, "a heart"])
    assert found == Beyond(24, 4, 2, LENGTH[name] - 24)
    # The longest text that is not cut, and one word more.
    words = (LONG.split() * 2)[: 24 - AROUND[name]]
    assert limit.beyond([" ".join(words)]).count == 0
    assert limit.beyond([" ".join([*words, "star"])]) == Beyond(24, 1, 1, 1)


@pytest.mark.parametrize("name", ["sd3", "sdxl", "wan", "sana", "flux2_klein", "chroma"])
def test_what_is_beyond_the_limit_changes_nothing_and_what_is_within_does(saved: Any, name: str) -> None:
    """The limit is where the stock encoders stop to see."""
    model = families.pretrained(name, saved(name))
    encoders = model.encoders()
    words = (LONG.split() * 2)[: 24 - AROUND[name]]
    whole, beyond, within = " ".join(words), " ".join([*words, "star"]), " ".join([*words[:-1], "heart"])
    a, b, c = (encoders.encode_prompts([text]).embeds for text in (whole, beyond, within))
    assert (a - b).abs().max() == 0 and (a - c).abs().max() > 0


def test_the_length_is_the_model_s_not_the_tokenizer_s(saved: Any) -> None:
    assert TextLimit(families.pretrained("sd3", saved("sd3"), max_text_tokens=10)).beyond([SHORT]).count == 0
    assert TextLimit(families.pretrained("sd3", saved("sd3"), max_text_tokens=7)).beyond([SHORT]) == Beyond(7, 1, 1, 1)
    # SDXL's is CLIP's own, whatever is chosen.
    assert TextLimit(families.pretrained("sdxl", saved("sdxl"), max_text_tokens=7)).beyond([SHORT]).count == 0


def test_wan_and_sana_clean_prompts_first(saved: Any) -> None:
    for name, text in (("wan", "a &amp;amp;   star"), ("sana", "  A RED STAR ")):
        limit = TextLimit(families.pretrained(name, saved(name)))
        assert limit.counts([text]) == limit.counts([{"wan": "a & star", "sana": "a red star"}[name]])


def test_without_t5_the_limit_is_clip_s(saved: Any, tmp_path: Path) -> None:
    folder = families.save("sd3", tmp_path / "clip-only")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )
    model = families.pretrained("sd3", folder, max_text_tokens=500)
    assert TextLimit(model).beyond([LONG]) == Beyond(24, 1, 1, LENGTH["sdxl"] - 24)
    with pytest.warns(UserWarning, match="longer than the 24 tokens of this model's text encoder, by up to 25 tokens"):
        warn_beyond(model, [LONG])


def test_one_warning_says_how_many_and_by_how_much(saved: Any) -> None:
    model = families.pretrained("sd3", saved("sd3"))
    with pytest.warns(UserWarning) as caught:
        warn_beyond(model, [SHORT, LONG, LONG], "captions", 500)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(
        "2 of 3 captions that were looked at (there are 500) are longer than model.max_text_tokens=24"
    )
    assert "by up to 24 tokens" in text and "raise it (up to 512" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_beyond(model, [SHORT])


def test_a_tokenizer_that_cannot_be_read_is_left_to_who_loads_the_model(saved: Any, tmp_path: Path) -> None:
    folder = families.save("sd3", tmp_path / "damaged")
    (folder / "tokenizer_3" / "tokenizer.json").write_bytes(b"?")
    assert TextLimit(families.pretrained("sd3", folder)).beyond([LONG]) == Beyond(0)


def test_a_sample_is_spread_evenly() -> None:
    assert evenly(4, 10) == [0, 1, 2, 3] and evenly(100, 4) == [0, 25, 50, 75] and evenly(0, 3) == []


# Training


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(LONG if i < 2 else SHORT)
    return folder


@pytest.mark.parametrize("kind", ["images", "webdataset"])
def test_training_warns_of_long_captions_in_the_first_process_without_encoders(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, schedule = families.pretrained("sd3", saved("sd3")), ScaleSchedule(families.SIGMAS, families.SIZES["sd3"])
    monkeypatch.setattr(Pretrained, "pipeline", lambda *args: pytest.fail("encoders were loaded"))
    if kind == "images":
        data: Any = PairData(FolderDataset(str(pictures(tmp_path / "data")), 64))
    else:
        captions = lambda row: LONG if row < 2 else SHORT  # noqa: E731
        data = ShardData(str(make_pictures(tmp_path / "data", 6, captions=captions)))
    with pytest.warns(UserWarning, match=r"^2 of 6 captions are longer than model\.max_text_tokens=24.*24 tokens"):
        data.check(model, schedule)
    for name, value in (("RANK", "1"), ("SLURM_PROCID", "3"), ("LOCAL_RANK", "1"), ("NODE_RANK", "1")):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setenv(name, value)
            patch.setenv("WORLD_SIZE", "4")
            patch.setenv("SLURM_NTASKS", "4")
            patch.setenv("SLURM_STEP_ID", "0")
            warnings.simplefilter("error")
            data.check(model, schedule)


def test_training_warns_of_long_prompts_of_sample_sheets(saved: Any) -> None:
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES["sd3"])
    task = Distiller(families.pretrained("sd3", saved("sd3")), schedule, {"dmd": DMD()})
    trainer: Any = SimpleNamespace(is_global_zero=True)
    with pytest.warns(UserWarning, match=r"^1 of 2 prompts of sample sheets are longer than model\.max_text_tokens=24"):
        Samples([SHORT, LONG]).on_fit_start(trainer, task)
    trainer.is_global_zero = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Samples([SHORT, LONG]).on_fit_start(trainer, task)
