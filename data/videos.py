"""Load a video from any form that a data set stores it in, as evenly spaced frames; raise `BadVideo` with the reason.

Every command opens its videos here: training, evaluation and generation see the same frames. Files are decoded by PyAV
(`pip install 'latefusion[video]'`); folders and lists of frames need nothing but the image loader.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
UNREAD = ("nframes", "min_frames", "sample_fps")  # settings of one video in other people's loaders
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
        limit: the most frames that any video of the same data shows; `filled` shows as many.
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


@dataclass(frozen=True)
class Choice:
    """Which frames of a video are shown: at most `max_frames`, between two seconds if they are given."""

    max_frames: int
    start: float | None = None
    end: float | None = None

    def part(self, total: int, rate: float, name: str) -> tuple[int, int]:
        """The first frame of the part between the two seconds, and how many it has.

        Raises:
            BadVideo: there is none.
        """
        first = math.ceil((self.start or 0) * rate)
        last = total - 1 if self.end is None else min(math.floor(self.end * rate), total - 1)
        if first > last:
            raise BadVideo(
                f"{name} has no frame from video_start={self.start or 0:g} to video_end={self.end or total / rate:g} "
                f"seconds; it has {total} frames, {rate:g} a second"
            )
        return first, last + 1 - first

    def of(self, n: int) -> list[int]:
        """The frames that are shown of a part of `n`."""
        return evenly(n, min(n, self.max_frames))


def load_video(source: Any, folder: Path | None = None, *, max_frames: int = MAX_FRAMES) -> Video:
    """At most `max_frames` frames of a video, evenly spaced from its first to its last.

    Args:
        source: a file's path, a base64 data URL or bytes; a folder of frames, in the order of their names, numbers by
            value; a list of frames, each as `load_image` takes it; or a mapping that holds one of these (`bytes`,
            `frames`, `video`, `path` or `url`), and maybe `fps` (frames a second, of a folder or a list), `max_frames`
            (of this video; the smaller one counts), `video_start` and `video_end` (seconds; what lies between them
            is the video, and its time begins at 0).
        folder: paths are relative to it.

    Raises:
        BadVideo: missing, empty, damaged, no video, or larger than `MAX_TOTAL`.
        NoDecoder: it is a file, and PyAV is not installed.
    """
    rate, choice = None, Choice(max_frames)
    if isinstance(source, Mapping):
        rate = _positive(source.get("fps"), "fps")
        if unread := next((name for name in UNREAD if source.get(name) is not None), None):
            raise BadVideo(
                f"a video has {unread}={short(source[unread])}, which is not read; give it max_frames"
            )
        own = _positive(source.get("max_frames"), "max_frames") or max_frames
        seconds = [_second(source.get(name), name) for name in ("video_start", "video_end")]
        choice, source = Choice(min(max_frames, max(int(own), 1)), *seconds), inside(source)
    return replace(_loaded(source, folder, rate, choice), limit=max_frames)


def _loaded(source: Any, folder: Path | None, rate: float | None, choice: Choice) -> Video:
    if isinstance(source, list | tuple):
        return _of_frames(source, folder, rate, choice, "a video")
    if isinstance(source, bytes):
        return _decoded(io.BytesIO(source), f"a video of {len(source)} bytes", choice)
    if not isinstance(source, str | os.PathLike) or not str(source):
        kind = "an empty name" if source == "" else "nothing" if source is None else type(source).__name__
        raise BadVideo(f"a video is given as {kind}, not as a file, bytes, a folder or a list of frames")
    if is_data_url(source):
        try:
            return _decoded(io.BytesIO(data_url_bytes(str(source))), "a data URL", choice)
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
                return _decoded(opened, name, choice)
    except (BadVideo, NoDecoder):
        raise
    except (OSError, ValueError) as error:  # ValueError: a pipe, or a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadVideo(f"{name} cannot be read ({reason}: {short(file)})") from None
    return _of_frames(frames, None, rate, choice, f"the folder {name}")


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


def check_limits(family: str, limits: Iterable[int]) -> None:
    """Raise ValueError if videos of these limits cannot be in one batch of the family."""
    few, *many = sorted(set(limits)) or [0]
    if many and family in STACKED:
        raise ValueError(
            f"a model of type {family} takes the videos of a batch as one tensor, so all show equally many frames, not "
            f"{few} and {many[-1]}; give all parts of the data one max_frames."
        )


def video_arguments(videos: Sequence[Video], family: str) -> dict[str, Any]:
    """What a processor is called with to show these videos, in the order of their placeholders; empty for none."""
    if not videos:
        return {}
    check_limits(family, (video.limit for video in videos))
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


def _second(value: Any, name: str) -> Any:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0
    ):
        raise BadVideo(f"a video has {name}={short(value)}; give seconds, 0 or more")
    return value


def _of_frames(
    sources: Sequence[Any], folder: Path | None, rate: float | None, choice: Choice, name: str
) -> Video:
    """The video of a list of frames; only those that are shown are opened."""
    if not sources:
        raise BadVideo(f"{name} has no frames")
    rate = float(rate or FRAME_RATE)
    first, n = choice.part(len(sources), rate, name)
    indices = choice.of(n)
    frames: list[np.ndarray] = []
    for i in indices:
        try:
            frames.append(np.asarray(load_image(sources[first + i], folder)))
        except BadImage as error:
            raise BadVideo(f"{name} has a bad frame {first + i}: {error}") from None
        _check_size(frames[-1].shape, len(indices), name)
    if len(sizes := sorted({frame.shape[1::-1] for frame in frames})) > 1:
        (w, h), (other_w, other_h) = sizes[0], sizes[-1]
        raise BadVideo(f"{name} has frames of different sizes ({w} x {h} and {other_w} x {other_h})")
    return Video(np.stack(frames), tuple(indices), n, rate, choice.max_frames)


def _check_size(shape: tuple[int, ...], n: int, name: str) -> None:
    height, width = shape[:2]
    if height * width * n > MAX_TOTAL:
        raise BadVideo(
            f"{name} has {n} frames of {width} x {height}, more than {MAX_TOTAL:,} pixels; lower max_frames"
        )


def _decoded(file: Any, name: str, choice: Choice) -> Video:
    """The video of an opened file. Bytes are handed to the decoder, never a name that it could take for an address."""
    try:
        import av  # lazy: an extra
    except ImportError:
        raise NoDecoder(NO_DECODER) from None
    try:
        total, rate = _counted(file, name)
        first, n = choice.part(total, rate, name)
        shown, read = _shown(file, [first + i for i in choice.of(n)], name)
        if len(shown) < len(choice.of(n)):
            if read < SHORT * (first + n):
                raise BadVideo(f"{name} is cut off: it has {read} of {total} frames")
            first, n = choice.part(read, rate, name)  # a frame or two fewer than the file says
            shown, _ = _shown(file, [first + i for i in choice.of(n)], name)
    except av.FFmpegError as error:
        if isinstance(error, av.error.ArgumentError):
            raise BadVideo(f"{name} is not a video (is it sound, a still image or a playlist?)") from None
        raise BadVideo(f"{name} cannot be decoded ({error.strerror or first_line(error)})") from None
    return Video(np.stack(shown), tuple(choice.of(n)), n, rate, choice.max_frames)


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
