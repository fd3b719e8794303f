"""Damaged indexes and manifests: what is read is right, or one clear line says that it is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shards import make_pictures

from swd.data.manifest import MANIFEST
from swd.data.shards import CorruptSample, ShardSet
from swd.types import UserError

FILES = ("00000.idx", "00001.idx", MANIFEST)

changes = st.tuples(
    st.sampled_from(FILES),
    st.lists(
        st.one_of(
            st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
            st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
            st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
        ),
        min_size=1,
        max_size=4,
    ),
)
"""A file, and what is done to it: places are shares of its length."""


def damaged(data: bytes, steps: list[tuple[str, float, int | bytes]]) -> bytes:
    for kind, share, value in steps:
        place = min(int(share * len(data)), max(len(data) - 1, 0))
        if kind == "insert":
            assert isinstance(value, bytes)
            data = data[:place] + value + data[place:]
        elif kind == "cut":
            assert isinstance(value, int)
            data = data[:place] + data[place + value :]
        elif data:
            assert isinstance(value, int)
            data = data[:place] + bytes([data[place] ^ value]) + data[place + 1 :]
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, bytes]]]]:
    folder = make_pictures(tmp_path_factory.mktemp("fuzz") / "shards", 6, [(16, 16)])
    yield folder, samples(folder)


def samples(folder: Path) -> list[dict[str, bytes]]:
    found = ShardSet(str(folder))
    rows = [found.read(row, found.endings) for row in range(len(found))]
    return [{ending: data.tobytes() for ending, data in row.items()} for row in rows]


def check(whole: tuple[Path, list[dict[str, bytes]]], change: tuple[str, list[tuple[str, float, int | bytes]]]) -> None:
    folder, right = whole
    name, steps = change
    copy = folder.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(damaged((folder / name).read_bytes(), steps))
    try:
        read = samples(copy)
    except (UserError, CorruptSample) as error:
        assert str(error) and "\n" not in str(error), error
    else:
        assert read == right


BOUNDED = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(BOUNDED, max_examples=60)
@given(changes)
@example((MANIFEST, [("flip", 0.0, 1)]))
@example(("00000.idx", [("cut", 0.0, 64)]))
def test_damage_is_noticed_or_harmless(
    whole: tuple[Path, list[dict[str, bytes]]], change: tuple[str, list[tuple[str, float, int | bytes]]]
) -> None:
    check(whole, change)


@pytest.mark.slow
@settings(BOUNDED, max_examples=3000)
@given(changes)
def test_much_damage_is_noticed_or_harmless(
    whole: tuple[Path, list[dict[str, bytes]]], change: tuple[str, list[tuple[str, float, int | bytes]]]
) -> None:
    check(whole, change)
