"""A late-fusion checkpoint, requests to it, and its answers in transformers and in vLLM."""

import gc
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from helpers.served_bases import Base
from PIL import Image

from latefusion.models.attach import attached
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import install_entry
from latefusion.models.student.restore import load
from latefusion.models.student.whole import record

BOS = 1
TOP = 5  # log-probabilities that vLLM gives for each token
# Text tokens before the image, behind it, and behind a second one (0: there is none); 0 before: text alone
LENGTHS = ((1, 12, 0), (9, 7, 0), (40, 5, 0), (3, 20, 0), (0, 33, 0), (5, 6, 4), (70, 2, 0))


@dataclass
class Request:
    """Token ids with one placeholder for each image."""

    base: Base
    ids: list[int]
    images: list[Image.Image] = field(default_factory=list)

    @property
    def expanded(self):
        """The ids with a placeholder for each vision token."""
        lengths = iter([self.base.tokens(image) for image in self.images])
        return [i for token in self.ids for i in [token] * (next(lengths) if token == self.base.image else 1)]

    @property
    def prompt(self):
        more = {"multi_modal_data": {"image": self.images}} if self.images else {}
        return {"prompt_token_ids": self.ids, **more}


def words(base, rng, n):
    return rng.integers(*base.words, n).tolist()


def requests(base, lengths=LENGTHS):
    made = []
    for i, (before, behind, last) in enumerate(lengths):
        rng = np.random.default_rng(100 + i)
        if before == 0:
            made.append(Request(base, [BOS, *words(base, rng, behind)]))
            continue
        ids = [BOS, *words(base, rng, before - 1), base.image, *words(base, rng, behind)]
        if last:
            ids += [base.image, *words(base, rng, last)]
        seeds = (i, 50 + i)[: 1 + bool(last)]
        made.append(Request(base, ids, [base.picture(seed) for seed in seeds]))
    return made


def save_student(folder, schedule, base, entry=False, later_rank=None):
    """A base under a schedule, as a merged student is written; with `entry` a random entry adapter.

    Args:
        later_rank: of its maps between layers that read frozen tokens; None: they are whole matrices.
    """
    model = base.model
    if entry:
        torch.manual_seed(0)
        places = 1 if base.sizes_differ else base.tokens(base.picture(0))
        adapter = install_entry(model, 4, places, (schedule.cross or ())[1:], later_rank)
        with torch.no_grad():
            for weight in adapter.parameters():
                weight.normal_(0, 0.1)
            for name, value in adapter.start.state_dict().items():
                if name.endswith("weight"):
                    value.add_(0.03 * torch.randn_like(value))
                else:  # biases, and the factors of a low rank
                    value.normal_(0, 0.1)
    record(model, schedule)
    model.save_pretrained(folder)
    base.processor.save_pretrained(folder)
    return str(folder)


@dataclass
class Answer:
    """Greedy token ids, and for each the log-probabilities of all tokens, or of the best ones by id."""

    ids: list[int]
    logprobs: list
    cached: int = 0  # tokens of the prompt that vLLM found in its prefix cache


def in_transformers(folder, batch, steps, dense=False):
    """Answers of `latefusion.load`, one request at a time."""
    model, processor = load(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # it is a word as any other here, as for `in_vllm`
    if dense:
        attached(model).policy = VisionSchedule()
    answers = []
    for request in batch:
        ids = torch.tensor([request.expanded])
        more = {}
        if request.images:
            more = dict(processor.image_processor(request.images, return_tensors="pt"))
        if model.config.model_type == "qwen2_5_vl":
            more["mm_token_type_ids"] = (ids == request.base.image).int()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
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

    parameters = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=TOP)
    outputs = llm.generate([request.prompt for request in batch], parameters, use_tqdm=False)
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [{token: value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs],
            output.num_cached_tokens,
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
