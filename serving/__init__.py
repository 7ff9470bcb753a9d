"""Serve late-fusion checkpoints in vLLM: a plug-in that vLLM finds by its entry point, and nothing patched in vLLM.

Outside the band, a request's vision tokens do not exist: layers there run on the text rows of a step, and a text
token's key lies where it would without an image. To read, in this order:

1. `rows.py`: which rows of a step are text, and where their keys lie; numpy alone;
2. `state.py`: hands vLLM attention metadata for those rows, beside its own;
3. `decoder.py`: runs each layer on its rows; `blocks.py`: which blocks of keys requests may share;
4. `models.py`: the models around it; `refusals.py`: what is not served; `plugin.py`: what vLLM calls.
"""
