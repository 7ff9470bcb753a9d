"""Find where a model fuses vision into text, and write the schedule that follows.

python eval/profile.py model=embedded data=scenes samples=128
python eval/profile.py model=HUB_ID_OR_FOLDER data=FOLDER samples=64 budget=0.3 output=outputs/profile
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ELSEWHERE = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def stand_aside() -> None:
    """Be Python's own module `profile`, which a script in this folder (cProfile, say) meant by that name."""
    spec = PathFinder.find_spec("profile", ELSEWHERE)
    assert spec is not None and spec.loader is not None
    sys.modules["profile"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["profile"])


if __name__ == "profile":
    stand_aside()
elif __name__ == "__main__":
    sys.path[:] = ELSEWHERE
    from latefusion.eval.profiling.command import main

    main(sys.argv[1:], str(__doc__))
