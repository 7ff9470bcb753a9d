"""Everything that needs a GPU, in minutes: what runs, what is right, and how fast it is at LLaVA-1.5-7B's shape.

    python eval/bench/gpu.py                          # `make gpu`: under 8 minutes on one H100
    python eval/bench/gpu.py --seconds 170 --only speed # the most important measurements alone
    python eval/bench/gpu.py --dry-run                # the same on a CPU at a toy shape

Needs this checkout and a torch with CUDA; nothing is fetched. On a machine without network whose Python has only torch,
carry these wheels beside it (`pip download --no-deps`, in the versions of constraints.txt): transformers, tokenizers,
huggingface-hub, safetensors, peft, accelerate, datasets, dill, multiprocess, xxhash, pyarrow, pandas, python-dateutil,
six, numpy, scipy, pillow, regex, PyYAML, tqdm, packaging, psutil, httpx2, httpcore2, h11, anyio, idna, truststore,
hydra-core, omegaconf, antlr4-python3-runtime (build it with `pip wheel`), rich, tensorboardX, protobuf, pytest, pluggy,
iniconfig, pygments, hypothesis, sortedcontainers, attrs; for more of the tests deepspeed, hjson, pydantic,
pydantic-core, annotated-types, typing-inspection, msgpack, py-cpuinfo, ninja, einops, pytorch-lightning, bitsandbytes
and flash-attn. `latefusion` must import: `pip install -e . --no-deps`, or a folder on PYTHONPATH with a link
`latefusion` to the checkout.

1. `end_to_end.py`: training runs and answered requests, the most telling cell first (text 256, batch 8), written to
   `gpu_end_to_end.json` after every cell;
2. `pytest -m gpu`, all files at once, into `gpu_tests.json`: each test's outcome, and what is not installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "pytorch-lightning",
    "bitsandbytes",
    "flash-attn",
)
ON_GPU = "--shape llava-1.5-7b --device cuda --dtype bfloat16 --rounds 2 --train-rounds 1 --steps 5 --cells"
CELLS = (  # the most telling first
    "training:8x256 request:8x256 request:1x256 training:1x256 request:8x1024 training:8x1024 "
    "request:1x1024 request:1x32 request:8x32 training:8x32 training:1x32 training:1x1024"
)
DRY_RUN = (
    "--shape",
    "toy",
    "--text",
    "24",
    "--batch",
    "1",
    "--tokens",
    "1",
    "2",
    "--rounds",
    "1",
    "--steps",
    "2",
    "--recipes",
    "dense/none",
    "cross_only",
)


def installed() -> dict[str, str | None]:
    """Versions of the packages that decide what can run; None: not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def test(seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU, each file in its own process, for at most so long; their outcomes."""
    files = sorted(
        str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-ra", "-p", "no:cacheprovider"]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(len(files))]
        running = []
        for file, log in zip(files, logs, strict=True):
            with log.open("w") as out:
                running.append(subprocess.Popen([*command, file], cwd=ROOT, stdout=out, stderr=out))
        for process in running:
            try:
                process.wait(max(1.0, seconds - (time.perf_counter() - begun)))
            except subprocess.TimeoutExpired:
                process.terminate()
        cases = [case for log in logs for case in outcomes(log.read_text())]
    return {
        "date": date.today().isoformat(),
        "device": device(),
        "installed": installed(),
        "seconds": round(time.perf_counter() - begun, 1),
        "counts": dict(Counter(case["outcome"] for case in cases)),
        "tests": cases,
    }


def outcomes(log: str) -> list[dict[str, str]]:
    """Name and outcome of each test in what `pytest -v -ra` printed, and why, if it did not pass."""
    summary = re.findall(r"^(?:FAILED|ERROR) (\S+) - (.+)$", log, re.MULTILINE)
    reasons = {name: reason[:300] for name, reason in summary}
    skipped = re.findall(r"^SKIPPED \[\d+\] (\S+?):\d+: (.+)$", log, re.MULTILINE)
    cases: dict[str, dict[str, str]] = {}
    for name, outcome in re.findall(r"^(tests/\S+::\S+)(?: ([A-Z]+))?(?: .*)?$", log, re.MULTILINE):
        case = {"name": name, "outcome": outcome.lower() or "unfinished"}
        why = reasons.get(name) or next(
            (reason for file, reason in skipped if outcome == "SKIPPED" and name.startswith(file)), None
        )
        cases[name] = case if why is None else {**case, "why": why}
    return list(cases.values())


def device() -> str:
    import torch  # lazy: keeps argument errors fast

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--only", choices=["speed", "tests"])
    parser.add_argument("--dry-run", action="store_true", help="a toy shape on the CPU")
    parser.add_argument("more", nargs="*", help="further arguments of end_to_end.py, after --")
    args = parser.parse_args()
    begun = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)

    import torch  # lazy: as above

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; --dry-run runs a toy shape on the CPU.")

    from latefusion.eval.bench import end_to_end  # lazy: as above

    if args.only != "tests":
        share = 1.0 if args.only else 0.55
        words = [*(DRY_RUN if args.dry_run else f"{ON_GPU} {CELLS}".split())]
        words += ["--json", str(args.out / "gpu_end_to_end.json"), "--seconds", str(share * args.seconds)]
        result = end_to_end.measure(end_to_end.options().parse_args([*words, *args.more]))
        print(end_to_end.markdown(result), flush=True)
    if args.only != "speed":
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        result = test(args.seconds - (time.perf_counter() - begun))
        (args.out / "gpu_tests.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"pytest -m gpu: {result['counts']} in {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
