"""How the base of `models/smollm_icons` was trained; `python -m latefusion.training.smollm_icons.train_base`.

Reading order: `features.py` (pictures once through the tower), `targets.py` (what a token should say, in the
language model's own words), `projector.py` (stage 1, no language model), `prompts.py` (questions of a board in
one pass), `lora.py`, `train.py` (stage 2), `measure.py`.
"""
