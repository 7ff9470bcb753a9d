"""Load a video from any form that a data set stores it in, as evenly spaced frames; raise `BadVideo` with the reason.

Every command opens its videos here: training, evaluation and generation see the same frames. Files are decoded by PyAV
(`pip install 'latefusion[video]'`); folders and lists of frames need nothing but the image loader.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISCHR, S_ISFIFO
from typing import Any

import numpy as np

from latefusion.data.images import ADDRESS, MAX_PIXELS, BadImage, data_url_bytes, is_data_url, load_image
from latefusion.data.printing import first_line, short
from latefusion.models.fingerprint import fingerprint, frames_of_folder, local_path
from latefusion.models.locate import readable

MAX_FRAMES = 16  # shown of a video where nothing else is said
MAX_TOTAL = 4 * MAX_PIXELS  # pixels of all frames that are shown: 1.2 GB as RGB
FRAME_RATE = 2.0  # of folders and lists of frames that do not say theirs; qwen-vl-utils takes the same
LATE = 0.5  # of a file's duration: one whose pictures end before that is damaged; its sound may be longer
SHORT = 0.9  # a file that holds a smaller share of the frames that it promises is damaged
CONTAINERS = (  # that may be opened: playlists, which name other files and addresses, may not
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,live_flv,asf,gif,apng,"
    "h264,hevc,m4v,mxf,nut,ivf,rm,vob,dv,obu,av1"
)
NO_DECODER = "video files are decoded by PyAV, which is not here: pip install 'latefusion[video]'"


class BadVideo(ValueError):
    """A video that cannot be used; the message is the reason."""


class NoDecoder(ValueError):
    """A video file is to be decoded, and PyAV is not installed."""


STACKED = ("internvl", "llava_onevision", "smolvlm")  # families that take the videos of a batch as one tensor
FAMILIES = ("qwen2_5_vl", "qwen3_vl", *STACKED)  # whose videos tests/video shows to be exact
TIMES = "second_per_grid_ts"  # a model input that is no pixel: rounded to bfloat16 it would move positions


@dataclass(frozen=True)
class Video:
    """The frames of a video that are shown.

    Attributes:
        frames: uint8 `[F, H, W, 3]`, RGB, upright.
        indices: where they stand in the video, from 0.
        total: frames of the whole video.
        rate: frames a second of the whole video.
        limit: the most frames that were to be shown.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    total: int
    rate: float
    limit: int

    def filled(self) -> Video:
        """The video with exactly `limit` frames: one that has fewer shows some again, evenly.

        For models that take the videos of a batch as one tensor: what a row gives must not depend on its batch.
        """
        at = evenly(len(self.indices), self.limit)
        return Video(self.frames[at], tuple(self.indices[i] for i in at), self.total, self.rate, self.limit)

    def fingerprint(self) -> str:
        """Hash of the frames that are shown, and of their times."""
        about = [self.frames.shape, self.indices, self.total, self.rate]
        return fingerprint(about, np.ascontiguousarray(self.frames).tobytes())

    def metadata(self) -> dict[str, Any]:
        """The metadata of a video in the form that transformers' video processors take."""
        return {
            "total_num_frames": self.total,
            "fps": self.rate,
            "duration": self.total / self.rate,
            "frames_indices": list(self.indices),
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
        }


def load_video(source: Any, folder: Path | None = None, *, max_frames: int = MAX_FRAMES) -> Video:
    """At most `max_frames` frames of a video, evenly spaced from its first to its last.

    Args:
        source: a file's path, a base64 data URL or bytes; a folder of frames, in the order of their names, numbers by
            value; a list of frames, each as `load_image` takes it; or a mapping that holds one of these (`bytes`,
            `frames`, `video`, `path` or `url`), and maybe `fps` (frames a second, of a folder or a list) and
            `max_frames` (of this video; the smaller one counts).
        folder: paths are relative to it.

    Raises:
        BadVideo: missing, empty, damaged, no video, or larger than `MAX_TOTAL`.
        NoDecoder: it is a file, and PyAV is not installed.
    """
    rate: Any = None
    if isinstance(source, Mapping):
        rate = source.get("fps")
        max_frames = min(max_frames, _positive(source.get("max_frames"), "max_frames") or max_frames)
        source = inside(source)
    rate = _positive(rate, "fps")
    if isinstance(source, list | tuple):
        return _of_frames(source, folder, rate, max_frames, "a video")
    if isinstance(source, bytes):
        return _decoded(io.BytesIO(source), f"a video of {len(source)} bytes", max_frames)
    if not isinstance(source, str | os.PathLike) or not str(source):
        kind = "an empty name" if source == "" else "nothing" if source is None else type(source).__name__
        raise BadVideo(f"a video is given as {kind}, not as a file, bytes, a folder or a list of frames")
    if is_data_url(source):
        try:
            return _decoded(io.BytesIO(data_url_bytes(str(source))), "a data URL", max_frames)
        except BadImage as error:
            raise BadVideo(str(error)) from None
    name = short(source)
    if ADDRESS.match(str(source)):
        raise BadVideo(f"{name} is an address; download the video and give its path or bytes")
    file = local_path(source, folder)
    try:
        if file.is_dir():
            frames = frames_of_folder(file)
        else:
            status = file.stat()
            if S_ISFIFO(status.st_mode) or S_ISCHR(status.st_mode):
                raise ValueError("a pipe or a device")
            if not status.st_size:
                raise ValueError("0 bytes")
            with file.open("rb") as opened:
                return _decoded(opened, name, max_frames)
    except (BadVideo, NoDecoder):
        raise
    except (OSError, ValueError) as error:  # ValueError: a pipe, or a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadVideo(f"{name} cannot be read ({reason}: {short(file)})") from None
    return _of_frames(frames, None, rate, max_frames, f"the folder {name}")


