"""Answer test questions of `scenes` with a trained student, in vLLM and with `latefusion.load`, and compare.

    python eval/bench/served_answers.py outputs/served --questions 200 --json docs/results/served_answers.json

Runs where vLLM and `datasets` are installed. Prompts go through vLLM's own processor, as text and images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

from latefusion.data.scenes import load_scenes
from latefusion.models.student.restore import load

TOKENS = 6  # of the longest answer


def main() -> None:
    """Answer the questions twice, and write how many are right and how many answers are the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = load_scenes("test", n_scenes=options.questions)
    rows = [data[i] for i in range(0, len(data), max(1, len(data) // options.questions))][: options.questions]
    model, processor = load(options.student, dtype=torch.float32)
    texts, ours, worst = [], [], 0.0
    logprobs: list[list[list[float]]] = []
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=row["image"], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        texts.append(text)
        ours.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        logprobs.append([torch.log_softmax(logits[0].float(), -1).tolist() for logits in output.logits])
    llm = LLM(
        options.student,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=700,
        block_size=32,
        limit_mm_per_prompt={"image": 1},
    )
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": row["image"]}}
        for text, row in zip(texts, rows, strict=True)
    ]
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5)
    outputs = [output.outputs[0] for output in llm.generate(prompts, parameters, use_tqdm=False)]  # type: ignore[arg-type]
    for output, reference in zip(outputs, logprobs, strict=True):
        for step, expected in zip(output.logprobs or (), reference, strict=False):
            worst = max(worst, *(abs(value.logprob - expected[token]) for token, value in step.items()))
    decoded = [processor.decode(ids, skip_special_tokens=True).strip() for ids in ours]
    result = {
        "schedule": model.config.vision_schedule,
        "questions": len(rows),
        "right_in_vllm": sum(o.text.strip() == row["answer"] for o, row in zip(outputs, rows, strict=True)),
        "right_in_transformers": sum(text == row["answer"] for text, row in zip(decoded, rows, strict=True)),
        "same_tokens": sum(list(o.token_ids) == ids for o, ids in zip(outputs, ours, strict=True)),
        "worst_logprob_difference": worst,
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
