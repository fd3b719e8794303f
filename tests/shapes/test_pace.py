"""The demo says after its first iterations if this machine needs longer than it promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from swd.shapes import demo
from swd.shapes.pace import JUDGED, TRAINED, Pace


def run(
    seconds: float,
    capsys: pytest.CaptureFixture[str],
    iterations: int = 20,
    rank: int = 0,
    shortest: bool = False,
) -> tuple[Pace, str]:
    """Iterations by a clock of our own: the first four take 10 s, the others `seconds`; 100 s went by before."""
    now = [100.0]
    pace = Pace(10, [(536, 2.0), (32, 56.0)], lambda: now[0], shortest)
    task: Any = SimpleNamespace(schedule=[1, 2, 3, 4], batches_per_iteration=3)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(batch_size=16), max_steps=150, is_global_zero=rank == 0)
    for done in range(1, iterations + 1):
        now[0] += 10.0 if done <= 4 else seconds
        trainer.global_step = done
        pace.on_train_batch_end(trainer, task)
    return pace, capsys.readouterr().err


def test_a_slow_machine_is_named_once_with_what_the_demo_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    evaluations = 536 * (2 + JUDGED) + 32 * (56 + JUDGED)
    seconds = 156 + 4 * (142 + evaluations / (TRAINED * 48))  # 8 of 150 iterations are done
    _, text = run(4.0, capsys)
    assert text == (
        f"this machine takes 4 s an iteration, so that the demo will take about {-int(-seconds // 60)} minutes rather "
        "than 10; a shorter one: swd demo experiment=demo_ci\n"
    )


def test_the_shortest_demo_names_no_shorter_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(4.0, capsys, shortest=True)[1]
    assert text.startswith("this machine takes 4 s an iteration") and text.endswith("minutes rather than 10\n")


def test_it_is_said_after_two_cycles_of_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(4.0, capsys, iterations=7)[1] == "" and run(4.0, capsys, iterations=8)[1] != ""


def test_a_fast_machine_and_other_processes_hear_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2.0, capsys)[1] == "" and run(4.0, capsys, rank=1)[1] == ""


def test_pictures_count_beside_iterations() -> None:
    few, many = (Pace(10, drawn, lambda: 0.0) for drawn in ([(100, 2.0)], [(100, 2.0), (512, 8.0)]))
    assert few.expected(2.0, 10, 48) == pytest.approx(2 * (10 + 100 * (2 + JUDGED) / (TRAINED * 48)))
    more = 512 * (8 + JUDGED) / (TRAINED * 48)
    assert many.expected(2.0, 10, 48) - few.expected(2.0, 10, 48) == pytest.approx(2 * more)


def test_a_row_with_more_steps_than_the_students_is_timed_in_fewer_batches() -> None:
    task: Any = SimpleNamespace(schedule=[1, 2, 3, 4])
    found = {
        (asked, steps): demo.timed_batches(
            cast(Any, SimpleNamespace(timing_batches=asked)), task, cast(Any, SimpleNamespace(steps=steps))
        )
        for asked, steps in ((3, 4), (3, 28), (15, 28), (15, 4), (1, 28), (3, 2))
    }
    assert found == {(3, 4): 3, (3, 28): 1, (15, 28): 2, (15, 4): 15, (1, 28): 1, (3, 2): 3}
