"""Video files: decoded frames against the frames that were written, in every container; damage in one sentence."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.data_rows import ANSWER, turn, write_rows
from helpers.video_files import KINDS, write
from PIL import Image

from latefusion.data import sources
from latefusion.data.bad_rows import Checked, findings
from latefusion.data.videos import BadVideo, load_video


@pytest.mark.parametrize("name", KINDS)
def test_the_frames_shown_are_those_written_at_their_places(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    video = load_video(name, tmp_path, max_frames=5)
    assert video.indices == (0, 7, 14, 22, 29) and video.total == 30 and video.frames.shape == (5, 48, 64, 3)
    assert video.rate == pytest.approx(25)
    tolerance = 0 if name == "lossless.mkv" else 70 if name == "a.gif" else 8
    greys = video.frames[:, 24, 40].astype(int)  # [5, 3]
    assert abs(greys - 8 * np.array(video.indices)[:, None]).max() <= tolerance
    assert video.frames[:, 24, 4].min() > 200
    data = path.read_bytes()
    for source in (data, {"bytes": data, "path": None}):
        assert np.array_equal(load_video(source, max_frames=5).frames, video.frames)
    everything = load_video(path, max_frames=100)
    assert everything.indices == tuple(range(30))


@pytest.mark.parametrize("name", ["lossless.mkv", "a.ts"])
def test_what_lies_between_two_seconds_is_decoded(name: str, tmp_path: Path) -> None:
    """Thirty frames, 25 a second: from 0.4 to 0.8 s they are those from 10 to 20."""
    write(tmp_path / name)
    whole = load_video(name, tmp_path, max_frames=30)
    part = load_video({"path": name, "video_start": 0.4, "video_end": 0.8}, tmp_path, max_frames=3)
    assert (part.indices, part.total) == ((0, 5, 10), 11)
    assert np.array_equal(part.frames, whole.frames[[10, 15, 20]])
    rest = load_video({"path": name, "video_start": 1.1, "video_end": 99}, tmp_path)
    assert np.array_equal(rest.frames, whole.frames[28:])


def test_a_rotated_video_is_shown_upright(tmp_path: Path) -> None:
    """A telephone films sideways and writes how to turn; the matrix of a quarter turn is put into the file by hand."""
    data = bytearray(write(tmp_path / "a.mp4").read_bytes())
    plain = load_video(bytes(data), max_frames=1).frames[0]
    one, none = (1 << 16).to_bytes(4, "big"), bytes(4)
    identity = one + none * 3 + one + none * 3 + (1 << 30).to_bytes(4, "big")
    at = data.index(identity, data.index(b"tkhd"))
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    quarter = none + one + none + minus + none * 4 + (1 << 30).to_bytes(4, "big")
    data[at : at + len(identity)] = quarter
    turned = load_video(bytes(data), max_frames=1).frames[0]
    assert turned.shape == (64, 48, 3)
    assert np.array_equal(turned, np.rot90(plain, -1))  # clockwise: the left edge is on top
    assert turned[4].min() > 200


def test_damaged_files_and_what_is_no_video_are_one_sentence_each(tmp_path: Path) -> None:
    whole, matroska = write(tmp_path / "a.mp4").read_bytes(), write(tmp_path / "a.mkv").read_bytes()
    write(tmp_path / "a.ts")
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    wave = io.BytesIO()
    with av.open(wave, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    files = {
        "cut.mp4": (whole[: len(whole) // 2], "cannot be decoded"),
        "cut.mkv": (matroska[: len(matroska) * 2 // 3], "is cut off"),
        "empty.mp4": (b"", "0 bytes"),
        "note.mp4": (b"hello there" * 50, "cannot be decoded"),
        "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\na.ts\n#EXT-X-ENDLIST\n", "not a video"),
        "list.ffconcat": (b"ffconcat version 1.0\nfile a.mp4\n", "not a video"),
        "still.png": (picture.getvalue(), "not a video"),
        "sound.wav": (wave.getvalue(), "is it sound, a still image or a playlist"),
        "sound.mp4": (sound.getvalue(), "has no moving picture"),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadVideo, match=reason) as error:
            load_video(name, tmp_path)
        assert "\n" not in str(error.value) and name in str(error.value)
    rows = [
        {"id": name, "messages": [turn("user", {"type": "video"}, "?"), ANSWER], "videos": [name]}
        for name in ("a.mp4", *files)
    ]
    path = write_rows(tmp_path, *rows, name="rows.jsonl")
    listed = list(findings(Checked(sources.dataset(path, split="train")), None, workers=0))
    assert listed[0].reason is None and [finding.id for finding in listed[1:]] == list(files)
    assert all(finding.reason.startswith("has a bad video: ") for finding in listed[1:])
    assert json.loads(Path(path).read_text().splitlines()[0])["id"] == "a.mp4"
