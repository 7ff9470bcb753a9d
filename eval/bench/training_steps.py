"""The steps that `bench_training` times: those of `training/`, on random weights and made-up vision features."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from latefusion.eval.bench.executor import build
from latefusion.eval.bench.timing import interleaved, prompt, seconds
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Student, build_student
from latefusion.training.cost import training_flops
from latefusion.training.objective import Objective

ANSWER = 8  # label tokens
TOP_K = 32  # of the offline teacher


class Bench:
    """One student whose schedule, and whose layers with LoRA, change from step to step.

    Args:
        args: of the command line.
        layers: of the decoder.
    """

    def __init__(self, args: argparse.Namespace, layers: int):
        self.args, self.layers = args, layers
        model: Any = build(args)
        self.config = model.config
        self.student: Student = build_student(
            model,
            None,  # type: ignore[arg-type]  # nothing here is text
            base="random",
            schedule=VisionSchedule(enter=layers // 4, exit=3 * layers // 4),  # late, for its entry adapter
            rank=16,
            alpha=32,
            dropout=0.0,
            entry_rank=16,
        )
        self.student.model.train()
        trained = [p for p in self.student.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.batch = with_answers(prompt(args))
        n = args.batch * ANSWER
        vocabulary = self.config.text_config.vocab_size
        logprobs, tokens = torch.randn(n, vocabulary, device=args.device).log_softmax(-1).topk(TOP_K)
        self.answers = {"teacher_tokens": tokens, "teacher_logprobs": logprobs}

    def step(
        self, schedule: VisionSchedule, *, teacher: str = "none", busy: bool = False
    ) -> Callable[[], None]:
        """A training step.

        Args:
            teacher: `none`, `online` or `offline`.
            busy: LoRA in the layers that compute or read vision tokens alone (`lora.layers=busy`), else in all.
        """
        objective = self.objective(VisionSchedule() if teacher == "online" else None, weight=1.0)
        batch = {**self.batch, **self.answers} if teacher == "offline" else self.batch
        return self.work(objective, schedule, batch, self.adapted(schedule, busy))

    def on_text(self, tokens: int) -> Callable[[], None]:
        """A training step of the same model on so many text tokens a sample."""
        ids = torch.randint(2, 1024, (self.args.batch, tokens), device=self.args.device)
        batch = with_answers({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return self.work(
            self.objective(None, weight=0.0), VisionSchedule(), batch, self.adapted(VisionSchedule(), False)
        )

    def objective(self, teacher: VisionSchedule | None, *, weight: float) -> Objective:
        return Objective(
            model=self.student.model,
            attachment=self.student.attachment,
            teacher=teacher,
            weight=weight,
            temperature=1.0,
            share_images=True,
        )

    def adapted(self, schedule: VisionSchedule, busy: bool) -> list[bool]:
        """Of each layer, whether it has LoRA."""
        return [not busy or n > 0 for n in schedule.vision_tokens(self.layers, 1)]

    def adapt(self, layers: list[bool]) -> None:
        """Adapters of other layers neither run nor learn."""
        decoder = self.student.model.get_base_model().get_decoder()
        for layer, adapted in zip(decoder.layers, layers, strict=True):
            for module in layer.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(adapted)

    def work(
        self, objective: Objective, schedule: VisionSchedule, batch: dict[str, Any], adapted: list[bool]
    ) -> Callable[[], None]:
        count = self.args.batch * ANSWER
        bf16 = self.args.dtype == "bfloat16"

        def work() -> None:
            self.adapt(adapted)
            with self.student.attachment.using(schedule):
                with torch.autocast(self.args.device, torch.bfloat16, enabled=bf16):
                    loss, _ = objective(self.student.model, batch, count=count)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return work

    def rounds(self, works: Mapping[Any, Callable[[], None]]) -> dict[Any, list[float]]:
        """Seconds of every step in every round."""
        return interleaved(works, lambda work: seconds(work, self.args), self.args.rounds)

    def tokens(self, schedule: VisionSchedule) -> list[int]:
        """Text and vision tokens of each layer."""
        return [self.args.text + n for n in schedule.vision_tokens(self.layers, self.args.vision)]

    def flops(self, schedule: VisionSchedule, *, teacher: str = "none", busy: bool = False) -> int:
        """Of the step that `step` makes with the same arguments, a sample."""
        return training_flops(
            self.config,
            schedule,
            self.args.text,
            self.args.vision,
            answers=ANSWER,
            teacher=self.config if teacher == "online" else None,
            first=self.adapted(schedule, busy).index(True),
        )


def with_answers(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch whose last tokens are to be learnt."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
    queries = torch.full_like(labels[:, :1], labels.shape[1] - ANSWER - 1)
    return {**inputs, "labels": labels, "queries": queries}
