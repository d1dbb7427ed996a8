"""Video files in and out through PyAV: evenly sampled frames, damage reported, encoded files written whole.

PyAV is an optional dependency (``pip install 'vidops[demo]'``) and imported by the functions that need it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vidops.evaluation import MissingDependencyError

Frames = npt.NDArray[np.uint8]

# Frames larger than this in either direction are a wrong header or an attack, not a video to segment.
MAX_SIDE = 16_384
ENCODERS = ("libx264", "mpeg4")


class VideoError(ValueError):
    """A video that cannot be used; the text is one line that starts with its path."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path = os.fspath(path)
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


@dataclass(frozen=True)
class Video:
    """Sampled frames of a file.

    `frames` (T, H, W, 3) uint8 RGB; `indices` (T,) int64 of the file's decoded frames; `times` (T,) float64 in
    seconds; `source_size` is (height, width) as shown, rotation applied; `decoded` counts all frames of the file;
    `damage` lists what a tolerant read passed over.
    """

    path: str
    frames: Frames
    indices: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    source_size: tuple[int, int]
    rate: float
    decoded: int
    codec: str
    container: str
    damage: tuple[str, ...] = ()


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("reading and writing video needs PyAV: pip install 'vidops[demo]'") from error
    return av


@dataclass
class _Scan:
    """What one pass over the file saw."""

    times: list[float] = field(default_factory=list)
    errors: int = 0
    corrupt: int = 0
    first_error: str = ""


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())


def _decoded(av: ModuleType, container: Any, stream: Any, scan: _Scan) -> Iterator[Any]:
    """All frames that decode. A packet that fails is counted and the next one tried, as players do."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except av.error.FFmpegError as error:
            scan.errors += 1
            scan.first_error = scan.first_error or _reason(error)
            continue
        yield from frames


def _open(av: ModuleType, path: str) -> tuple[Any, Any]:
    if not os.path.exists(path):
        raise VideoError(path, "no such file")
    if os.path.isdir(path):
        raise VideoError(path, "is a directory, expected a video file")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise VideoError(path, "the file is empty")
    try:
        container = av.open(path)
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise VideoError(path, f"not a video that FFmpeg can open ({_reason(error)})") from error
    streams = [s for s in container.streams.video if s.codec_context is not None]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no stream"
        container.close()
        raise VideoError(path, f"no video stream that can be decoded (found: {kinds})")
    stream = streams[0]
    stream.thread_type = "AUTO"
    return container, stream


def _promised_end(container: Any, stream: Any) -> float | None:
    """Seconds at which the stream should end by its own header, or None when nothing reliable is stated."""
    if stream.duration and stream.time_base:
        start = stream.start_time or 0
        return float((start + stream.duration) * stream.time_base)
    # The container's duration is that of its longest stream, which may be sound.
    if container.duration and len(container.streams) == 1:
        return ((container.start_time or 0) + container.duration) / 1_000_000
    return None


def _damage(scan: _Scan, promised: int, end: float | None, rate: float) -> list[str]:
    found = []
    decoded = len(scan.times)
    if scan.errors:
        found.append(f"{scan.errors} packets do not decode ({scan.first_error})")
    if scan.corrupt:
        found.append(f"{scan.corrupt} frames are marked corrupt")
    # Edit lists and encoder delay make honest files a frame or two short.
    if promised and decoded < promised - max(2, promised // 50):
        found.append(f"{decoded} frames decode of {promised} that the file promises")
    elif not promised and end is not None and decoded:
        last = scan.times[-1] + 1 / rate
        if last < 0.9 * end - 2 / rate:
            found.append(f"frames end at {last:.2f} s of {end:.2f} s that the file promises")
    return found


def _even(count: int, wanted: int | None) -> npt.NDArray[np.int64]:
    if wanted is None or wanted >= count:
        return np.arange(count, dtype=np.int64)
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def fit_within(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(height, width) scaled down so that the longer side is at most `longest`; both even and at least 2."""
    factor = min(1.0, longest / max(size))
    height, width = (max(2, round(side * factor / 2) * 2) for side in size)
    return height, width


