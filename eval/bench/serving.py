"""Time late-fusion models in vLLM against the same model dense, on a CPU or a GPU; runs where vLLM is installed.

    python eval/bench/serving.py --json docs/results/serving_cpu.json
    make gpu-serving                                  # LLaVA-1.5-7B's shape on a GPU, in about ten minutes

Weights are random: only shapes count, and all systems share one file of them. Each system runs in a process of its own,
in turns. `stock` is vLLM's own LLaVA, `dense` is the plug-in with a schedule in which every layer sees every vision
token. Both run without CUDA graphs, as the plug-in must; `graphs` is stock with them, as a user has it, and is measured
on a GPU alone. Seconds are of the thread that computes (`time.thread_time`) on a CPU, of the clock on a GPU; they
include the vision tower. With requests in flight, all begin at once, and the time to the first token is each one's, by
the clock. Intervals are of Student's t, over the requests of all rounds.
"""

from __future__ import annotations

import argparse
import gc
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
TOWERS: dict[str, dict[str, int]] = {  # both give 576 tokens an image
    "small": {"image_size": 192, "patch_size": 8, "num_hidden_layers": 1},
    "clip-l": {
        "image_size": 336,
        "patch_size": 14,
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
    },
}
# The 97.5% quantile of Student's t for 1, 2, ... degrees of freedom; from the last on it is nearly that
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

GRAPHS = "graphs"
SYSTEMS = ("stock", "dense", "band", "cross", GRAPHS)


def schedules(layers: int) -> dict[str, dict[str, Any] | None]:
    """A band of half the layers, four reading layers, dense, and vLLM without the plug-in."""
    band = {"enter": layers // 4, "exit": layers * 3 // 4 - 1}
    cross = [layers // 4, layers * 3 // 8, layers // 2, layers * 5 // 8]
    return {"stock": None, "dense": {"enter": 0}, "band": band, "cross": {"cross": cross}, GRAPHS: None}


def interval(values: list[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean, by Student's t; None: there are less than two values."""
    if len(values) < 2:
        return None
    quantile = T[min(len(values) - 1, len(T)) - 1]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def write_models(folder: Path, options: argparse.Namespace) -> None:
    """A random LLaVA under each schedule; the folders share the file of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from latefusion.models.base_model import load_processor
    from latefusion.models.locate import EMBEDDED_WEIGHTS
    from latefusion.models.schedule import VisionSchedule
    from latefusion.models.student.whole import forget, record

    layers, hidden, tower = options.layers, options.hidden, TOWERS[options.tower]
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
    values["vision_config"] |= tower
    values["image_seq_length"] = VISION
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(values))
    processor: Any = load_processor("embedded")
    processor.tokenizer.model_max_length = 2048
    side = dict.fromkeys(("height", "width"), tower["image_size"])
    processor.image_processor.size = processor.image_processor.crop_size = side
    weights = {
        key.replace("vision_tower.", "vision_tower.vision_model.")  # the names that vLLM's own class knows
        if "vision_tower." in key and "vision_model" not in key
        else key: weight.cpu().contiguous()
        for key, weight in model.state_dict().items()
        if key != "lm_head.weight"  # tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, schedule in schedules(layers).items():
        if schedule is None:
            forget(model)
        else:
            record(model, VisionSchedule.from_dict(schedule))
        model.config.architectures = [type(model).__name__]
        model.config.dtype = getattr(torch, options.dtype)
        model.config.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        os.link(folder / "model.safetensors", folder / name / "model.safetensors")
    del model, weights
    gc.collect()
    torch.cuda.empty_cache()  # vLLM asks for most of what the GPU has


def measure(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token, of a decoding step, and for batches of requests."""
    import numpy as np
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    llm = LLM(
        folder,
        dtype=options.dtype,
        disable_log_stats=False,  # measures each request's first token
        enforce_eager=Path(folder).name != GRAPHS,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=max([4, *options.in_flight]),
        block_size=32,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
    )
    rng, side = np.random.default_rng(0), TOWERS[options.tower]["image_size"]

    def prompt() -> Any:
        image = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
        ids = [1, 3, *rng.integers(6, 99, TEXT).tolist()]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": [image]}}

    def answered(prompts: list[Any], tokens: int) -> tuple[float, list[float]]:
        """Seconds until all are answered, and until the first token of each."""
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = clock()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        end = clock()
        return end - start, [output.metrics.first_token_latency for output in outputs]  # type: ignore[union-attr]

    def seconds(prompts: list[Any], tokens: int) -> float:
        return answered(prompts, tokens)[0]

    seconds([prompt()], 2)  # warm
    first = [seconds([prompt()], 1) for _ in range(options.repeats)]
    whole = [seconds([prompt()], 1 + ANSWER) for _ in range(options.repeats)]
    step = (statistics.median(whole) - statistics.median(first)) / ANSWER
    batches = {}
    for n in options.in_flight:
        seconds([prompt() for _ in range(n)], 2)  # warm
        taken, latencies = answered([prompt() for _ in range(n)], ANSWER)
        batches[str(n)] = {
            "requests_per_second": n / taken,
            "first_token_median": statistics.median(latencies),
            "first_token_worst": max(latencies),
        }
    return {"first_token": first, "decoding_step": step, "in_flight": batches}


def main(words: list[str] | None = None) -> None:
    """Measure every system in turns and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tower", choices=list(TOWERS), default="small")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, help="default: all that the device has")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--in-flight", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.worker:
        result = measure(options.worker, options)
        print("RESULT " + json.dumps(result))
        return
    import torch

    systems = options.systems or [s for s in SYSTEMS if s != GRAPHS or torch.cuda.is_available()]
    results: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        for _ in range(options.rounds):
            for name in systems:
                results.setdefault(name, []).append(_in_a_process(f"{folder}/{name}", options))
    rows = {}
    for name, runs in results.items():
        first = [value for run in runs for value in run["first_token"]]
        rows[name] = {
            "schedule": schedules(options.layers)[name],
            "first_token_best": min(first),
            "first_token_median": statistics.median(first),
            "first_token_mean_95": interval(first),
            "first_token": first,
            "decoding_step": [run["decoding_step"] for run in runs],
            "in_flight": [run["in_flight"] for run in runs],
        }
        print(
            f"{name:6} first token {min(first):.3f} s at best, {rows[name]['first_token_median']:.3f} s median"
        )
    if options.json:
        about = {name: getattr(options, name) for name in ("layers", "hidden", "tower", "dtype")}
        about |= {"vision_tokens": VISION, "text_tokens": TEXT + 1, "command": " ".join(sys.argv)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": about, "systems": rows}, indent=1) + "\n")


def _in_a_process(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--worker", folder, "--dtype", options.dtype, "--tower", options.tower]
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
