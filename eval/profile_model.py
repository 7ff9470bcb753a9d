"""Find where a model fuses vision into text, and write the schedule that follows.

python eval/profile_model.py model=embedded data=scenes samples=128
python eval/profile_model.py model=HUB_ID_OR_FOLDER data=FOLDER samples=64 budget=0.3 output=outputs/profile
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from latefusion.eval.fusion.command import main

    main(sys.argv[1:], str(__doc__))