def _rgb(frame: Any, longest: int) -> Frames:
    """RGB of a frame, scaled by area averaging, turned upright."""
    height, width = fit_within((frame.height, frame.width), longest)
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def read_video(
    path: str | os.PathLike[str],
    *,
    max_frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    longest: int = 854,
    allow_damaged: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Video:
    """Read up to `max_frames` evenly spaced frames of the first video stream.

    The file is decoded twice, because containers promise frame counts they do not keep: the first pass counts and
    checks, the second keeps the chosen frames, so that memory grows with `max_frames` and not with the video.

    Args:
        path: any file that FFmpeg opens.
        max_frames: number of frames to keep, all by default.
        start, end: seconds from the first frame; frames with start <= t < end are sampled.
        longest: frames are scaled down until their longer side is at most this.
        allow_damaged: return what decodes of a damaged or short file, its problems in `Video.damage`.
        progress: called with the number of frames decoded so far, over both passes.

    Raises:
        VideoError: no such file, not a video, nothing decodes, nothing between start and end, frames of changing
            size, and, without `allow_damaged`, any damage: packets that do not decode, frames marked corrupt, or
            clearly fewer frames than the header promises.
        MissingDependencyError: PyAV is not installed.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
    if not 0 <= start < float("inf") or (end is not None and not end > start):
        raise ValueError(f"start, end: expected 0 <= start < end, got {start} and {end}")
    av = _pyav()
    path = os.fspath(path)
    scan = _Scan()
    seen = 0

    container, stream = _open(av, path)
    with container:
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        promised, stop = stream.frames, _promised_end(container, stream)
        codec, kind = stream.codec_context.name, container.format.name
        for frame in _decoded(av, container, stream, scan):
            if not (0 < frame.width <= MAX_SIDE and 0 < frame.height <= MAX_SIDE):
                raise VideoError(path, f"frame of {frame.width}x{frame.height} pixels")
            scan.corrupt += bool(frame.is_corrupt)
            scan.times.append(len(scan.times) / rate if frame.time is None else float(frame.time))
            seen += 1
            if progress is not None:
                progress(seen)
    if not scan.times:
        raise VideoError(path, f"no frame decodes{f' ({scan.first_error})' if scan.first_error else ''}")
    damage = _damage(scan, promised, stop, rate)
    if damage and not allow_damaged:
        raise VideoError(path, f"damaged: {'; '.join(damage)} (--allow-damaged uses what is left)")

    times = np.asarray(scan.times) - scan.times[0]
    inside = np.flatnonzero((times >= start) & (times < (np.inf if end is None else end)))
    if not len(inside):
        raise VideoError(path, f"no frame from {start:g} s on; the video is {times[-1] + 1 / rate:.2f} s long")
    chosen = inside[_even(len(inside), max_frames)]
    wanted = set(chosen.tolist())

    frames: list[Frames] = []
    size = (0, 0)
    container, stream = _open(av, path)
    with container:
        for i, frame in enumerate(_decoded(av, container, stream, _Scan())):
            if i in wanted:
                frames.append(_rgb(frame, longest))
                upright = (frame.height, frame.width)
                size = upright if round(frame.rotation / 90) % 2 == 0 else upright[::-1]
                if frames[-1].shape != frames[0].shape:
                    raise VideoError(path, f"the frame size changes within the video (frame {i})")
            if progress is not None:
                progress(seen + i + 1)
            if i >= chosen[-1]:
                break
    if len(frames) != len(chosen):
        raise VideoError(path, f"{len(frames)} of {len(chosen)} chosen frames decode in the second pass")
    return Video(
        path, np.stack(frames), chosen, times[chosen], size, rate, len(scan.times), codec, kind, tuple(damage)
    )


def write_video(path: str | os.PathLike[str], frames: Sequence[Frames] | Frames, rate: float) -> str:
    """Encode RGB frames (T, H, W, 3) uint8 with even H and W to an MP4 file; returns the encoder's name.

    The encoder is the first of `ENCODERS` that this build of FFmpeg has. The caller chooses a temporary `path` and
    renames it when all is well. Raises OSError when the file cannot be written.
    """
    av = _pyav()
    height, width = frames[0].shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"frames: expected even height and width, got {height}x{width}")
    name = next((n for n in ENCODERS if n in av.codecs_available), None)
    if name is None:
        raise MissingDependencyError(f"this build of PyAV has none of the encoders {', '.join(ENCODERS)}")
    # MPEG-4 part 2 stores the rate's denominator in 16 bits.
    ticks = Fraction(rate).limit_denominator(1000)
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream(name, rate=max(ticks, Fraction(1, 10)))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if name == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            stream.bit_rate = 4_000_000
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return name
