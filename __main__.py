"""latefusion: one command for all of it.

    latefusion train recipe=late_fusion
    latefusion evaluate checkpoint=outputs/late_fusion
    latefusion export checkpoint=outputs/late_fusion output=outputs/merged merge=true

`latefusion COMMAND --help` explains a command. On several GPUs: `accelerate launch -m latefusion.training.train ...`.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from typing import NoReturn

COMMANDS = {
    "train": ("training.train", "train a late-fusion student"),
    "teach": ("training.teach", "write a teacher's answers for training without it"),
    "export": ("training.export", "write a trained student as a folder to use or to publish"),
    "import-llava": ("training.import_llava", "turn a checkpoint of LLaVA's own code into a student"),
    "evaluate": ("eval.evaluate", "compare models and policies on questions"),
    "compare": ("eval.compare", "say what got worse between two reports"),
    "profile": ("eval.profile_model", "find out which layers fuse vision into text"),
    "calibrate": ("eval.calibrate", "find VisiPruner's thresholds for a model"),
    "generate": ("eval.generate", "ask a model about an image under policies"),
    "validate": ("data.validate", "name the bad rows of a data set"),
}
WITHOUT_DATA = ("export", "import-llava")  # what latefusion[vllm] brings is enough


def main() -> None:
    """Run a command with the words that follow it, as `python -m latefusion.MODULE` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:<{width}}  {what}" for command, (_, what) in COMMANDS.items()]
        print("\n".join([__doc__.strip(), "", *lines]))
        return
    if name not in COMMANDS:
        sys.exit(f"error: latefusion has no command {name}; choose one of {', '.join(COMMANDS)}.")
    if name not in WITHOUT_DATA and find_spec("datasets") is None:
        lacks(name, "datasets")
    sys.argv = [f"latefusion {name}", *sys.argv[2:]]
    try:
        runpy.run_module(f"latefusion.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "latefusion":
            raise
        lacks(name, str(error.name))


def lacks(command: str, package: str) -> NoReturn:
    """End with what to install, and where: what trains needs a later transformers than vLLM."""
    apart = " apart from vLLM, which needs an older transformers" if find_spec("vllm") else ""
    sys.exit(
        f"error: latefusion {command} needs {package}, which is not installed: pip install 'latefusion[all]'{apart}."
    )


if __name__ == "__main__":
    main()
