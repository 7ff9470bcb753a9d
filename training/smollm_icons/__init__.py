"""How the base of `models/smollm_icons` was trained; `python -m latefusion.training.smollm_icons.train_base`.

Reading order: `features.py` (pictures once through the tower), `targets.py` (what a token should say, in the
language model's own words), `projector.py` (stage 1, no language model), `question_tree.py` (questions of a board in
one pass), `batch.py` (several boards in one pass), `lora.py`, `learner.py`, then stage 2: `recipe.py` (the plan),
`steps.py` (what a step trains on), `train_base.py`. `accuracy.py`, `measured.py` and `fusion_stages.py` measure;
`record.py` and `card.py` write what ships.
"""
