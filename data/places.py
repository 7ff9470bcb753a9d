"""Files and folders that `data=...` names: whether they are there, said before anything is read."""

from __future__ import annotations

from pathlib import Path

from latefusion.recipes.schema import DataConfig, Source

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
JSON = (".json", ".jsonl")


def check_places(data: DataConfig) -> None:
    """Raise, in one sentence, where data on this machine are named that are not there or cannot be read.

    A hub id is left to the hub.
    """
    if data.eval_path is not None:
        check_dataset(data.eval_path, key="data.eval_path")
        if Path(data.eval_path).suffix in JSON:
            raise ValueError(
                f"data.eval_path={data.eval_path} is JSON, and takes a saved data set, parquet or arrow; leave it out "
                f"and run python eval/evaluate.py checkpoint=FOLDER data={data.eval_path} after training."
            )
    for part in data.parts if data.source is Source.mixture else [data]:
        if part.source is Source.scenes or part.path is None:
            continue
        if part.source is Source.llava:
            check_conversations(part.path)
        else:
            check_dataset(part.path)
        if part.images is not None:
            check_images(part.images)


def check_conversations(path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no conversation file at {path}; download it there, or name yours: data.path=FILE."
        )


def check_images(folder: str) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"no image folder at {folder}; download the images there, or name yours: data.images=FOLDER."
        )


def check_dataset(path: str, key: str = "data.path") -> None:
    """What looks like a file or a folder of this machine must be one that can be read; else it may be a hub id."""
    known = (*FORMATS, *JSON)
    if Path(path).is_file() and Path(path).suffix not in known:
        raise FileNotFoundError(
            f"{key}={path} does not end in {', '.join(known)}; store the data as one of these."
        )
    local = path.startswith((".", "/", "~")) or Path(path).suffix in known
    if local and not Path(path).exists():
        raise FileNotFoundError(
            f"no file or folder at {path}; name the data with {key}=FILE_FOLDER_OR_HUB_ID."
        )
