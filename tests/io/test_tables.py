"""Tables of prompts and captions: one reader, and what is wrong with a line is told with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swd.commands.sample import read_prompts
from swd.io.tables import NoText, read_table, text_of
from swd.types import UserError


def rows(folder: Path, name: str, data: str | bytes) -> list[tuple[int, Any]]:
    """Line and cells, or fault, of every row."""
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return [(row.line, row.fault or row.cells) for row in read_table(folder / name).rows]


def faults(folder: Path, name: str, data: str | bytes) -> dict[int, str]:
    return {line: told for line, told in rows(folder, name, data) if isinstance(told, str)}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_with_any_line_ends_and_quoted_cells(tmp_path: Path, end: str, mark: str) -> None:
    text = mark + end.join(["Prompt , SEED", '"a star, red",1', "", '"two', 'lines",2', " , ", "a quote inside,3", ""])
    assert rows(tmp_path, "a.csv", text) == [
        (2, ("a star, red", "1")),
        (4, (f"two{end}lines", "2")),
        (7, ("a quote inside", "3")),
    ]
    assert read_table(tmp_path / "a.csv").columns == ["prompt", "seed"]
    assert read_prompts(tmp_path / "a.csv") == [("a star, red", 1), ("two\nlines", 2), ("a quote inside", 3)]


def test_a_tab_parts_the_cells_of_a_tsv(tmp_path: Path) -> None:
    assert rows(tmp_path, "a.tsv", "prompt\tseed\na star, red\t4\na\tb\tc\n") == [
        (2, ("a star, red", "4")),
        (3, "3 columns, the header has 2; put cells that hold a tab in quotes"),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"a red star, above a ring,1", "3 columns, the header has 2; put cells that hold a comma in quotes"),
        (b"only one", "1 columns, the header has 2"),
        (b'"open,5', "a quote is not closed, or text follows one; check its quotes"),
        (b'"a cat" sat,5', "a quote is not closed, or text follows one; check its quotes"),
        (b'x, "a cat"', "a blank before a quote"),
        (b'"' + b"y" * 140_000 + b'",1', "a cell of more than 131,072 characters; check its quotes"),
        ("Bär,1".encode("latin-1"), r"it is not UTF-8 text (byte 21); save the file as UTF-8"),
        (b"a\0b,1", "it holds a NUL byte"),
    ],
)
def test_a_faulty_line_is_told_and_the_others_are_read(tmp_path: Path, line: bytes, told: str) -> None:
    data = b"prompt,seed\nfirst,1\n" + line + b"\nlast,2\n" + b"more,3\n" * 3
    found = rows(tmp_path, "a.csv", data)
    assert [number for number, _ in found] == [2, 3, 4, 5, 6, 7]
    assert isinstance(found[1][1], str) and told in found[1][1] and found[2][1] == ("last", "2")
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / "a.csv", "prompts")
    assert f"prompts={tmp_path}/a.csv, line 3: " in str(caught.value) and told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,seed,Prompt \na,1,b\n"),
        ("a.tsv", "prompt\tPROMPT\na\tb\n"),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match="has more than one column prompt; leave one"):
        rows(tmp_path, name, text)
    assert len(rows(tmp_path, "b.csv", "prompt,,\na,,\n")) == 1  # columns of no name


def test_json_lines(tmp_path: Path) -> None:
    good = '{"Prompt ": "a star\\u2028red", "seed": 7}\n\n{"prompt": "a ring", "other": 1}\n'
    assert rows(tmp_path, "a.jsonl", good) == [(1, ("a star\u2028red", 7)), (3, ("a ring", None))]
    assert read_prompts(tmp_path / "a.jsonl") == [("a star red", 7), ("a ring", None)]
    bad = ["[1]", "{", '{"prompt": "a", "prompt": "b"}', "[" * 100_000, '{"prompt": 1' + "0" * 5000 + "}"]
    found = faults(tmp_path, "b.jsonl", "\n".join(['{"prompt": "x"}', *bad]))
    assert list(found) == [2, 3, 4, 5, 6] and "prompt more than once" in found[4]
    assert {found[line] for line in (2, 3, 5, 6)} == {"no JSON object"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": 5}, "the prompt is the number 5, not text"),
        ({"prompt": None}, "the prompt is null, not text"),
        ({"prompt": ["a"]}, "the prompt is a list, not text"),
        ({"prompt": {"a": 1}}, "the prompt is an object, not text"),
        ({"prompt": True}, "the prompt is true or false, not text"),
        ({"prompt": float("nan")}, "the prompt is the number nan, not text"),
        ({"prompt": " \u200b\u3000"}, "the prompt is empty"),
        ({"prompt": "a\0b"}, "holds a NUL character"),
        ({"prompt": "\ud800"}, "is no valid Unicode"),
        ({"prompt": "a", "seed": True}, "seed 'True' is not a whole number"),
        ({"prompt": "a", "seed": 2.0}, "seed '2.0' is not a whole number"),
        ({"prompt": "a", "seed": -1}, "seed '-1' is not a whole number"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path: Path, record: dict[str, Any], told: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "fine", "seed": 1}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / "a.jsonl")
    assert "a.jsonl, line 2: " in str(caught.value) and told in str(caught.value) and "\n" not in str(caught.value)


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=lambda s: f"{ord(s):04x}")
@pytest.mark.parametrize("name", ["p.txt", "p", "p.csv", "p.jsonl"])
def test_separators_of_lines_neither_part_a_prompt_nor_stay_in_it(tmp_path: Path, name: str, separator: str) -> None:
    prompt = f"a red star{separator}above a ring"
    text = {"p.csv": f'prompt\n"{prompt}"\n', "p.jsonl": json.dumps({"prompt": prompt})}.get(name, f"{prompt}\nlast\n")
    (tmp_path / name).write_text(text, newline="")
    found = read_prompts(tmp_path / name)
    assert found[0] == ("a red star above a ring", None) and len(found) == 1 + (name in ("p.txt", "p"))


def test_bytes_are_texts_in_utf8() -> None:
    assert text_of("\ufeffBär\r\nx".encode()) == "Bär\nx"
    for value, told in (
        (b"B\xe4r", "is not UTF-8 text .byte 1."),
        (b"\xff\xfea\0", "is not UTF-8"),
        (b"\n \t", "empty"),
    ):
        with pytest.raises(NoText, match=told):
            text_of(value)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.json", b"[]", "is a .json file; give the list as"),
        ("a.parquet", b"PAR1", "is a .parquet file"),
        ("a.csv", "prompt\nx\n".encode("utf-16"), "is not UTF-8 text but UTF-16; save it as UTF-8"),
        ("a.csv", b'"prompt\nx\n', "line 1: a quote is not closed"),
        ("a.csv", b"", "holds no prompt"),
        ("a.txt", b"fine\n\xff\n", r"a\.txt, line 2: it is not UTF-8 text \(byte 5\)"),
        ("a.txt", b"fine\nx\0y\n", r"a\.txt, line 2: it holds a NUL byte"),
        ("a.csv", b'prompt,seed\n"",1\n', "line 2: the prompt is empty; mend the line"),
    ],
)
def test_files_that_are_no_lists_of_prompts(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folders_and_names_that_no_file_can_have(tmp_path: Path) -> None:
    for file, told in (
        (tmp_path, "is no file"),
        (tmp_path / "none.csv", "does not exist"),
        (Path("x" * 300), "cannot be read .File name too long"),
    ):
        with pytest.raises(UserError, match=told):
            read_prompts(file)
