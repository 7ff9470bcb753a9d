"""Settings of VisiPruner to try: the command line of `eval/calibrate.py`, and the grid that it spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latefusion.data.local_files import check_dataset, check_local_files
from latefusion.models.folder_contents import THRESHOLDS, check_free
from latefusion.models.locate import check_base
from latefusion.recipes.hints import did_you_mean
from latefusion.recipes.schema import QUESTION_SETS, DataConfig, Source
from latefusion.training.run_folder import check_writable

if TYPE_CHECKING:
    from latefusion.models.policies.visipruner.settings import VisiPruner

Setting = dict[str, Any]  # arguments of VisiPruner that are searched


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        model: a name in recipes/model, a folder or a hub id.
        data: scenes, icons, easy_vqa, or a folder or hub id of a data set with the columns messages and images.
        split: of the data; samples: how many prompts to search on, drawn by `seed`, half of the data at most.
        confirm: other prompts to accept the setting on, as many as the data has; 0: the samples accept their own.
        kl: the bound, in nats: of the upper limit of the mean over confirming prompts of KL(dense || pruned) per token
            of the dense answer.
        boundaries, layer_thresholds, tokens_thresholds, stages: what to try; null: every layer; a scale of the
            model's own norms, read off the trial. The shallow rule saves no FLOPs of its own, so only
            `stages=[[middle,deep],[shallow,middle,deep]]` tries it too.
        exit_threshold, exit_patience, sink_rule: as `VisiPruner` has them, not searched.
        max_new_tokens: longest answer.
        batch_size: prompts a forward.
        output: folder for the results.
        overwrite: replace the policy in it.
    """

    model: str = "embedded"
    data: str = "scenes"
    split: str = "validation"
    samples: int = 256
    confirm: int = 1536
    seed: int = 0
    kl: float = 0.02
    boundaries: list[int] | None = None
    layer_thresholds: list[float] = field(
        default_factory=lambda: [0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998]
    )
    tokens_thresholds: list[float] | None = None
    stages: list[list[str]] = field(default_factory=lambda: [["middle", "deep"]])
    exit_threshold: float = 0.999
    exit_patience: int = 2
    sink_rule: str = "first"
    max_new_tokens: int = 16
    batch_size: int = 32
    output: str = "outputs/calibration"
    overwrite: bool = False


def check(arguments: Arguments) -> None:
    """Raise, before anything is loaded, if an argument cannot work."""
    if not 0 < arguments.kl < inf:
        raise ValueError(f"kl={arguments.kl} must be positive and finite.")
    for name in ("samples", "batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1.")
    if arguments.confirm < 0:
        raise ValueError(f"confirm={arguments.confirm} must be 0 or more.")
    if arguments.seed < 0:
        raise ValueError(f"seed={arguments.seed} must not be negative.")
    for name in ("boundaries", "layer_thresholds", "tokens_thresholds", "stages"):
        if getattr(arguments, name) == []:
            raise ValueError(f"{name}=[] leaves nothing to try; name at least one value.")
    for stages in arguments.stages:
        if "middle" not in stages:
            raise ValueError(f"stages={stages} saves nothing without 'middle'; add it.")
    check_writable(arguments.output, key="output")
    check_free(arguments.output, fix="choose another output=FOLDER", own=[THRESHOLDS])
    check_base(arguments.model)
    sets = [source.value for source in QUESTION_SETS]
    if arguments.data in sets:
        check_local_files(DataConfig(source=Source(arguments.data)))
    else:
        hint = did_you_mean(arguments.data, sets)
        if hint and not Path(arguments.data).exists():
            raise ValueError(
                f"data={arguments.data} does not exist{hint}; data can be {', '.join(sets)}, a file, a folder or a hub "
                "id."
            )
        check_dataset(arguments.data, key="data")


def grid(
    arguments: Arguments, boundaries: Sequence[int], tokens_thresholds: Sequence[float]
) -> list[Setting]:
    """All settings to try, in a fixed order; the shallow rule needs a layer below the boundary."""
    return [
        {
            "stages": tuple(stages),
            "boundary": boundary,
            "layer_threshold": layer_threshold,
            "tokens_threshold": tokens_threshold,
        }
        for stages in arguments.stages
        for boundary in boundaries
        if boundary > 0 or "shallow" not in stages
        for layer_threshold in arguments.layer_thresholds
        for tokens_threshold in tokens_thresholds
    ]


def policy_of(setting: Setting, arguments: Arguments) -> VisiPruner:
    """The policy of a setting; raises ValueError if it cannot be."""
    from latefusion.models.policies.visipruner.settings import VisiPruner  # lazy: keeps argument errors fast

    return VisiPruner(
        **setting,
        exit_threshold=arguments.exit_threshold,
        exit_patience=arguments.exit_patience,
        sink_rule=arguments.sink_rule,
    )


def prefix(setting: Setting) -> int:
    """How many layers run under the shallow rule: settings with the same number run alike up to their fusion."""
    return setting["boundary"] if "shallow" in setting["stages"] else 0
