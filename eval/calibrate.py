"""Find VisiPruner's boundary, thresholds and stages for a model that the paper never saw.

    python eval/calibrate.py model=embedded data=scenes kl=0.02
    python eval/calibrate.py model=HUB_ID data=FOLDER_OR_HUB_ID split=train prompts=128 kl=0.02

Asks the dense model N unlabelled prompts, tries all settings on its answers (eval/calibration.py: for the price
of a few prefills), and takes the one of least decoder FLOPs whose KL(dense || pruned) stays under the bound. All
settings run on a trial, and go on until they are far above the bound. Writes policy.yaml, which `policy=FILE`
takes wherever a policy is named, calibration.json with every setting, and table.md. Run again with the same
arguments, it goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from latefusion.data import sources
from latefusion.data.scenes import load_scenes
from latefusion.eval import calibration, chosen
from latefusion.eval.calibration import Batch, Outcome
from latefusion.eval.metrics import normalise
from latefusion.eval.predict import encode_images, images_of, progress_bar, prompt_inputs
from latefusion.models.attach import Attachment, attach
from latefusion.models.build import check_base, compute_dtype, load_base
from latefusion.models.flops import decoder_flops
from latefusion.models.policies.visipruner import VisiPruner
from latefusion.models.schedule import VisionSchedule

TRIAL = 2  # batches that all settings run on
NEAR = 4  # a setting whose KL so far is beyond so many times the bound is given up
FALLBACK = 20  # settings that go on if none is near
SHARES = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015)  # of the vision tokens, that the tried tokens_thresholds keep


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        model: embedded, a folder or a hub id.
        data: scenes, or a folder or hub id of a data set with the columns messages and images.
        split: of the data; prompts: how many of them, drawn by `seed`; null: all.
        kl: the bound, in nats: mean over prompts of KL(dense || pruned) per token of the dense answer.
        boundaries, layer_thresholds, tokens_thresholds, stages: what to try; null: every layer; a scale of the
            model's own norms, read off the trial. The shallow rule saves no FLOPs of its own, so only
            `stages=[[middle,deep],[shallow,middle,deep]]` tries it too.
        exit_threshold, exit_patience, sink_rule: as `VisiPruner` has them, not searched.
        max_new_tokens: longest answer.
        batch_size: prompts a forward.
        output: folder for the results.
    """

    model: str = "embedded"
    data: str = "scenes"
    split: str = "validation"
    prompts: int | None = None
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


def calibrate(asked: Arguments, console: Console) -> dict[str, Any]:
    """Try all settings and write the results; returns what `calibration.json` holds.

    Raises:
        ValueError: an argument is out of its range, there is no prompt with an image, or no setting stays
            under the bound.
        FileNotFoundError: the model or the data is not there.
    """
    check(asked)
    rows = read(asked)
    model, processor = load_base(asked.model, dtype=compute_dtype())
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[arg-type]
    started = time.perf_counter()
    with attach(model, VisionSchedule()) as attachment:
        search = Search(asked, attachment, processor, rows)
        console.print(search.cost(), highlight=False)
        results = search.run()
    results["seconds"] = time.perf_counter() - started
    return chosen.write(results, Path(asked.output), console)


def check(asked: Arguments) -> None:
    """Raise before anything is loaded if an argument cannot work."""
    for name in ("kl", "batch_size", "max_new_tokens"):
        if not getattr(asked, name) > 0:
            raise ValueError(f"{name}={getattr(asked, name)} must be positive.")
    if asked.prompts is not None and asked.prompts < 1:
        raise ValueError(f"prompts={asked.prompts} must be at least 1.")
    for name in ("boundaries", "layer_thresholds", "tokens_thresholds", "stages"):
        if getattr(asked, name) == []:
            raise ValueError(f"{name}=[] leaves nothing to try; name at least one value.")
    for stages in asked.stages:
        if "middle" not in stages:
            raise ValueError(f"stages={stages} saves nothing without 'middle'; add it.")
    for setting in settings(asked, asked.boundaries or [0], asked.tokens_thresholds or [0.0]):
        policy_of(setting, asked)
    check_base(asked.model)


