"""Rows as they were read, each with the file and the line that an error names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Document(dict[str, Any]):
    """A dict with one of `text`, `input_ids` (already tokenised) or `image`, and maybe `label`.

    Attributes:
        source: The file or data set that it comes from; empty if unknown.
        place: Its line or row there, such as `line 3`.
    """

    __slots__ = ("place", "source")

    def __init__(self, content: dict[str, Any], source: str = "", place: str = ""):
        super().__init__(content)
        self.source, self.place = source, place


def where(document: dict[str, Any], source: str) -> str:
    """The place of a document for an error; `source` alone if the document does not know its place."""
    own, place = getattr(document, "source", "") or source, getattr(document, "place", "")
    return f"{own}, {place}" if place else own


@dataclass
class Table:
    """Rows of named values.

    Attributes:
        rows: A dict for each row; keys may differ between rows.
        source: The file or data set.
        lines: Line of each row, counted from 1; `None` where rows have no lines.
        columns: Names of all columns in their order; taken from the rows if `None`.
    """

    rows: list[dict[str, Any]]
    source: str
    lines: list[int] | None = None
    columns: list[str] | None = None

    def place(self, number: int) -> str:
        """The line of a row, or its number."""
        return f"row {number + 1}" if self.lines is None else f"line {self.lines[number]}"

    def where(self, number: int) -> str:
        """The source and the place of a row."""
        return f"{self.source}, {self.place(number)}"

    @property
    def names(self) -> list[str]:
        """Names of all columns, in an order that does not depend on the order of the rows."""
        if self.columns is not None:
            return self.columns
        first: dict[str, int] = {}
        for row in self.rows:
            for position, name in enumerate(row):
                first[name] = min(position, first.get(name, position))
        return sorted(first, key=lambda name: (first[name], name))
