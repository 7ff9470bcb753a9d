"""List every row that cannot be trained on, with the reason, before training.

    python data/validate.py data=llava_mix665k data.path=FILE data.images=FOLDER model=llava_1_5_7b

It takes the same arguments as `training/train.py`; `train.workers=N` checks in N processes. Where the model's processor
can be loaded, its chat template, its limits and `data.max_length` are checked too. The exit code is 1 if a row is bad.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from latefusion.data.local_files import check_local_files
from latefusion.recipes.compose import HELP, compose_config, compose_tree, print_and_exit, without_cfg
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import QUESTION_SETS, Config, PartConfig

if TYPE_CHECKING:
    from latefusion.data.bad_rows import Finding


def main(overrides: list[str]) -> None:
    """Run from the command line; invalid arguments end in one sentence."""
    if HELP & set(overrides):
        print(__doc__)
        return
    overrides, printed = without_cfg(overrides)
    if printed:
        print_and_exit(lambda: compose_tree(overrides))
    try:
        config = compose_config(overrides)
        if config.data.source in QUESTION_SETS:
            raise ValueError(
                f"{config.data.source.value} needs no check; name data of your own with data=dataset data.path=PATH."
            )
        check_local_files(config.data)
        bad = validate(config, console=Console(stderr=True))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))
    sys.exit(1 if bad else 0)


def validate(config: Config, *, console: Console) -> int:
    """Check every row and print the bad ones, with a summary at the end; returns their number."""
    # lazy: keeps argument errors fast
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table

    from latefusion.data.bad_rows import kind
    from latefusion.data.collate import collator_without_weights
    from latefusion.data.load import parts_of

    try:
        collator = collator_without_weights(config)
    except OSError as error:
        collator = None
        reason = str(error).strip().splitlines()[0]
        console.print(f"Neither lengths nor chat template are checked: {reason}", markup=False)
    parts = parts_of(config.data)
    reasons: Counter[str] = Counter()
    total = 0
    for number, part in enumerate(parts):
        findings = part_findings(
            part, collator, workers=config.train.workers, streaming=config.data.streaming
        )
        listed = sys.stdout.isatty()  # else a file or a pipe, which the bar must not take the rows from
        with Progress(console=console, transient=True, redirect_stdout=listed) as progress:
            for finding in progress.track(findings, description=f"Checking {escape(part.path)}"):
                total += 1
                if finding.reason is not None:
                    prefix = f"{number}:" if len(parts) > 1 else ""
                    print(f"{prefix}{finding.id}\t{finding.reason}")
                    reasons[kind(finding.reason)] += 1
    if not total:
        raise ValueError("the data have no rows; name others with data.path=PATH.")
    bad = sum(reasons.values())
    if bad:
        table = Table("reason", "rows", title=f"{bad} of {total} rows cannot be used")
        for reason, rows in reasons.most_common():
            table.add_row(escape(reason), str(rows))
        console.print(table)
    else:
        console.print(f"All {total} rows can be used.")
    return bad


def part_findings(part: PartConfig, collator: Any, *, workers: int, streaming: bool) -> Iterator[Finding]:
    """One finding a row of a source, read as training will read it."""
    # lazy: keeps argument errors fast
    from latefusion.data.bad_rows import Checked, findings, stream_findings
    from latefusion.data.load import rows_of, streamed
    from latefusion.data.videos import MAX_FRAMES

    if streaming:
        return stream_findings(*streamed(part), collator, max_frames=part.max_frames or MAX_FRAMES)
    return findings(Checked(rows_of(part)), collator, workers=workers)


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
