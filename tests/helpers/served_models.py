"""A late-fusion checkpoint, requests to it, and its answers in transformers and in vLLM."""

import gc
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from latefusion.models.attach import attached
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import install_entry
from latefusion.models.student.restore import load
from latefusion.models.student.whole import record

IMAGE, BOS, VOCABULARY, N_VISION = 3, 1, 99, 144  # of the embedded base
TOP = 5  # log-probabilities that vLLM gives for each token
# Text tokens before the image, behind it, and behind a second one (0: there is none); 0 before: text alone
LENGTHS = ((1, 12, 0), (9, 7, 0), (40, 5, 0), (3, 20, 0), (0, 33, 0), (5, 6, 4), (70, 2, 0))


@dataclass
class Request:
    """Token ids with one placeholder for each image."""

    ids: list[int]
    images: list[Image.Image] = field(default_factory=list)

    @property
    def expanded(self):
        return [i for token in self.ids for i in [token] * (N_VISION if token == IMAGE else 1)]

    @property
    def prompt(self):
        more = {"multi_modal_data": {"image": self.images}} if self.images else {}
        return {"prompt_token_ids": self.ids, **more}


def picture(seed):
    """Squares on a bright ground."""
    rng = np.random.default_rng(seed)
    pixels = np.full((96, 96, 3), 230, np.uint8)
    for _ in range(6):
        (x, y), side = rng.integers(0, 70, 2), rng.integers(10, 26)
        pixels[y : y + side, x : x + side] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def words(rng, n):
    return rng.integers(6, VOCABULARY, n).tolist()


def requests():
    made = []
    for i, (before, behind, last) in enumerate(LENGTHS):
        rng = np.random.default_rng(100 + i)
        if before == 0:
            made.append(Request([BOS, *words(rng, behind)]))
            continue
        ids = [BOS, *words(rng, before - 1), IMAGE, *words(rng, behind)]
        if last:
            ids += [IMAGE, *words(rng, last)]
        made.append(Request(ids, [picture(seed) for seed in (i, 50 + i)[: 1 + bool(last)]]))
    return made


def save_student(folder, schedule, entry=False):
    """The embedded base under a schedule, as a merged student is written; with `entry` a random entry adapter."""
    model, processor = load_base("embedded", dtype=torch.float32)
    if entry:
        torch.manual_seed(0)
        adapter = install_entry(model, 4, N_VISION)
        with torch.no_grad():
            for weight in adapter.parameters():
                weight.normal_(0, 0.1)
            adapter.start.bias.normal_(0, 0.1)
            adapter.start.weight.add_(0.03 * torch.randn_like(adapter.start.weight))
    record(model, schedule)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@dataclass
class Answer:
    """Greedy token ids, and for each the log-probabilities of all tokens, or of the best ones by id."""

    ids: list[int]
    logprobs: list


def in_transformers(folder, batch, steps, dense=False):
    """Answers of `latefusion.load`, one request at a time."""
    model, processor = load(folder, dtype=torch.float32)
    if dense:
        attached(model).policy = VisionSchedule()
    answers = []
    for request in batch:
        ids = torch.tensor([request.expanded])
        more = {}
        if request.images:
            more["pixel_values"] = processor.image_processor(request.images, return_tensors="pt")[
                "pixel_values"
            ]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **more,
            )
        logprobs = [torch.log_softmax(logits[0].float(), -1).tolist() for logits in out.logits]
        answers.append(Answer(out.sequences[0, ids.shape[1] :].tolist(), logprobs))
    return answers


@contextmanager
def engine(folder, **settings):
    """vLLM on a checkpoint, in this process."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2},
    }
    llm = LLM(folder, **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def in_vllm(llm, batch, steps):
    """Greedy answers to all requests at once."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=steps, min_tokens=steps, logprobs=TOP)
    outputs = llm.generate([request.prompt for request in batch], parameters, use_tqdm=False)
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [{token: value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def worst_difference(served, reference):
    """Of a log-probability, over all tokens that vLLM gives one for."""
    return max(
        abs(value - expected[token])
        for one, other in zip(served, reference, strict=True)
        for step, expected in zip(one.logprobs, other.logprobs, strict=True)
        for token, value in step.items()
    )
