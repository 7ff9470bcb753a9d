"""The rows of a JSON list or of JSON lines, read a piece at a time: memory does not grow with the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from latefusion.data.records import RECORD, named

PIECE = 1 << 20  # bytes read at a time
DECODER = json.JSONDecoder()
AFTER = tuple(" \t\r\n,]")  # what follows a whole entry of a list
FILLED = re.compile(r"[^ \t\r\n]")


class Broken(str):
    """Why a row is none, in its place."""


def json_records(path: str, version: tuple[int, int]) -> Iterator[dict[str, str]]:
    """`id` and `RECORD` of every row; bytes that are no UTF-8 stay in it, as surrogates.

    Args:
        path: the file.
        version: its size and time of change, by which `datasets` knows what it has read before.

    Raises:
        ValueError: the file is neither a JSON list nor JSON lines.
    """
    with Path(path).open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        start, first = file.tell(), b""
        while not first and (piece := file.read(PIECE)):
            first = piece.lstrip()[:1]
        file.seek(start)
        rows = _items(file, path) if first == b"[" else _lines(file, path)
        for number, record in enumerate(rows):
            if not isinstance(record, (dict, Broken)):
                record = Broken(f"is {type(record).__name__}, not an object")
            name = None if isinstance(record, Broken) else named(record.get("id"))
            yield {"id": name or str(number), RECORD: json.dumps(record)}


def _lines(file: BinaryIO, path: str) -> Iterator[Any]:
    """The rows of JSON lines; what is none costs its line."""
    whole = Path(path).suffix == ".json"  # perhaps one object over many lines
    for line in file:
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            if whole:
                raise ValueError(
                    f"{path} is neither a JSON list nor JSON lines: its first line is no JSON ({error})."
                ) from None
            yield Broken(f"is no JSON ({error})")
        whole = False


def _items(file: BinaryIO, path: str) -> Iterator[Any]:
    """The entries of a JSON list."""
    rest, number = _Rest(file), 0
    try:
        rest.take("[")
        while rest.next() != "]" or number:
            yield rest.value()
            number += 1
            if rest.next() == "]":
                break
            rest.take(",")
        rest.take("]")
        rest.take("")
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{path} is no JSON list: {reason}, in row {number}.") from None


class _Rest:
    """What is left of a JSON text."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False

    def read(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, self.ended), 0

    def next(self) -> str:
        """The next character that is not blank; empty: there is none."""
        while (found := FILLED.search(self.text, self.at)) is None:
            self.at = len(self.text)
            if self.ended:
                return ""
            self.read(PIECE)
        self.at = found.start()
        return found[0]

    def take(self, wanted: str) -> None:
        if (found := self.next()) != wanted:
            raise ValueError(f"{found or 'the end'!r} where {wanted or 'the end'!r} should be")
        self.at += len(wanted)

    def value(self) -> Any:
        """The next value, read on for until it is whole."""
        size = PIECE
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if self.ended or self.text[end : end + 1] in AFTER:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if self.ended:
                    raise
            self.read(size)
            size *= 2
