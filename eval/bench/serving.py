"""Time late-fusion models in vLLM against the same model dense, on a CPU or a GPU; runs where vLLM is installed.

    python eval/bench/serving.py --json docs/results/serving_cpu.json
    python eval/bench/serving.py --layers 32 --hidden 4096 --dtype bfloat16 --in-flight 1 8 32 --json serving_gpu.json

Weights are random: only shapes count. Each system runs in a process of its own, in turns. `stock` is vLLM's own LLaVA,
`dense` is the plug-in with a schedule in which every layer sees every vision token. Seconds are of the thread that
computes (`time.thread_time`) on a CPU, of the clock on a GPU, and include the vision tower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VISION, TEXT, ANSWER = 576, 62, 16  # tokens of an image and of text in a prompt, and of an answer


def schedules(layers: int) -> dict[str, dict[str, Any] | None]:
    """A band of half the layers, four reading layers, dense, and vLLM without the plug-in."""
    band = {"enter": layers // 4, "exit": layers * 3 // 4 - 1}
    cross = [layers // 4, layers * 3 // 8, layers // 2, layers * 5 // 8]
    return {"stock": None, "dense": {"enter": 0}, "band": band, "cross": {"cross": cross}}


def write_models(folder: Path, layers: int, hidden: int, dtype: str) -> None:
    """A random LLaVA with a small tower, under each schedule."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from latefusion.models.base_model import load_processor
    from latefusion.models.locate import EMBEDDED_WEIGHTS
    from latefusion.models.schedule import VisionSchedule
    from latefusion.models.student.whole import forget, record

    values = json.loads((EMBEDDED_WEIGHTS / "config.json").read_text())
    heads = hidden // 64 if hidden < 4096 else hidden // 128
    values["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": 2048,
    }
    values["vision_config"] |= {"image_size": 192, "patch_size": 8, "num_hidden_layers": 1}
    values["image_seq_length"] = VISION
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(values)).to(getattr(torch, dtype))
    processor: Any = load_processor("embedded")
    processor.tokenizer.model_max_length = 2048
    side = {"height": 192, "width": 192}
    processor.image_processor.size = processor.image_processor.crop_size = side
    for name, schedule in schedules(layers).items():
        if schedule is None:
            forget(model)
        else:
            record(model, VisionSchedule.from_dict(schedule))
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    file = folder / "stock" / "model.safetensors"  # with the names that vLLM's own class knows
    weights = load_file(file)
    renamed = {
        key.replace("vision_tower.", "vision_tower.vision_model.")
        if "vision_tower." in key and "vision_model" not in key
        else key: weight
        for key, weight in weights.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})


def measure(folder: str, dtype: str, repeats: int, in_flight: list[int]) -> dict[str, Any]:
    """Seconds to the first token, of a decoding step, and for batches of requests."""
    import numpy as np
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    llm = LLM(
        folder,
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=max([4, *in_flight]),
        block_size=32,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
    )
    rng = np.random.default_rng(0)

    def prompt() -> Any:
        image = Image.fromarray(rng.integers(0, 255, (192, 192, 3), dtype=np.uint8))
        ids = [1, 3, *rng.integers(6, 99, TEXT).tolist()]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": [image]}}

    def seconds(prompts: list[Any], tokens: int) -> float:
        start = clock()
        llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens), use_tqdm=False
        )
        return clock() - start

    seconds([prompt()], 2)  # warm
    first = [seconds([prompt()], 1) for _ in range(repeats)]
    whole = [seconds([prompt()], 1 + ANSWER) for _ in range(repeats)]
    step = (statistics.median(whole) - statistics.median(first)) / ANSWER
    batches = {str(n): n / seconds([prompt() for _ in range(n)], ANSWER) for n in in_flight}
    return {"first_token": first, "decoding_step": step, "requests_per_second": batches}


def main() -> None:
    """Measure every system in turns and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--in-flight", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = measure(options.worker, options.dtype, options.repeats, options.in_flight)
        print("RESULT " + json.dumps(result))
        return
    results: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options.layers, options.hidden, options.dtype)
        for _ in range(options.rounds):
            for name in schedules(options.layers):
                results.setdefault(name, []).append(_in_a_process(f"{folder}/{name}", options))
    rows = {}
    for name, runs in results.items():
        first = [value for run in runs for value in run["first_token"]]
        rows[name] = {
            "schedule": schedules(options.layers)[name],
            "first_token_best": min(first),
            "first_token_median": statistics.median(first),
            "first_token": first,
            "decoding_step": [run["decoding_step"] for run in runs],
            "requests_per_second": [run["requests_per_second"] for run in runs],
        }
        print(
            f"{name:6} first token {min(first):.3f} s at best, {rows[name]['first_token_median']:.3f} s median"
        )
    if options.json:
        about = {"layers": options.layers, "hidden": options.hidden, "dtype": options.dtype}
        about |= {"vision_tokens": VISION, "text_tokens": TEXT + 1, "command": " ".join(sys.argv)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": about, "systems": rows}, indent=1) + "\n")


def _in_a_process(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--worker", folder, "--dtype", options.dtype]
    words += ["--repeats", str(options.repeats), "--in-flight", *map(str, options.in_flight)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"error: {folder} could not be measured: {done.stderr[-2000:]}")
    return json.loads(line.removeprefix("RESULT "))


if __name__ == "__main__":
    main()
