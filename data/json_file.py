"""The rows of a JSON list or of JSON lines, read a piece at a time: memory does not grow with the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from latefusion.data.samples import RECORD, record_name

PIECE = 1 << 20  # bytes read at a time
DECODER = json.JSONDecoder()
AFTER = tuple(" \t\r\n,]")  # what follows a whole entry of a list
FILLED = re.compile(r"[^ \t\r\n]")


class Broken(str):
    """Stands for a row that cannot be read: the reason."""


def read_json(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Every row of a JSON list or of JSON lines with its place (`line 3`, `row 3`); `Broken` where it is not an object.

    Bytes that are not UTF-8 stay in a row's texts as lone surrogates.

    Raises:
        ValueError: the file is neither a JSON list nor JSON lines.
    """
    with Path(path).open("rb") as file:
        begins = file.read(len(codecs.BOM_UTF8))
        if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{path} is UTF-16; save it as UTF-8.")
        if begins != codecs.BOM_UTF8:
            file.seek(0)
        start, first = file.tell(), b""
        while not first and (piece := file.read(PIECE)):
            first = piece.lstrip()[:1]
        file.seek(start)
        for place, row in _items(file, path) if first == b"[" else _lines(file, path):
            if not isinstance(row, (dict, Broken)):
                row = Broken(f"is {type(row).__name__}, not an object")
            yield place, row


def json_records(path: str, version: str) -> Iterator[dict[str, str]]:
    """`id` and `RECORD` of every row, for a table.

    Args:
        path: the file.
        version: hash of its contents, by which `datasets` recognises what it has read before.

    Raises:
        ValueError: the file is neither a JSON list nor JSON lines.
    """
    for number, (_, record) in enumerate(read_json(path)):
        name = None if isinstance(record, Broken) else record_name(record.get("id"))
        yield {"id": name or str(number), RECORD: json.dumps(record)}


def _lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of JSON lines; a line that is not JSON costs that line."""
    whole = Path(path).suffix == ".json"  # perhaps one object over many lines
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            if whole:
                raise ValueError(
                    f"{path} is neither a JSON list nor JSON lines: its first line is not JSON ({error})."
                ) from None
            yield f"line {number}", Broken(f"is not JSON ({error})")
        whole = False


def _items(file: BinaryIO, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON list."""
    rest, number = _Rest(file), 0
    try:
        rest.take("[")
        while rest.next() != "]" or number:
            yield f"row {number}", rest.value()
            number += 1
            if rest.next() == "]":
                break
            rest.take(",")
        rest.take("]")
        rest.take("")
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{path} is not a JSON list: {reason}, in row {number}.") from None


class _Rest:
    """The rest of a JSON text that is read piece by piece."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False

    def read(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, self.ended), 0

    def next(self) -> str:
        """The next character that is not blank; empty at the end."""
        while (match := FILLED.search(self.text, self.at)) is None:
            self.at = len(self.text)
            if self.ended:
                return ""
            self.read(PIECE)
        self.at = match.start()
        return match[0]

    def take(self, expected: str) -> None:
        """Step over this character; empty: expect the end."""
        if (character := self.next()) != expected:
            raise ValueError(f"{character or 'the end'!r} where {expected or 'the end'!r} should be")
        self.at += len(expected)

    def value(self) -> Any:
        """The next value; reads on until it is whole."""
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
