"""Which weights lie at a path: what a result that is kept must be of, if it is to be used again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import huggingface_hub

from latefusion.models.embedded import WEIGHTS
from latefusion.models.locate import ADAPTER_CONFIG, EMBEDDED

FILES = ("*.safetensors", "*.bin", "config.json", ADAPTER_CONFIG, "*.py")
WHOLE = 2**28  # bytes; of a longer file, so many are read
BLOCK = 2**16  # in pieces of this size, evenly spread, the first and the last among them


def identity(path: str | Path, revision: str | None = None) -> str:
    """A short name of the model at `path`: `embedded`, a folder or a hub id; another if its weights are saved anew.

    Of a folder it is a hash of what its weights and configuration hold, wherever it lies and whenever it was written.
    Of a file beyond 256 MiB its length and so much of its content are read, evenly spread, which takes a fraction of a
    second and which no training or merging leaves as it was. Adapters' name depends on their base's, too. A hub id
    has the name of its commit.

    Raises:
        FileNotFoundError: there is no such model.
    """
    folder = WEIGHTS if str(path) == EMBEDDED else Path(path)
    if not folder.is_dir():
        return _commit(str(path), revision)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in FILES for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _read(file, digest)
    if (folder / ADAPTER_CONFIG).is_file():
        base = json.loads((folder / ADAPTER_CONFIG).read_text())
        digest.update(identity(base["base_model_name_or_path"], base.get("revision")).encode())
    return digest.hexdigest()[:16]


def _read(file: Path, digest: hashlib._Hash) -> None:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= WHOLE:
            while block := content.read(2**20):
                digest.update(block)
            return
        pieces = WHOLE // BLOCK
        for piece in range(pieces):
            content.seek(piece * (size - BLOCK) // (pieces - 1))
            digest.update(content.read(BLOCK))


def _commit(name: str, revision: str | None) -> str:
    held = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(held, str):
        return Path(held).parent.name
    try:
        return str(huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10).sha)
    except Exception as error:  # every way a network, a hub or a name can fail
        raise FileNotFoundError(
            f"no model at {name} ({str(error).strip().splitlines()[0]}); name a folder or a hub id."
        ) from None
