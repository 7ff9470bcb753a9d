"""Load an image from any form that a data set stores it in; raise `BadImage` with the reason.

Every command opens its images here: training, evaluation, generation, profile and calibration see the same pixels.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from stat import S_ISCHR, S_ISFIFO
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

from latefusion.data.printing import first_line, short
from latefusion.models.fingerprint import local_path

MAX_PIXELS = 100_000_000  # 300 MB as RGB: beyond it a small file can take a machine's memory
MAX_BYTES = 16 * MAX_PIXELS  # of a file: four channels of 32 bits, uncompressed
# of what is not on this machine
ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def load_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An upright RGB picture, as the processors expect it.

    An animation gives its first frame. EXIF orientation is applied, 16-bit grey is scaled to 8 bits (a plain
    conversion would clip it to white; 32-bit values below 256 stay as they are), transparency is laid on white (as the
    processors of transformers do), CMYK and palettes are converted.

    Args:
        source: a PIL image, bytes, a path (also `file://` and a path), a base64 data URL,
            or `{"bytes", "path"}` as `datasets` stores images.
        folder: paths are relative to it.

    Raises:
        BadImage: missing, empty, truncated, not an image, or larger than `MAX_PIXELS`.
    """
    image, name = _open(source, folder)
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    if pixels == 0:
        raise BadImage(f"{name} has {image.width} x {image.height} pixels")
    try:
        image.load()
        return _on_white(_eight_bits(ImageOps.exif_transpose(image), name))
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise BadImage(f"{name} cannot be decoded ({first_line(error)})") from None


def is_data_url(source: Any) -> bool:
    return isinstance(source, str) and DATA_URL.match(source) is not None


def data_url_bytes(url: str) -> bytes:
    """The bytes of a base64 data URL.

    Raises:
        BadImage: it is not base64.
    """
    header, _, body = url.partition(",")
    try:
        if not header.lower().endswith(";base64"):
            raise ValueError("its header does not end in ;base64")
        return base64.b64decode(b"".join(unquote_to_bytes(body).split()), validate=True)
    except ValueError as error:
        raise BadImage(f"{short(url)} is a data URL that cannot be decoded ({first_line(error)})") from None


def _open(source: Any, folder: Path | None) -> tuple[Image.Image, str]:
    """The image, not decoded yet, and its name for messages."""
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
        if is_data_url(path):
            data, name = data_url_bytes(str(path)), "a data URL"
        elif ADDRESS.match(str(path)):
            raise BadImage(f"{name} is an address; download the image and give its path or bytes")
        else:
            data = _read(local_path(path, folder), name)
    if not isinstance(data, bytes):
        raise BadImage(f"an image is given as {type(data).__name__}, not as a picture, bytes or a path")
    if not data:
        raise BadImage(f"{name} is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data)), name
    except Image.DecompressionBombError:
        raise BadImage(f"{name} has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        what = "is not an image" if isinstance(error, Image.UnidentifiedImageError) else "cannot be decoded"
        raise BadImage(f"{name} {what} ({len(data)} bytes that begin with {data[:8].hex(' ')})") from None


def _read(file: Path, name: str) -> bytes:
    try:
        status = file.stat()
        if S_ISFIFO(status.st_mode) or S_ISCHR(status.st_mode):
            raise ValueError("a pipe or a device")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size:,} bytes, more than {MAX_BYTES:,}")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: one of these, or a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadImage(f"{name} cannot be read ({reason}: {short(file)})") from None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise BadImage(
            f"{name} has floating-point pixels, whose range is not known; store it in 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"{name} has pixels from {values.min()} to {values.max()}; store it in 8 or 16 bits")
    small = image.mode == "I" and values.max() <= 0xFF  # 32 bits a pixel, which hold 8-bit values
    grey = (values.astype(np.uint32) >> (0 if small else 8)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):  # the one grey that is transparent
        grey[values == clear] = 0xFF
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, its transparent parts white."""
    if "transparency" not in image.info and not {"A", "a"} & set(image.getbands()):
        return image.convert("RGB")
    if image.mode == "La":  # from which there is no direct way
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
