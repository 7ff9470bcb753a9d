"""A loss or gradient that is not finite: stop before the optimizer uses it, and save the step for a replay.

python -m latefusion.training.nonfinite outputs/late_fusion/nonfinite-step-41-rank-0
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from latefusion.data.bad_rows import Bad
from latefusion.data.streaming import Stream
from latefusion.models.student.build import Student
from latefusion.recipes.check import check_config
from latefusion.recipes.compose import stored_values
from latefusion.recipes.schema import Config, NonFiniteStep, Teacher
from latefusion.training.assemble import dtype_of, objective_of, student_of
from latefusion.training.order import Order
from latefusion.training.trust_record import read

BATCHES = "batches.pt"
WEIGHTS = "weights.pt"
ROWS = "rows.json"
MOST_SKIPS = 10  # in a row; more point to the weights, not to the samples


class NonFinite(RuntimeError):
    """Loss or gradient of a step is not finite; the message names the step, its samples and the folder to replay."""


class Watch:
    """Checks every step before the optimizer takes it.

    All processes see the same gradient norm, so they stop or skip together. The processes whose own samples caused it
    save the step.

    Args:
        folder: of the run, with its `config.yaml`.
        dataset, order: to name the samples.
        rank, world: number of this process, and of all processes.
        micro: samples in a micro-batch.
        skip: leave such a step out instead of stopping, up to `MOST_SKIPS` in a row.
        student: its trainable weights are saved with the step; None: they lie in shards.
    """

    @classmethod
    def of(
        cls, config: Config, dataset: Any, order: Order, *, rank: int, world: int, student: Student | None
    ) -> Watch:
        """The watch of a configured run."""
        return cls(
            config.output_dir,
            dataset=dataset,
            order=order,
            rank=rank,
            world=world,
            micro=config.train.batch_size,
            skip=config.train.on_nonfinite is NonFiniteStep.skip,
            student=student,
        )

    def __init__(
        self,
        folder: str | Path,
        *,
        dataset: Any,
        order: Order,
        rank: int,
        world: int,
        micro: int,
        skip: bool,
        student: Student | None,
    ):
        self.folder, self.dataset, self.order = Path(folder), dataset, order
        self.rank, self.world, self.micro = rank, world, micro
        self.skip, self.student = skip, student
        self.skipped = self._in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """Call before the first micro-batch of a step."""
        self._random = torch.get_rng_state()
        self._losses: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []
        self._count: Tensor | int = 1

    def saw(self, batch: dict[str, Any], loss: Tensor, count: Tensor | int) -> None:
        """Remember a micro-batch, its share of the loss, and the number of label tokens of the whole step."""
        self._batches.append(batch)
        self._losses.append(loss.detach())
        self._count = count

    def passes(self, step: int, norm: Tensor | float | None) -> bool:
        """Whether step `step` (from 0) may be taken, given the norm of its gradients over all processes.

        Raises:
            NonFinite: it may not, and steps are not skipped.
        """
        if norm is None or math.isfinite(float(norm)):
            self._in_a_row = 0
            return True
        losses = [float(loss) for loss in self._losses]
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        description = ""
        if bad or self.rank == 0:
            description = self._save_step(step, losses, float(norm))
        self.skipped += 1
        self._in_a_row += 1
        if self.skip and self._in_a_row <= MOST_SKIPS:
            if description:
                print(f"step {step + 1} skipped: {description}", flush=True)
            return False
        why = f" ({MOST_SKIPS} steps in a row were skipped)" if self.skip else ""
        raise NonFinite(
            f"step {step + 1} is not finite{why}: {description or 'see the message of another process'}; lower "
            "train.learning_rate or mend the samples, then go on with resume=true."
        )

    def _save_step(self, step: int, losses: list[float], norm: float) -> str:
        """Save the micro-batches of the step and the weights; describe the step in words."""
        shares = self.order.share(step, self.rank, self.world, self.micro)
        batches: list[dict[str, Any]] = [
            {"loss": loss, "rows": [{"index": i, "id": self._id(i)} for i in share]}
            for loss, share in zip(losses, shares, strict=True)
        ]
        bad = [b for b in batches if not math.isfinite(b["loss"])] or batches
        folder = self.folder / f"nonfinite-step-{step + 1}-rank-{self.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"step": step + 1, "rank": self.rank, "grad_norm": str(norm), "count": int(self._count)}
        text = json.dumps({**facts, "batches": [{**b, "loss": str(b["loss"])} for b in batches]}, indent=1)
        (folder / ROWS).write_text(text + "\n")
        inputs = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in b.items()} for b in self._batches]
        torch.save({"batches": inputs, "random": self._random}, folder / BATCHES)
        if self.student is not None:
            torch.save(get_peft_model_state_dict(self.student.model), folder / WEIGHTS)
        names = [str(row["id"]) for b in bad for row in b["rows"]]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"loss {bad[0]['loss']}, gradient norm {norm}, samples {shown}, saved in {folder}"

    def _id(self, index: int) -> Any:
        if isinstance(self.dataset, Stream):
            return self.dataset[index].name
        sample = self.dataset[index]
        return f"in place of {sample.id}" if isinstance(sample, Bad) else sample.get("id", index)


def replay(folder: str | Path) -> Sequence[float]:
    """Compute the losses of a saved step's micro-batches again, on one process.

    Raises:
        FileNotFoundError: the folder holds no saved step with weights.
    """
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"no saved step with weights in {folder}; name a nonfinite-step-... folder.")
    schema = OmegaConf.structured(Config)
    config = check_config(OmegaConf.merge(schema, stored_values(path.parent / "config.yaml")))  # type: ignore[arg-type]
    config.output_dir = str(path.parent)  # wherever it has been moved to
    student = student_of(config)
    set_peft_model_state_dict(student.model, torch.load(path / WEIGHTS, weights_only=True))
    if (decision := read(path.parent)) is not None and decision.trust == "none":
        config.teacher = Teacher.none
    objective = objective_of(config, student)
    saved = torch.load(path / BATCHES, weights_only=True)
    facts = json.loads((path / ROWS).read_text())
    objective.at(facts["step"] - 1, config.train.total_steps)
    student.model.train()
    torch.set_rng_state(saved["random"])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype_of(config) is torch.bfloat16):
        return [objective(student.model, batch, count=facts["count"])[0].item() for batch in saved["batches"]]


if __name__ == "__main__":
    for loss in replay(sys.argv[1]):
        print(loss)
