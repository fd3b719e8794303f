"""What a long job says where its output is a file."""

from __future__ import annotations

import pytest

from swd.io.progress import Progress, duration, rate_text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_job_says_what_it_does_every_thirty_seconds_and_when_it_ends(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("drawing into out", 100, "picture", done=20, clock=clock) as progress:
        for _ in range(80):
            clock.now += 1.5
            progress.advance(note="loss 1")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "drawing into out: 100 pictures, 20 of them done before"
    assert lines[-1] == "done: 80 pictures in 2 min 0 s"
    # 80 pictures at 1.5 s each: a line after every 20th.
    assert [line.split()[1] for line in lines[1:-1]] == ["40/100", "60/100", "80/100", "100/100"]
    assert lines[1] == "picture 40/100 (40%), 1.5 s/picture, 1 min 30 s left; loss 1"


def test_a_job_that_fails_does_not_say_that_it_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), Progress("importing", 3, "row"):
        raise ValueError
    assert capfd.readouterr().err == "importing: 3 rows\n"


def test_other_processes_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("importing", 3, shown=False, interval=0) as progress:
        progress.advance(3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rate() -> None:
    assert rate_text(12.34, "picture") == "12.3 pictures/s"
    assert rate_text(0.25, "picture") == "4 s/picture"