def inside(source: Mapping[str, Any]) -> Any:
    """What holds the frames in a mapping; None if nothing does (Arrow fills keys that a row does not use with None)."""
    values = (source.get(name) for name in ("bytes", "frames", "video", "path", "url"))
    return next((value for value in values if value is not None), None)


def evenly(total: int, n: int) -> list[int]:
    """`n` of `total` frames, evenly spaced from the first to the last; some again if there are fewer."""
    return np.linspace(0, total - 1, n).round().astype(int).tolist()


def unreadable(family: str) -> str:
    """Why a model of this type is not shown videos; empty if it is."""
    if family in FAMILIES:
        return ""
    return f"a model of type {family or 'unknown'} is shown no videos; use one of {', '.join(FAMILIES)}"


def unreadable_by(path: str, **place: Any) -> str:
    """Why the model at a path (`load_base`) is not shown videos; empty if it is. `place`: its revision, say."""
    from transformers import AutoConfig  # lazy: a bad video is refused without it

    return unreadable(AutoConfig.from_pretrained(readable(path), **place).model_type)


def video_arguments(videos: Sequence[Video], family: str) -> dict[str, Any]:
    """What a processor is called with to show these videos, in the order of their placeholders; empty for none."""
    if not videos:
        return {}
    shown = [video.filled() for video in videos] if family in STACKED else list(videos)
    return {
        "videos": [video.frames for video in shown],
        "video_metadata": [video.metadata() for video in shown],
        "do_sample_frames": False,
    }


def _positive(value: Any, name: str) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise BadVideo(f"a video has {name}={short(value)}; give a number above 0")
    return value


def _of_frames(
    sources: Sequence[Any], folder: Path | None, rate: float | None, max_frames: int, name: str
) -> Video:
    """The video of a list of frames; only those that are shown are opened."""
    if not sources:
        raise BadVideo(f"{name} has no frames")
    indices = evenly(len(sources), min(len(sources), max_frames))
    frames: list[np.ndarray] = []
    for i in indices:
        try:
            frames.append(np.asarray(load_image(sources[i], folder)))
        except BadImage as error:
            raise BadVideo(f"{name} has a bad frame {i}: {error}") from None
        _check_size(frames[-1].shape, len(indices), name)
    if len(sizes := sorted({frame.shape[1::-1] for frame in frames})) > 1:
        (w, h), (other_w, other_h) = sizes[0], sizes[-1]
        raise BadVideo(f"{name} has frames of different sizes ({w} x {h} and {other_w} x {other_h})")
    return Video(np.stack(frames), tuple(indices), len(sources), float(rate or FRAME_RATE), max_frames)


def _check_size(shape: tuple[int, ...], n: int, name: str) -> None:
    height, width = shape[:2]
    if height * width * n > MAX_TOTAL:
        raise BadVideo(
            f"{name} has {n} frames of {width} x {height}, more than {MAX_TOTAL:,} pixels; lower max_frames"
        )


def _decoded(file: Any, name: str, max_frames: int) -> Video:
    """The video of an opened file. Bytes are handed to the decoder, never a name that it could take for an address."""
    try:
        import av  # lazy: an extra
    except ImportError:
        raise NoDecoder(NO_DECODER) from None
    try:
        total, rate = _counted(file, name)
        indices = evenly(total, min(total, max_frames))
        shown, read = _shown(file, indices, name)
        if read < SHORT * total and len(shown) < len(indices):
            raise BadVideo(f"{name} is cut off: it has {read} of {total} frames")
        if len(shown) < len(indices):  # a frame or two fewer than the file says
            total = read
            indices = evenly(total, min(total, max_frames))
            shown, _ = _shown(file, indices, name)
    except av.FFmpegError as error:
        if isinstance(error, av.error.ArgumentError):
            raise BadVideo(f"{name} is not a video (is it sound, a still image or a playlist?)") from None
        raise BadVideo(f"{name} cannot be decoded ({error.strerror or first_line(error)})") from None
    return Video(np.stack(shown), tuple(indices), total, rate, max_frames)


def _opened(file: Any) -> Any:
    import av  # lazy: an extra

    file.seek(0)  # the decoder takes containers of videos alone, no still images and no playlists
    return av.open(file, options={"format_whitelist": CONTAINERS})


def _counted(file: Any, name: str) -> tuple[int, float]:
    """The number of frames that a file says it has, or of its packets, and its frames a second."""
    import av  # lazy: an extra

    with _opened(file) as container:
        if not container.streams.video:
            raise BadVideo(f"{name} has no moving picture")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or FRAME_RATE)
        total = stream.frames
        if not total:  # the container does not say: packets are counted, which decodes nothing
            times = [packet.pts for packet in container.demux(stream) if packet.size]
            total, end = len(times), max(filter(None, times), default=0) * float(stream.time_base or 0)
            if container.duration and end < LATE * container.duration / av.time_base:
                raise BadVideo(
                    f"{name} is cut off: it ends after {end:.1f} of {container.duration / av.time_base:.1f} seconds"
                )
    if not total:
        raise BadVideo(f"{name} has no frames")
    return total, rate


def _shown(file: Any, indices: Sequence[int], name: str) -> tuple[list[np.ndarray], int]:
    """The frames of these numbers, as far as there are, and how many were decoded to come by them."""
    numbers, shown, read = set(indices), [], 0
    with _opened(file) as container:
        for frame in container.decode(video=0):
            if read in numbers:
                _check_size((frame.height, frame.width), len(indices), name)
                turns = round(frame.rotation / 90)  # counterclockwise, to be upright
                shown.append(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            read += 1
            if read > indices[-1]:
                break
    return shown, read
