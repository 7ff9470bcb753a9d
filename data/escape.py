"""Text from data, policies and checkpoints as text: it cannot become markup in a terminal, in Markdown or in code."""

from __future__ import annotations

import re

from rich.markup import escape

from latefusion.recipes.printable import printable

MARKS = re.compile(
    r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))"
)  # an underscore inside a word emphasises nothing
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}  # HTML, links in brackets, mentions
LINKS = re.compile(r"(?i)(?<=http)(s?):(?=//)|(?<=www)\.")  # that GitHub makes of plain text


def terminal(text: object) -> str:
    """A text for rich's console, without markup and control characters."""
    return escape(printable(str(text)))


def markdown(text: object) -> str:
    """A text for a line or a table's cell in Markdown."""
    line = "".join(ENTITIES.get(letter, letter) for letter in printable(" ".join(str(text).split())))
    line = MARKS.sub(r"\\\1", line)
    return LINKS.sub(lambda dots: f"{dots[1]}&#58;" if ":" in dots[0] else "&#46;", line)


def code(text: object) -> str:
    """A code span in Markdown, with more backticks around it than there are inside."""
    line = printable(" ".join(str(text).split()))
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"
