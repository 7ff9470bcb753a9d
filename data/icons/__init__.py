"""`icons`: boards of small drawings on coloured cards, and questions about them.

A board is a 768 x 768 picture of 6 x 6 squares, addressed like a chess board (A1 to F6); most are empty. A
thing is a drawing of one of 60 named objects on a coloured card, and covers one square, which is 2 x 2 of the
12 x 12 vision tokens of `models/smollm_icons`. The drawings are emoji in four art styles, taken from npm
packages (`pictures.py`); nothing of them is kept in this repository.

Read `pictures.py` (what a drawing is), `boards.py` (what a board is, splits), `board_questions.py`, `load_icons.py`
(rows).
"""
