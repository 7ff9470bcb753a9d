"""Small video files in several containers. Needs PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

KINDS = {
    "a.mp4": ("libx264", "yuv420p"),
    "a.mkv": ("libx264", "yuv420p"),
    "a.webm": ("libvpx", "yuv420p"),
    "a.avi": ("mpeg4", "yuv420p"),
    "a.mov": ("libx264rgb", "rgb24"),
    "a.ts": ("mpeg2video", "yuv420p"),
    "lossless.mkv": ("ffv1", "bgr0"),
    "a.gif": ("gif", "rgb8"),
}


def write(path: Path, *, frames: int = 30, rate: int = 25, size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frames are grey, 8 brighter from one to the next, with a white left edge."""
    codec, pixels = KINDS[path.name]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 8 * i, np.uint8)
            picture[:, :16] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