def read(asked: Arguments) -> Dataset:
    """The prompts: rows of `scenes`, or of any data set with `messages` and `images`, in the order of `seed`."""
    if asked.data == "scenes":
        rows = load_scenes(asked.split)
    else:
        rows = sources.dataset(asked.data, split=asked.split)
    if asked.prompts is not None and asked.prompts < len(rows):
        rows = rows.shuffle(seed=asked.seed).select(range(asked.prompts))
    with_image = [i for i, row in enumerate(rows) if len(images_of(row))] if asked.data != "scenes" else None
    if with_image == []:
        raise ValueError(f"no prompt of {asked.data} has an image; VisiPruner has nothing to prune there.")
    return rows if with_image is None else rows.select(with_image)


def settings(
    asked: Arguments, boundaries: Sequence[int], tokens_thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """All that are tried, in an order of their own; the shallow rule needs a layer below the boundary."""
    return [
        {
            "stages": tuple(stages),
            "boundary": boundary,
            "layer_threshold": layer_threshold,
            "tokens_threshold": tokens_threshold,
        }
        for stages in asked.stages
        for boundary in boundaries
        if boundary > 0 or "shallow" not in stages
        for layer_threshold in asked.layer_thresholds
        for tokens_threshold in tokens_thresholds
    ]


def policy_of(setting: dict[str, Any], asked: Arguments) -> VisiPruner:
    return VisiPruner(
        **setting,
        exit_threshold=asked.exit_threshold,
        exit_patience=asked.exit_patience,
        sink_rule=asked.sink_rule,
    )


class Search:
    """All settings on all prompts, batch by batch; a batch that is done is kept on disk."""

    def __init__(self, asked: Arguments, attachment: Attachment, processor: Any, rows: Dataset):
        self.asked, self.attachment, self.processor, self.rows = asked, attachment, processor, rows
        self.model: Any = attachment.model
        self.labelled = "answer" in rows.column_names
        plain = rows.with_format(None).remove_columns([c for c in rows.column_names if c.startswith("image")])
        lengths = [len(str(row)) for row in plain]
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
        batches = [order[i : i + asked.batch_size] for i in range(0, len(order), asked.batch_size)]
        trial = sorted({len(batches) // 4, 3 * len(batches) // 4})  # shorter ones, longer ones
        self.batches = [batches[i] for i in trial] + [b for i, b in enumerate(batches) if i not in trial]
        layers = len(attachment.layers)
        boundaries = list(range(layers - 1)) if asked.boundaries is None else asked.boundaries
        self.first, _ = self.dense_batch(self.batches[0])
        recorded = calibration.record(self.first, attachment, 0, asked.sink_rule)
        tokens = asked.tokens_thresholds or scale(recorded)
        self.limit = self.shallow_limit(boundaries, recorded.logits)
        self.settings = [
            setting
            for setting in settings(asked, boundaries, tokens)
            if "shallow" not in setting["stages"] or setting["boundary"] <= self.limit
        ]
        for setting in self.settings:
            policy_of(setting, asked).validate(layers)

    def cost(self) -> str:
        """What the search will compute, said before it does."""
        config, layers = self.model.config, len(self.attachment.layers)
        record = max(self.attachment.trace, key=lambda record: record.tokens[0])
        text, vision = record.tokens[0] - record.vision[0], record.vision[0]
        dense = decoder_flops(config, record.tokens)
        prefixes = {self.prefix(s) for s in self.settings}
        passes, resumed = 0, 0.0
        for prefix in prefixes:
            mine = [s for s in self.settings if self.prefix(s) == prefix]
            fusions = range(min(s["boundary"] for s in mine) + 1, layers - 1)
            kinds = len({(s["tokens_threshold"], "deep" in s["stages"]) for s in mine})
            passes += kinds * len(fusions)
            left = text + vision // 10
            resumed += kinds * sum(decoder_flops(config, [left] * (layers - 1 - f)) for f in fusions) / dense
        most, least = 1 + len(prefixes) + resumed, 2 + resumed * min(1, TRIAL / len(self.batches))
        return (
            f"{len(self.rows)} prompts in {len(self.batches)} batches, {len(self.settings)} settings. Each batch: "
            f"the dense answer, {len(prefixes)} recorded prefill{'s' * (len(prefixes) > 1)}, and at most {passes} "
            f"short passes over what is left after fusion, in all batches but the first {TRIAL} for settings not "
            f"far above the bound alone. Together like {least:.0f} to {most:.0f} dense prefills of every prompt "
            f"({dense / 1e9:.2g} GFLOPs each)."
        )

    def run(self) -> dict[str, Any]:
        """Every setting's numbers on every prompt; NaN where it did not run."""
        folder = Path(self.asked.output) / "batches" / self.fingerprint()
        folder.mkdir(parents=True, exist_ok=True)
        found: list[dict[str, Any]] = []
        with progress_bar() as progress:
            task = progress.add_task("Prompts", total=len(self.rows))
            for number, rows in enumerate(self.batches):
                file = folder / f"{number:05d}.npz"
                if not file.exists():
                    self.save(file, self.try_on(rows, self.near(found) if number >= TRIAL else None))
                with np.load(file) as arrays:
                    found.append(dict(arrays))
                progress.advance(task, len(rows))
            columns = joined(found)
            order = [i for rows in self.batches for i in rows]
            if not self.labelled:
                return self.results(order, columns, None)
            correct = columns["same"] * columns["right"]  # [settings, N]
            wrong = np.flatnonzero(columns["right"] == 0)
            ran = ~np.isnan(columns["kl"]).any(1)
            if len(wrong):
                task = progress.add_task("Labels", total=len(wrong))
            for start in range(0, len(wrong), self.asked.batch_size):
                at = wrong[start : start + self.asked.batch_size]
                correct[np.ix_(ran, at)] = self.try_labels(
                    [order[i] for i in at], np.flatnonzero(ran).tolist()
                )
                progress.advance(task, len(at))
        return self.results(order, columns, correct)

    def near(self, done: list[dict[str, Any]]) -> list[int]:
        """The settings still in the race; few prompts make the KL: a high one so far settles it, a low one does not."""
        kl = joined(done)["kl"].mean(1)  # NaN: given up before
        found = np.flatnonzero(kl <= NEAR * self.asked.kl)
        return [int(i) for i in (found if len(found) else np.sort(np.argsort(kl, kind="stable")[:FALLBACK]))]

    # ---------------------------------------------------------------- one batch

    def dense_batch(self, rows: Sequence[int]) -> tuple[Batch, list[bool]]:
        """These prompts with the dense model's answers behind them, and which answers are the labels."""
        asked, samples = self.asked, [self.rows[i] for i in rows]
        inputs = self.encoded(samples)
        with torch.no_grad():
            written = self.model.generate(
                **{**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])},
                max_new_tokens=asked.max_new_tokens,
                do_sample=False,
                num_beams=1,
            )[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [ended(ids, self.stops) for ids in written]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        right = [
            self.labelled and normalise(text) == normalise(row["answer"])
            for text, row in zip(texts, samples, strict=True)
        ]
        return Batch.build(self.model, inputs, answers), right

    def try_on(self, rows: Sequence[int], which: Sequence[int] | None) -> dict[str, Any]:
        """A batch's numbers; `which` settings (None: all) run, the others' are NaN."""
        batch, right = self.dense_batch(rows)
        recorded = calibration.record(batch, self.attachment, 0, self.asked.sink_rule)
        dense = calibration.judge(batch, self.attachment, recorded.logits, recorded.logits)
        which = range(len(self.settings)) if which is None else which
        arrays = {name: np.full((len(self.settings), len(rows)), np.nan) for name in vars(dense)}
        for number, outcome in zip(which, self.outcomes(batch, recorded.logits, which), strict=True):
            for name, values in vars(outcome).items():
                arrays[name][number] = values
        return arrays | {
            "right": np.array(right, float),
            "dense_flops": dense.flops,
            "dense_vision": dense.vision,
        }

    def try_labels(self, rows: Sequence[int], which: Sequence[int]) -> Any:
        """Which settings write the label where the dense model does not, `[settings, rows]`."""
        samples = [self.rows[i] for i in rows]
        labels = self.processor.tokenizer(
            [row["answer"] for row in samples], add_special_tokens=False
        ).input_ids
        batch = Batch.build(self.model, self.encoded(samples), [[*ids, self.stops[0]] for ids in labels])
        dense = calibration.record(batch, self.attachment, 0, self.asked.sink_rule).logits
        return np.stack([outcome.same for outcome in self.outcomes(batch, dense, which)])

    def outcomes(self, batch: Batch, dense: torch.Tensor, which: Sequence[int]) -> list[Outcome]:
        """Of these settings, in their order; prefills are shared by all that agree so far."""
        done: dict[int, Outcome] = {}
        for prefix in sorted({self.prefix(self.settings[i]) for i in which}):
            recorded = calibration.record(batch, self.attachment, prefix, self.asked.sink_rule)
            unpruned = calibration.judge(batch, self.attachment, recorded.logits, dense)
            layers, short = len(recorded.states), dict[Any, Outcome]()
            for number in which:
                setting = self.settings[number]
                if self.prefix(setting) != prefix:
                    continue
                fusion = recorded.fusion(setting["boundary"], setting["layer_threshold"])
                outcome = unpruned
                for layer in sorted({int(f) for f in fusion if f < layers - 1}):
                    key = layer, setting["tokens_threshold"], "deep" in setting["stages"]
                    if key not in short:
                        policy = policy_of(setting, self.asked)
                        logits = calibration.resume(batch, self.attachment, recorded, layer, policy)
                        short[key] = calibration.judge(batch, self.attachment, logits, dense)
                    outcome = short[key].where(fusion == layer, outcome)
                done[number] = outcome
        return [done[number] for number in which]

    def encoded(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        with torch.no_grad():
            return encode_images(self.model, prompt_inputs(self.model, self.processor, samples))

    # ---------------------------------------------------------------- around it

    @staticmethod
    def prefix(setting: dict[str, Any]) -> int:
        """Settings with the same one run alike up to their fusion: the layers under the shallow rule."""
        return setting["boundary"] if "shallow" in setting["stages"] else 0

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        stop = self.model.generation_config.eos_token_id
        return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)

    def shallow_limit(self, boundaries: Sequence[int], dense: torch.Tensor) -> int:
        """The last boundary up to which the shallow rule alone stays under the bound, on one batch."""
        limit = 0
        if any("shallow" in stages for stages in self.asked.stages):
            for boundary in sorted(b for b in boundaries if b > 0):
                logits = calibration.record(
                    self.first, self.attachment, boundary, self.asked.sink_rule
                ).logits
                outcome = calibration.judge(self.first, self.attachment, logits, dense)
                if outcome.kl.mean() > self.asked.kl:
                    break
                limit = boundary
        return limit

    def fingerprint(self) -> str:
        """Of all that a batch's numbers depend on."""
        known = {k: v for k, v in asdict(self.asked).items() if k != "output"}
        described = json.dumps(
            [known, self.settings, self.rows._fingerprint, str(self.model.dtype)], sort_keys=True
        )
        return hashlib.blake2b(described.encode(), digest_size=6).hexdigest()

    @staticmethod
    def save(file: Path, arrays: dict[str, Any]) -> None:
        part = file.with_suffix(".part.npz")
        np.savez(part, **arrays)
        part.replace(file)  # whole or not at all

    def results(self, order: list[int], columns: dict[str, Any], correct: Any) -> dict[str, Any]:
        clusters = self.rows["scene"] if "scene" in self.rows.column_names else range(len(self.rows))
        clusters = list(clusters)
        return {
            "arguments": asdict(self.asked),
            "settings": self.settings,
            "shallow_limit": self.limit,
            "columns": columns,
            "correct": correct,
            "scenes": [str(clusters[i]) for i in order],
        }


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Arrays of several batches, side by side."""
    return {name: np.concatenate([batch[name] for batch in batches], axis=-1) for name in batches[0]}


def scale(recorded: calibration.Recorded) -> list[float]:
    """`tokens_threshold`s that keep about `SHARES` of the vision tokens in the layers of the middle half."""
    quarter = len(recorded.norms) // 4
    norms = torch.cat([norm[norm >= 0] for norm in recorded.norms[quarter : 3 * quarter]])
    at = torch.quantile(
        norms.double().cpu()[:: max(1, len(norms) // 1_000_000)], 1 - torch.tensor(SHARES).double()
    )
    return sorted({float(f"{value:.1g}") for value in at.tolist()})


def ended(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """An answer up to and with the token that ends it."""
    at = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return list(ids[: at + 1])


def main(arguments: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    try:
        if any("=" not in argument for argument in arguments):
            sys.exit(f"{__doc__}\n{Arguments.__doc__}")
        asked = OmegaConf.merge(OmegaConf.structured(Arguments), OmegaConf.from_cli(arguments))
        calibrate(OmegaConf.to_object(asked), Console())  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        keys = ", ".join(Arguments.__dataclass_fields__)
        sys.exit(f"error: {str(error).splitlines()[0]}; the keys are {keys}.")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
