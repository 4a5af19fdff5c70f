"""What a video file holds, as a player shows it: which frames, from when to when each is on screen, which way up.

Nothing is taken from a header that packets or frames tell better. Many containers announce no number of frames (webm,
mkv, ts, flv, fragmented mp4), many videos have no constant rate, and an edit list hides frames that the file holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from transformers.utils import logging

from ..errors import VideoError
from .display import FIXED_POINT, display_matrix, turned, with_square_pixels
from .frame_times import MILLISECOND, FrameTimes

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = logging.get_logger(__name__)

MICROSECOND = Fraction(1, 1_000_000)
#: What PyAV and Pillow raise for a file that is damaged or no video, next to `av.FFmpegError`.
UNREADABLE = (OSError, ValueError, TypeError, IndexError, ArithmeticError, MemoryError)
#: Seconds to go back, one after the other, in search of a key frame. Few videos have longer distances in between.
SEARCH_BACK = (0, 1, 4, 16, 64)
#: Seconds of decoding after which progress is shown.
PATIENCE = 5.0


class VideoFile:
    """The frames of a file, in the order they are shown. Every pass opens it anew: not every kind can be rewound.

    Args:
        name: What to call the file in an error.
        file: Its path, or the open file.
    """

    def __init__(self, name: str, file: Path | BinaryIO) -> None:
        from av.video.reformatter import VideoReformatter

        self.name = name
        self.file = file
        self._shown_size: tuple[int, int] | None = None
        # A frame's own one is set up anew for every frame.
        self._reformatter = VideoReformatter()

    def frame_times(self, start: float = 0.0, end: float | None = None) -> FrameTimes:
        """When the frames are on screen, found without decoding where packets tell.

        Args:
            start, end: Seconds. Frames that are off screen by `start`, or appear after `end`, may be left out.

        Raises:
            VideoError: The file holds no frame, or less than it announces.
        """
        with self._reading(start or None, others=True) as (container, stream, packets):
            found = self._packet_times(container, stream, packets, start, end)
            tick = MILLISECOND if _is_webp(stream) else _tick(stream)
            rates = (stream.average_rate, stream.base_rate, stream.guessed_rate)
        self._timed_by_packets = found is not None
        starts, last_ends = self._decoded_times() if found is None else found
        if not starts:
            raise VideoError(f"{self.name} holds no frame. Play it in a video player, or record it again.")
        return FrameTimes(np.unique(np.array(starts, np.int64)), last_ends, tick, tuple(filter(None, rates)))

    def frames(self, start: float | None = None) -> Iterator[tuple[int, VideoFrame]]:
        """Frames, each with the tick at which it appears. Call `frame_times` before.

        Args:
            start: Second from which on they are needed: decoding begins at the last key frame before it.

        Raises:
            VideoError: Many packets cannot be decoded. A few are left out, as a player does.
        """
        with self._reading(start if self._timed_by_packets else None) as (container, stream, packets):
            if _is_webp(stream):
                yield from _pictures(self.file)
                return
            from tqdm import tqdm  # transformers needs it.

            seconds = None if container.duration is None else round(container.duration * MICROSECOND)
            with tqdm(
                total=seconds, desc=f"Decoding {self.name}", unit="s", delay=PATIENCE, leave=False, disable=None
            ) as progress:
                for tick, frame in self._timed_frames(container, stream, packets):
                    progress.update(max(0, int(tick * _tick(stream)) - progress.n))
                    yield tick, frame

    def picture(self, frame: VideoFrame) -> np.ndarray:
        """A frame as it is shown: `(height, width, 3)` uint8 RGB with square pixels, turned as the file says."""
        if self._shown_size is None:
            self._shown_size = with_square_pixels(frame.width, frame.height, self._pixel_aspect)
        # The frames of a stream may change their size; a player keeps its window.
        width, height = self._shown_size
        picture = self._reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
        matrix = display_matrix(frame)
        return picture if matrix is None else turned(picture, matrix)

    def description(self) -> dict[str, str]:
        """What was found in the file, for people: container, codec and pixels as they are and as they are shown."""
        with self.opened() as (container, stream):
            codec, streams = stream.codec_context, len(container.streams.video)
            found = {
                "container": f"{container.format.long_name} ({container.format.name})",
                "video": f"{codec.codec.long_name}, stream {stream.index}" + (f" of {streams} videos" * (streams > 1)),
            }
        frame = next((frame for _, frame in self.frames()), None)
        if frame is None:
            raise VideoError(f"No frame of {self.name} can be decoded. Play it in a video player, or re-encode it.")
        height, width, _ = self.picture(frame).shape
        matrix = display_matrix(frame)
        found["pixels"] = f"{frame.width} × {frame.height}, {frame.format.name}, shown as {width} × {height}"
        if self._pixel_aspect not in (None, 0, 1):
            found["pixels"] += f", each {float(self._pixel_aspect):.3g} times as wide as high"
        if matrix is not None:
            a, b, _, c, d = matrix[:5] / FIXED_POINT
            found["pixels"] += f", turned by the matrix ({a:g} {b:g}; {c:g} {d:g})"
        return found

    @contextmanager
    def opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The container and the stream that a player shows.

        Raises:
            VideoError: The file cannot be read as a video, when it is opened or in what is done with it.
        """
        import av

        if not isinstance(self.file, Path):
            self.file.seek(0)
        # Without the protocol, what stands before a colon in a path would be taken for one.
        source = f"file:{self.file}" if isinstance(self.file, Path) else self.file
        try:
            # Tags may be in any encoding.
            with av.open(source, "r", metadata_errors="replace") as container:
                if container.format.name == "tty":
                    # FFmpeg makes pictures of the letters of a text.
                    raise VideoError(f"{self.name} is a text, not a video. Check the path.")
                stream = self._shown_stream(container)
                self._pixel_aspect = stream.sample_aspect_ratio
                yield container, stream
        except VideoError:
            raise
        except (av.FFmpegError, *UNREADABLE) as error:
            raise VideoError(
                f"{self.name} cannot be read as a video ({type(error).__name__}: {error}). It may be damaged or cut "
                "short. Play it in a video player, or re-encode it to an mp4 file with h264 video."
            ) from error

    @contextmanager
    def _reading(
        self, start: float | None, others: bool = False
    ) -> Iterator[tuple[InputContainer, VideoStream, Iterable[Packet]]]:
        """The packets of the stream that is shown, from the last key frame before `start` on, if one is found.

        Args:
            start: Seconds. `None` is the beginning of the file, which need not be a key frame.
            others: Whether the packets of other streams come along.
        """
        if start is not None:
            with self.opened() as (container, stream):
                first = round(start / _tick(stream)) + _zero(container, stream)
                packets = _packets_from(container, stream, first, others)
                if packets is not None:
                    yield container, stream, packets
                    return
        with self.opened() as (container, stream):
            yield container, stream, container.demux() if others else container.demux(stream)

    def _shown_stream(self, container: InputContainer) -> VideoStream:
        """The default stream, else the largest. Cover pictures are no videos."""
        from av.stream import Disposition

        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise VideoError(
                f"{self.name} holds no video stream, but {'a cover picture' if container.streams.video else kinds}. "
                "Check the path."
            )
        streams = [stream for stream in streams if stream.codec_context is not None]
        if not streams:
            raise VideoError(
                f"The codec of the video in {self.name} is not known. Re-encode it to an mp4 file with h264 video."
            )
        return max(streams, key=lambda each: (bool(each.disposition & Disposition.default), each.width * each.height))

    def _packet_times(
        self,
        container: InputContainer,
        stream: VideoStream,
        packets: Iterable[Packet],
        start: float,
        end: float | None,
    ) -> tuple[array[int], int] | None:
        """Ticks at which frames start, and at which the last one ends; `None` if the packets do not tell."""
        if _is_webp(stream) or _is_avi(container):
            return None
        zero, tick = _zero(container, stream), _tick(stream)
        starts, last, last_ends, data_ends = array("q"), None, 0, Fraction(0)
        decoded_at: int | None = None
        for packet in packets:
            if packet.pts is not None:
                data_ends = max(data_ends, (packet.pts + (packet.duration or 0)) * _tick(packet))
            if packet.stream is not stream or not packet.size:
                continue
            if packet.pts is None or (decoded_at is not None and packet.dts is not None and packet.dts < decoded_at):
                return None  # Times are missing, or begin anew in the middle, as in joined recordings.
            decoded_at = decoded_at if packet.dts is None else packet.dts
            if not packet.is_discard:  # Hidden by an edit list.
                starts.append(packet.pts - zero)
                # Durations of mp4 are those of decoding: only behind the last frame are they of use.
                if last is None or packet.pts > last:
                    last, last_ends = packet.pts, packet.pts - zero + (packet.duration or 1)
            # What follows is decoded later, and shown later still.
            if starts and end is not None and decoded_at is not None and (decoded_at - zero) * tick > end:
                last_ends = decoded_at - zero + 1
                break
        else:
            # Some formats count from the first frame, some from 0: the shorter is taken.
            announced = (container.duration or 0) * MICROSECOND
            # The index of an mp4 file tells where each frame lies.
            index_ends = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            self._refuse_a_part(data_ends, announced, is_part=0 < container.size < index_ends)
        if start or end is not None:
            # Around a window, some frames are missing: those shown before the first key frame, or decoded later.
            starts = array("q", (at for at in starts if starts[0] <= at < last_ends))
        return starts, last_ends

    def _decoded_times(self) -> tuple[array[int], int]:
        """As `_packet_times`, by decoding everything."""
        starts, last_ends = array("q"), 0
        for tick, frame in self.frames():
            last_ends = tick + (tick - starts[-1] if starts else frame.duration or 1)
            starts.append(tick)
        with self.opened() as (_, stream):
            if stream.frames and stream.average_rate:
                self._refuse_a_part(last_ends * _tick(stream), stream.frames / stream.average_rate)
        return starts, last_ends

    def _refuse_a_part(self, found: Fraction | int, announced: Fraction | int, is_part: bool = False) -> None:
        """Raises an error for the beginning of a longer file, as a broken download leaves it.

        Args:
            found, announced: Seconds that were found, and that the header gives. Many headers are a little wrong.
        """
        missing = announced - found
        if is_part or (missing > 1 and missing > announced / 20):
            raise VideoError(
                f"{self.name} is cut short: {float(announced):.1f} s were expected, {float(found):.1f} s are there. "
                "Download or record it again, or re-encode what is left of it."
            )

    def _timed_frames(
        self, container: InputContainer, stream: VideoStream, packets: Iterable[Packet]
    ) -> Iterator[tuple[int, VideoFrame]]:
        zero = _zero(container, stream) if self._timed_by_packets else None
        for tick, frame in _in_time(self._decoded(packets), attrgetter("dts" if _is_avi(container) else "pts")):
            zero = tick if zero is None else zero
            yield tick - zero, frame

    def _decoded(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
        import av

        decoded = undecodable = 0
        for packet in packets:
            try:
                frames = packet.decode()
            except av.FFmpegError:
                # A recording of a broadcast begins anywhere: nothing can be decoded before its first key frame.
                undecodable += bool(decoded)
                continue
            decoded += len(frames)
            yield from frames
        if undecodable > decoded / 9:
            raise VideoError(
                f"{self.name} is damaged: {undecodable} of {undecodable + decoded} frames could not be decoded. "
                "Download or record it again, or re-encode it."
            )
        if undecodable:
            logger.warning(f"{self.name}: {undecodable} frames are damaged and were left out, {decoded} were decoded.")


def _is_webp(stream: VideoStream) -> bool:
    """Of an animated webp file, FFmpeg reads nothing or the first frame; Pillow reads all."""
    return stream.codec_context.name == "webp"


def _is_avi(container: InputContainer) -> bool:
    """AVI holds no presentation times, and those that FFmpeg makes up for it are out of order."""
    return "avi" in container.format.name


def _tick(part: VideoStream | Packet) -> Fraction:
    assert part.time_base is not None, "whatever a demuxer returns has one"
    return part.time_base


def _zero(container: InputContainer, stream: VideoStream) -> int:
    """The time stamp, in ticks of the stream, at which a player's clock shows 0: broadcasts begin at any hour."""
    starts = [] if stream.start_time is None else [stream.start_time]
    if container.start_time is not None:
        starts.append(round(container.start_time * MICROSECOND / _tick(stream)))
    return min(starts, default=0)


def _packets_from(container: InputContainer, stream: VideoStream, first: int, others: bool) -> Iterator[Packet] | None:
    """Packets from the last key frame at or before a time stamp on; `None` if none is found: then open it anew."""
    import av

    for back in SEARCH_BACK:
        place = first - round(back / _tick(stream))
        if place <= (stream.start_time or 0):
            return None
        try:
            container.seek(place, stream=stream)
        except av.FFmpegError:
            return None
        packets = container.demux() if others else container.demux(stream)
        # Not every container knows where its key frames are: the place found may lie behind the last one.
        key = next((packet for packet in packets if packet.stream is stream and packet.is_keyframe), None)
        if key is not None and key.pts is not None and key.pts <= first:
            return chain([key], packets)
    return None


def _in_time(
    frames: Iterable[VideoFrame], time_of: Callable[[VideoFrame], int | None]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with ascending times. Where one is missing or runs backwards, the frame before it stays as usual."""
    last, stay = None, 1
    for frame in frames:
        tick = time_of(frame)
        if last is None:
            tick, stay = tick or 0, frame.duration or 1
        else:
            tick = tick if tick is not None and tick > last else last + stay
            stay = tick - last
        yield tick, frame
        last = tick


def _pictures(file: Path | BinaryIO) -> Iterator[tuple[int, VideoFrame]]:
    """The frames of an animated picture, timed in milliseconds."""
    from av import VideoFrame
    from PIL import Image

    if not isinstance(file, Path):
        file.seek(0)
    tick = 0
    with Image.open(file) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            yield tick, VideoFrame.from_image(image.convert("RGB"))
            tick += image.info.get("duration") or 100
