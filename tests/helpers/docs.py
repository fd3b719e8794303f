"""Tables of the documentation."""

from __future__ import annotations


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the table in `text` whose header starts with `heading`, by their first cell."""
    rows: dict[str, list[str]] = {}
    for line in text.partition(f"| {heading}")[2].splitlines()[2:]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first.strip("`")] = rest
    return rows
