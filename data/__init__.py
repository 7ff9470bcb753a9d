"""Data, from files to batches.

Reading order: sources (rows of files, folders, the hub) -> samples (a record as a checked conversation) -> images ->
collate (a batch with labels) -> bad_rows (rows that cannot be used). Then load (what a configuration names, mixtures),
streaming, turns and packing (several questions or samples in a row), prompts and draw (rows to ask and to measure on).
"""
