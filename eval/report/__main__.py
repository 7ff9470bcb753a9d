"""Put numbers and picture of a `report.json` into a README.

    python -m latefusion.eval.report outputs/late_fusion/report.json \\
        --readme README.md --figure docs/tokens_per_layer.svg

Several files, of runs that differ in their seed, give one line each. The table goes between
`<!-- NAME -->` and `<!-- /NAME -->`; without `--readme` it is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from latefusion.eval.report.figures import tokens_per_layer
from latefusion.eval.report.svg import standalone
from latefusion.eval.report.tables import headline, markdown, seeds


def insert(document: str, name: str, text: str) -> str:
    """`document` with what stands between the marks `name` replaced by `text`.

    Raises:
        ValueError: the document has no such marks.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"the document needs one line {start} and one line {end} to put the table between.")
    before, _, rest = document.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="report.json of an evaluation")
    parser.add_argument("--readme", type=Path, help="file to put the table into")
    parser.add_argument("--name", default="results", help="of the marks around the table (default: results)")
    parser.add_argument("--figure", type=Path, help="file to write the vision tokens per layer to, as SVG")
    chosen = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in chosen.results]
    results = runs[0]
    text = f"{markdown(results)}\n{headline(results)}\n" if len(runs) == 1 else seeds(runs)
    if chosen.figure:
        chosen.figure.write_text(standalone(tokens_per_layer(results)))
    if chosen.readme:
        chosen.readme.write_text(insert(chosen.readme.read_text(), chosen.name, text))
    else:
        print(text)


if __name__ == "__main__":
    main()
