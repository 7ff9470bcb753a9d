"""Whatever stands for an image in a data set -> an upright RGB picture, or one sentence why there is none."""

from __future__ import annotations

import io
import re
from pathlib import Path
from stat import S_ISCHR, S_ISFIFO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from latefusion.data.samples import printable

MAX_PIXELS = 100_000_000  # 300 MB as RGB: beyond it a small file can take a machine's memory
MAX_BYTES = 16 * MAX_PIXELS  # of a file: four channels of 32 bits, uncompressed
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:(//|.*;base64,)", re.IGNORECASE)


class BadImage(ValueError):
    """This image cannot be used; the message says why."""


def load_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An image as the processors expect it.

    The first frame of an animation; rotated as its EXIF orientation says; 16-bit grey scaled to 8 bits (a plain
    conversion would clip it to white); CMYK, palettes and transparency converted.

    Args:
        source: a PIL image, bytes, a path, or `{"bytes", "path"}` as `datasets` stores images.
        folder: that paths are relative to.

    Raises:
        BadImage: missing, empty, truncated, no image at all, or larger than `MAX_PIXELS`.
    """
    image, name = _open(source, folder)
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    if pixels == 0:
        raise BadImage(f"{name} has {image.width} x {image.height} pixels")
    try:
        image.load()
        return _eight_bits(ImageOps.exif_transpose(image), name).convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise BadImage(f"{name} cannot be decoded ({_reason(error)})") from None


def _open(source: Any, folder: Path | None) -> tuple[Image.Image, str]:
    if isinstance(source, Image.Image):
        return source, "an image"
    data, path = source, None
    if isinstance(source, dict):
        data, path = source.get("bytes"), source.get("path")
    elif isinstance(source, (str, Path)):
        data, path = None, source
    name = short(path) if path else "an image"
    if data is None:
        if not path:
            raise BadImage("an image has neither bytes nor a path")
        if not isinstance(path, (str, Path)):
            raise BadImage(f"an image has a path that is {type(path).__name__}")
        if ADDRESS.match(str(path)):
            raise BadImage(f"{name} is an address; download the image and give its path or bytes")
        file = (folder or Path()) / path
        try:
            about = file.stat()
            if S_ISFIFO(about.st_mode) or S_ISCHR(about.st_mode):
                raise ValueError("a pipe or a device")
            if about.st_size > MAX_BYTES:
                raise ValueError(f"{about.st_size:,} bytes, more than {MAX_BYTES:,}")
            data = file.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: one of these, or a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadImage(f"{name} cannot be read ({reason}: {short(file)})") from None
    if not isinstance(data, bytes):
        raise BadImage(f"an image is given as {type(data).__name__}, not as a picture, bytes or a path")
    if not data:
        raise BadImage(f"{name} is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data)), name
    except Image.DecompressionBombError:
        raise BadImage(f"{name} has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        what = "is no image" if isinstance(error, Image.UnidentifiedImageError) else "cannot be decoded"
        raise BadImage(f"{name} {what} ({len(data)} bytes that begin with {data[:8].hex(' ')})") from None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise BadImage(
            f"{name} has floating-point pixels, whose range is not known; store it in 8 or 16 bits"
        )
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # the same colours as straight to RGB, without a warning
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"{name} has pixels from {values.min()} to {values.max()}; store it in 8 or 16 bits")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def short(path: Any) -> str:
    """A path for a message; something else in its place, base64 say, may have megabytes."""
    text = printable(str(path))
    return text if len(text) <= 300 else f"{text[:60]}… of {len(text)} characters"


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
