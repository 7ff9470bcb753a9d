"""List every row that cannot be trained on, and why, before training.

    python data/validate.py data=llava_mix665k data.path=FILE data.images=FOLDER model=llava_1_5_7b

It takes what `training/train.py` takes; `train.workers=N` checks in N processes. Where the model's processor can be
loaded, its chat template, its limits and `data.max_length` are checked too. The exit code is 1 if a row is bad.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from latefusion.data.collate import BadRow, Collator
from latefusion.data.config import PartConfig, Source
from latefusion.data.guard import Bad, Checked
from latefusion.data.load import parts_of, rows_of, streamed
from latefusion.data.messages import BadSample
from latefusion.data.sources import python_row, sample_of
from latefusion.models.base import check_base
from latefusion.models.embedded import WEIGHTS
from latefusion.training.checks import explain, read
from latefusion.training.config import RECIPES, Config


@dataclass(frozen=True)
class Finding:
    """A row that was checked; `reason` None: it can be used."""

    id: str
    reason: str | None


class Findings(Dataset):
    """The findings on rows, each made when it is asked for."""

    def __init__(self, rows: Checked, collator: Collator | None):
        self.rows, self.collator = rows, collator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Finding:
        sample = self.rows[index]
        if isinstance(sample, Bad):
            return Finding(sample.id, str(sample.error))
        return Finding(sample["id"], rejected(sample, self.collator))


def rejected(sample: dict[str, Any], collator: Collator | None) -> str | None:
    """Why the collator does not take a sample; None: it does."""
    if collator is not None:
        try:
            collator([sample])
        except BadRow as error:
            return str(error.reason)
    return None


def findings(
    part: PartConfig, collator: Collator | None, *, workers: int, streaming: bool
) -> Iterator[Finding]:
    """One finding a row, in order."""
    if streaming:
        yield from _streamed(part, collator)
        return
    rows = Findings(Checked(rows_of(part)), collator)
    yield from DataLoader(rows, batch_size=None, num_workers=workers)


def _streamed(part: PartConfig, collator: Collator | None) -> Iterator[Finding]:
    table, folder = streamed(part)
    for number, row in zip(count(), table):
        name = str(number)
        try:
            record = python_row(row)
            name = str(record.get("id") or number)
            yield Finding(name, rejected(sample_of(record, folder), collator))
        except BadSample as error:
            yield Finding(name, str(error))


def collator_of(config: Config) -> Collator:
    """The collator that training would use, without the model's weights.

    Raises:
        OSError: the processor or the configuration cannot be reached.
    """
    path = str(WEIGHTS) if config.model.path == "embedded" else config.model.path
    check_base(path)
    where = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    processor = AutoProcessor.from_pretrained(path, **where, **config.model.processor)
    stop = GenerationConfig.from_pretrained(path, revision=config.model.revision).eos_token_id
    return Collator(
        processor=processor,
        vision_ids=[AutoConfig.from_pretrained(path, **where).image_token_id],
        stop=processor.tokenizer.convert_ids_to_tokens([stop] if isinstance(stop, int) else stop),
        max_length=config.data.max_length,
    )


def validate(config: Config, *, console: Console) -> int:
    """Check every row and print the bad ones, with a summary at the end; how many there are."""
    try:
        collator = collator_of(config)
    except OSError as error:
        collator = None
        reason = str(error).strip().splitlines()[0]
        console.print(f"Neither lengths nor chat template are checked: {reason}", markup=False)
    parts = parts_of(config.data)
    reasons: Counter[str] = Counter()
    total = 0
    for number, part in enumerate(parts):
        found: Iterable[Finding] = findings(
            part, collator, workers=config.train.workers, streaming=config.data.streaming
        )
        for finding in track(found, f"Checking {part.path}", console=console, transient=True):
            total += 1
            if finding.reason is not None:
                prefix = f"{number}:" if len(parts) > 1 else ""
                print(f"{prefix}{finding.id}\t{finding.reason}")
                reasons[_kind(finding.reason)] += 1
    bad = sum(reasons.values())
    if bad:
        table = Table("reason", "rows", title=f"{bad} of {total} rows cannot be used")
        for reason, rows in reasons.most_common():
            table.add_row(reason, str(rows))
        console.print(table)
    else:
        console.print(f"All {total} rows can be used.")
    return bad


def _kind(reason: str) -> str:
    """A reason without what names the row's own file, numbers and bytes."""
    own = re.compile(r"\d|[/\\]|\.\w")
    return " ".join("…" if own.search(word) else word for word in reason.split("(")[0].split())


def main(overrides: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    from hydra import compose, initialize_config_dir

    try:
        explain(overrides)
        with initialize_config_dir(str(RECIPES.resolve()), version_base="1.3"):
            config = read(compose("config", overrides))
        if config.data.source is Source.scenes:
            raise ValueError(
                "scenes are rendered here and need no check; name data with data=dataset data.path=PATH."
            )
        bad = validate(config, console=Console(stderr=True))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
