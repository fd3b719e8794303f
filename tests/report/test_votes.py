"""Pairs, sides and scrambling of a study; votes and the win rate that they give."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from report_folders import EVIL, write_evaluation, write_picture

from swd.report.pairs import Layout, read_study, render_pairs, scramble, unscramble
from swd.report.votes import Ballot, Vote, check_together, read_ballot, wilson, win_rates
from swd.types import UserError

LAYOUT = Layout("Which is better?", 0, 64, 80, 10)


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def write_two(folder: Path, count: int = 8) -> tuple[Path, Path]:
    """Red pictures of "model-a", blue ones of "model-b"."""
    a, b = folder / "model-a", folder / "model-b"
    for i in range(count):
        write_picture(a / f"{i}.png", "red")
        write_picture(b / f"{i:05d}.png", "blue")
    return a, b


# Pairs


def test_pictures_are_matched_by_number_name_or_index(tmp_path: Path) -> None:
    a, b = write_two(tmp_path, 3)
    write_picture(a / "star_seed3.png", "red")
    write_picture(a / "star_seed3_step1_48x48.png", "red")
    write_picture(b / "star_seed3.jpg", "blue")
    write_picture(b / "12.png", "blue")
    study = read_study(a, b, ["overall"])
    assert [pair.key for pair in study.pairs] == [0, 1, 2, "star_seed3"] and study.alone == (0, 1)
    assert study.names == ("model-a", "model-b")
    assert [pair.key for pair in read_study(a, b, ["overall"], 2).pairs] == [0, 1]
    drawn = write_evaluation(tmp_path / "evaluation") / "pictures"
    study = read_study(drawn / "teacher", drawn / "student", ["overall"])
    assert [(pair.key, pair.prompt) for pair in study.pairs] == [(0, EVIL), (1, EVIL)]


def test_prompts_come_from_the_pictures_and_must_agree(tmp_path: Path) -> None:
    for name, prompt in (("a", "a star"), ("b", "a star"), ("c", "a ring")):
        text = PngImagePlugin.PngInfo()
        text.add_text("prompt", prompt)
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png", pnginfo=text)
    assert read_study(tmp_path / "a", tmp_path / "b", ["x"]).pairs[0].prompt == "a star"
    with pytest.raises(UserError, match=r"picture 0 is of 'a star' in .* and of 'a ring'"):
        read_study(tmp_path / "a", tmp_path / "c", ["x"])


def test_folders_without_a_common_picture_are_refused(tmp_path: Path) -> None:
    a = write_picture(tmp_path / "a" / "0.png", "red").parent
    b = write_picture(tmp_path / "b" / "1.png", "red").parent
    (tmp_path / "c").mkdir()
    for other, message in ((b, "no picture of .* has a partner"), (tmp_path / "c", "holds no pictures"), (a, "twice")):
        with pytest.raises(UserError, match=message):
            read_study(a, other, ["x"])
    (b / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"0\.png is no picture that can be read"):
        render_pairs(read_study(a, b, ["x"]), LAYOUT)


def test_sides_are_balanced_seeded_and_not_readable_in_the_page(tmp_path: Path) -> None:
    study = read_study(*write_two(tmp_path), ["overall"])
    html = render_pairs(study, LAYOUT)
    assert html == render_pairs(study, LAYOUT)
    page, other = data_of(html), data_of(render_pairs(study, Layout("x", 1, 64, 80, 10)))
    hidden = unscramble(page["sealed"], page["study"])
    assert hidden["names"] == ["model-a", "model-b"]
    red = [pair["left"] for pair in page["pairs"]].count(page["pairs"][0]["left"])
    assert red == 4 and sum(flipped for *_, flipped in hidden["pairs"]) == 4
    assert [pair["id"] for pair in page["pairs"]] != sorted(pair["id"] for pair in page["pairs"])
    assert page["study"] == other["study"] and page["sealed"] != other["sealed"]
    plain = html + base64.b64decode(page["sealed"]).decode("latin1")
    assert "model-a" not in plain and "model-b" not in plain and "flip" not in plain


def test_another_picture_or_criterion_is_another_study(tmp_path: Path) -> None:
    a, b = write_two(tmp_path, 2)
    first = read_study(a, b, ["overall"]).hash()
    assert read_study(a, b, ["beauty"]).hash() != first
    write_picture(b / "00001.png", "green")
    assert read_study(a, b, ["overall"]).hash() != first


def test_a_page_that_is_too_large_is_refused(tmp_path: Path) -> None:
    study = read_study(*write_two(tmp_path), ["overall"])
    with pytest.raises(UserError, match=r"the first 0 of 8 pairs are larger than megabytes=0\.0001"):
        render_pairs(study, Layout("x", 0, 64, 80, 0.0001))


def test_scrambling_is_undone_by_its_key_alone() -> None:
    text = scramble({"a": "×"}, "key")
    assert unscramble(text, "key") == {"a": "×"} and "×" not in text
    with pytest.raises(ValueError):
        unscramble(text, "other")


# Votes


def ballot(scores: list[tuple[int, float]], session: str = "1", **more: Any) -> Ballot:
    parts = {
        "file": Path(f"votes{session}.json"),
        "study": "s",
        "session": session,
        "names": ("a", "b"),
        "prompts": ["star", "star", "ring", "cross"],
        "criteria": ["overall"],
        "votes": [Vote(pair, "overall", score) for pair, score in scores],
    }
    return Ballot(**(parts | more))


def test_wilsons_interval_has_its_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_win_rate_is_the_mean_over_prompts_and_a_tie_is_half() -> None:
    (rate,) = win_rates([ballot([(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.5)])])
    # star: (1 + 0) / 2, ring: 1, cross: 0.5
    assert rate.rate == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert (rate.low, rate.high) == pytest.approx(wilson(2 / 3, 3))
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert (rate.votes, rate.pairs, rate.prompts, rate.agreement) == (4, 4, 3, None)


def test_of_several_votes_on_a_pair_the_mean_counts() -> None:
    people = [ballot([(2, 1.0), (3, 1.0)], "1"), ballot([(2, 1.0), (3, 0.0)], "2"), ballot([(2, 1.0), (3, 0.0)], "3")]
    (rate,) = win_rates(people)
    assert rate.rate == pytest.approx((1 + 1 / 3) / 2)
    assert (rate.votes, rate.pairs, rate.prompts) == (6, 2, 2)
    assert (rate.wins, rate.ties, rate.losses, rate.agreement) == (1, 0, 1, 0.5)


def test_a_clear_preference_is_settled_and_an_even_one_is_not() -> None:
    prompts = [str(i) for i in range(40)]
    (clear,) = win_rates([ballot([(i, 1.0) for i in range(40)], prompts=prompts)])
    (even,) = win_rates([ballot([(i, float(i % 2)) for i in range(40)], prompts=prompts)])
    assert clear.settled and clear.high == pytest.approx(1) and not even.settled
    assert even.low == pytest.approx(1 - even.high)


def test_ballots_that_do_not_belong_together_are_refused() -> None:
    one = ballot([(0, 1.0)])
    for other, message in (
        (ballot([], "2", names=("a", "c")), r"votes2\.json compares a and c, votes1\.json a and b"),
        (ballot([], "2", study="t"), r"votes2\.json is of other pictures"),
        (ballot([(1, 1.0)], "1", file=Path("copy.json")), r"copy\.json and votes1\.json are of one person"),
    ):
        with pytest.raises(UserError, match=message):
            check_together([one, other])
    with pytest.raises(UserError, match="holds no vote yet"):
        check_together([ballot([])])


def votes_file(file: Path, **more: Any) -> Path:
    hidden = {"names": ["a", "b"], "pairs": [[0, "star", False], ["x", "", True]]}
    content = {
        "format": 1,
        "study": "0123456789abcdef",
        "session": "1",
        "voter": "",
        "criteria": ["overall"],
        "sealed": scramble(hidden, "0123456789abcdef"),
        "votes": [{"pair": 0, "criterion": "overall", "choice": "left"}],
    }
    file.write_text(json.dumps(content | more))
    return file


def test_the_side_says_who_won(tmp_path: Path) -> None:
    votes = [
        {"pair": 0, "criterion": "overall", "choice": "left"},
        {"pair": 1, "criterion": "overall", "choice": "left"},
    ]
    found = read_ballot(votes_file(tmp_path / "v.json", votes=votes))
    assert [vote.score for vote in found.votes] == [1.0, 0.0] and found.prompts == ["star", "x"]
    votes[0]["choice"], votes[1]["choice"] = "tie", "right"
    found = read_ballot(votes_file(tmp_path / "v.json", votes=votes))
    assert [vote.score for vote in found.votes] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"votes": [{"pair": 2, "criterion": "overall", "choice": "tie"}]}, "vote 1: pair 2 is unknown"),
        ({"votes": [{"pair": True, "criterion": "overall", "choice": "tie"}]}, "vote 1: pair True is unknown"),
        ({"votes": [{"pair": 0, "criterion": "x", "choice": "tie"}]}, "criterion 'x' is unknown"),
        ({"votes": [{"pair": 0, "criterion": "overall", "choice": "up"}]}, "choice 'up' is none of"),
        ({"votes": [{"pair": 0, "criterion": "overall", "choice": "tie"}] * 2}, "vote 2: pair 0 has a vote"),
        ({"votes": [{"pair": 0}]}, "is damaged"),
        ({"votes": None}, "is damaged"),
        ({"sealed": "%"}, "is damaged"),
        ({"study": ""}, "is damaged"),
        ({"study": "other"}, "is damaged"),
        ({"format": 2}, "has format 2"),
    ],
)
def test_files_that_are_damaged_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_ballot(votes_file(tmp_path / "v.json", **more))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_ballot(tmp_path / "none.json")
    for text, message in (("{", "cannot be read"), ("[]", "holds no votes"), ('{"a": 1}', "holds no votes")):
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_ballot(tmp_path / "v.json")
