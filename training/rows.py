"""The first rows of the training set, tried as training will take them, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latefusion.data.collate import Collator, collator_without_weights
from latefusion.models.policies.configured import teacher
from latefusion.recipes.schema import Config
from latefusion.training.assemble import dtype_of, guarded
from latefusion.training.offline import Taught, expected


def check_rows(config: Config, dataset: Any, begins: Sequence[Any], *, cache: str | None) -> None:
    """Raise if one of the rows `begins` cannot be used and must not be left out; needs no weights.

    Args:
        dataset: whose rows they are.
        cache: of a teacher's answers, which must hold theirs; None: there is none.

    Raises:
        ValueError, FileNotFoundError: such a row; or the cache is not there, or another teacher's.
    """
    collator: Collator | Taught = collator_without_weights(config, dtype=dtype_of(config))
    if cache is not None:
        collator = Taught(collator, cache, expected(config, collator.processor, teacher(config)))
    guarded(config, collator, dataset)(begins)
