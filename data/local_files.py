"""Check that the local files and folders that `data=...` names exist, before anything is read (without torch)."""

from __future__ import annotations

from pathlib import Path

from latefusion.data.easy_vqa import package_folder
from latefusion.data.icons.pictures import check_drawings
from latefusion.recipes.schema import QUESTION_SETS, DataConfig, Source

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
JSON = (".json", ".jsonl")


def check_local_files(data: DataConfig) -> None:
    """Raise FileNotFoundError or ValueError if `data` names a local file or folder that cannot be read.

    Hub ids are not looked up.
    """
    if data.eval_path is not None:
        check_dataset(data.eval_path, key="data.eval_path")
    if data.source is Source.icons:
        check_drawings()
    if data.source is Source.easy_vqa:
        package_folder()
    for part in data.parts if data.source is Source.mixture else [data]:
        if part.source in QUESTION_SETS or part.path is None:
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


def check_questions_file(path: str, key: str = "data") -> None:
    """Raise FileNotFoundError if there is no file of questions at `path`."""
    if path in [source.value for source in QUESTION_SETS] and not Path(path).exists():
        raise FileNotFoundError(f"{key}={path} is a question set, not a file; ask it with tasks=[{path}].")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no questions at {path}; name a JSONL file with {key}=FILE.")


def check_dataset(path: str, key: str = "data.path") -> None:
    """Raise FileNotFoundError if `path` looks like a local file or folder and cannot be read; it may be a hub id."""
    if not path.strip():
        raise ValueError(f"{key} is empty; name the data with {key}=FILE_FOLDER_OR_HUB_ID.")
    suffixes = (*FORMATS, *JSON)
    if Path(path).is_file() and Path(path).suffix not in suffixes:
        raise FileNotFoundError(
            f"{key}={path} does not end in {', '.join(suffixes)}; store the data as one of these."
        )
    local = path.startswith((".", "/", "~")) or Path(path).suffix in suffixes
    if local and not Path(path).exists():
        raise FileNotFoundError(
            f"no file or folder at {path}; name the data with {key}=FILE_FOLDER_OR_HUB_ID."
        )
