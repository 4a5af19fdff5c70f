"""Files as people have them, made by ffmpeg: read as ffprobe and ffmpeg's own decoding say that they play."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparrow_hf.errors import VideoError
from sparrow_hf.video import read_video

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg makes the files, and is not installed"),
]

MOVING = "-f lavfi -i testsrc2=s={size}:r={rate}:d={seconds}"
SOUND = "-f lavfi -i sine=d={seconds}"
H264 = "-c:v libx264 -pix_fmt yuv420p -g 12"
#: Seconds at which a recording of a screen shows something new.
SCREEN = "select='not(mod(n\\,7))+between(n\\,20\\,34)',setpts=N*0+PTS"

#: Name of the file → how ffmpeg makes it: size, rate and seconds of the source, whether there is sound, options, and
#: for what is made in two steps, the options of the second.
FILES: dict[str, tuple[str, str, float, bool, str, str]] = {}


def add(
    name: str, options: str, then: str = "", size: str = "96x64", rate: str = "8", seconds: float = 4, sound=False
):
    FILES[name] = (size, rate, seconds, sound, options, then)


# Containers.
for suffix, options in {
    "mp4": H264,
    "mov": H264,
    "mkv": H264,
    "webm": "-c:v libvpx-vp9 -b:v 300k",
    "ts": H264,
    "m2ts": H264,
    "flv": H264,
    "avi": "-c:v mpeg4 -q:v 3",
    "mpg": "-c:v mpeg2video -q:v 3",
    "gif": "",
    "ogv": "-c:v libtheora -q:v 7",
    "wmv": "-c:v wmv2 -q:v 3",
    "3gp": "-c:v mpeg4 -q:v 3",
    "nut": "-c:v ffv1",
    "h264": H264,
    "mjpeg": "-c:v mjpeg -q:v 3",
    "apng": "-f apng",
}.items():
    add(f"container.{suffix}", options, rate="25" if suffix in ("mpg", "h264", "mjpeg") else "8")
    if suffix in ("mp4", "mov", "mkv", "ts", "flv", "avi", "mpg", "wmv"):
        add(f"sound.{suffix}", options, rate="25", sound=True)
add("sound.webm", "-c:v libvpx-vp9 -b:v 300k -c:a libopus", sound=True, rate="30")
add("fragmented.mp4", f"{H264} -movflags frag_keyframe+empty_moov", sound=True)
add("fragmented-default.mp4", f"{H264} -movflags frag_keyframe+empty_moov+default_base_moof -bf 0", sound=True)
add("faststart.mp4", f"{H264} -movflags faststart", sound=True)
add("live.mkv", f"{H264} -live 1")

# Codecs and pixels.
for name, options in {
    "hevc.mp4": "-c:v libx265 -x265-params log-level=none",
    "hevc10.mkv": "-c:v libx265 -pix_fmt yuv420p10le -x265-params log-level=none",
    "open-gop.mkv": "-c:v libx265 -x265-params open-gop=1:keyint=10:log-level=none",
    "av1.mkv": "-c:v libsvtav1 -preset 10",
    "av1.mp4": "-c:v libaom-av1 -cpu-used 8 -b:v 200k",
    "vp8.webm": "-c:v libvpx -b:v 300k",
    "vp8-alternate.webm": "-c:v libvpx -b:v 300k -auto-alt-ref 1 -lag-in-frames 16",
    "h264-10.mp4": "-c:v libx264 -pix_fmt yuv420p10le",
    "h264-444.mp4": "-c:v libx264 -pix_fmt yuv444p",
    "rgb.mkv": "-c:v libx264rgb -pix_fmt rgb24 -qp 5",
    "gray.mp4": "-c:v libx264 -pix_fmt gray",
    "prores.mov": "-c:v prores_ks",
    "prores-alpha.mov": "-vf format=yuva444p10le -c:v prores_ks -profile:v 4444",
    "alpha.webm": "-vf format=yuva420p -c:v libvpx-vp9 -b:v 300k",
    "alpha.mov": "-vf format=argb -c:v qtrle",
    "png.mov": "-vf format=rgba -c:v png",
    "huffyuv.avi": "-c:v huffyuv",
    "mpeg4-b.avi": "-c:v mpeg4 -bf 2 -q:v 3",
    "mpeg4-b.mkv": "-c:v mpeg4 -bf 2 -q:v 3",
    "b-pyramid.mp4": "-c:v libx264 -bf 6 -pix_fmt yuv420p -x264-params b-pyramid=normal",
    "interlaced.ts": "-c:v mpeg2video -flags +ilme+ildct -q:v 3 -top 1",
    "interlaced.mp4": "-c:v libx264 -pix_fmt yuv420p -flags +ilme+ildct",
    "intra-refresh.mp4": "-c:v libx264 -pix_fmt yuv420p -x264-params intra-refresh=1",
}.items():
    add(name, options, rate="25")
add("odd.mp4", "-vf scale=97:63 -c:v libx264 -pix_fmt yuv444p")
add("odd.webm", "-vf scale=97:63 -c:v libvpx-vp9 -b:v 300k")
add("narrow.mp4", H264, size="1600x4", seconds=1)
add("large.mp4", f"{H264} -preset ultrafast", size="3840x2160", seconds=0.25)

# When frames are shown.
add("one.mp4", f"{H264} -frames:v 1")
add("one.webm", "-c:v libvpx-vp9 -frames:v 1")
add("ntsc.mp4", H264, rate="30000/1001")
add("ntsc.webm", "-c:v libvpx-vp9 -b:v 300k", rate="30000/1001")
add("fast.mkv", H264, rate="120", seconds=2)
add("slow.mp4", H264, rate="1/2", seconds=20)
for suffix, options in {"mp4": H264, "mkv": H264, "webm": "-c:v libvpx-vp9 -b:v 300k", "ts": H264, "gif": ""}.items():
    add(f"screen.{suffix}", f"-vf {SCREEN} -fps_mode vfr {options}", rate="25")
add("slow-then-fast.mp4", f"-vf select='gte(n\\,150)+not(mod(n\\,30))' -fps_mode vfr {H264}", rate="30", seconds=6)
add("gap.mkv", f"-vf setpts=PTS+gte(N\\,20)*30/TB {H264} -fps_mode passthrough", rate="25")
add("late.ts", f"{H264} -output_ts_offset 3600", sound=True, rate="25")
add("late.mkv", f"{H264} -output_ts_offset 7", rate="25")
add("late-video.mp4", f"-vf setpts=PTS+1.3/TB {H264} -fps_mode passthrough", sound=True, rate="25")
add("late-video.mkv", f"-vf setpts=PTS+1.3/TB {H264} -fps_mode passthrough", sound=True, rate="25")

# Which way up, and how wide.
for suffix in ("mp4", "mov"):
    for degrees in (90, 180, 270):
        add(f"turned-{degrees}.{suffix}", H264, f"-c copy -metadata:s:v rotate={degrees}")
for aspect in ("4/3", "16/11", "8/9", "1/2"):
    add(f"aspect-{aspect.replace('/', '-')}.mp4", f"-vf setsar={aspect} {H264}")
add("aspect.mkv", f"-vf setsar=2 {H264}")
add("aspect.ts", "-aspect 16:9 -c:v mpeg2video -q:v 3", rate="25")
add("turned-wide.mp4", f"-vf setsar=3/2 {H264}", "-c copy -metadata:s:v rotate=90")

# Cut without coding again.
add("trimmed.mp4", H264, "-ss 1.7 -c copy", sound=True)
add("trimmed-both.mp4", H264, "-ss 1.7 -t 1.1 -c copy", sound=True)
add("trimmed-late.mp4", H264, "-ss 3.1 -c copy", rate="25", sound=True)
add("trimmed.mkv", H264, "-ss 1.7 -c copy", sound=True)
add("trimmed.ts", H264, "-ss 1.7 -c copy", sound=True)
add("trimmed-hevc.mp4", "-c:v libx265 -x265-params log-level=none:keyint=20", "-ss 1.7 -c copy", rate="25")
add("no-edit-list.mp4", H264, "-c copy -movflags +negative_cts_offsets -use_editlist 0", sound=True)
add("two.mkv", f"-map 0:v -map 0:v {H264} -disposition:v:0 0 -disposition:v:1 default -s:v:0 192x128")


def run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout


def make(folder: Path, name: str) -> Path:
    size, rate, seconds, sound, options, then = FILES[name]
    path = folder / name
    first = path.with_stem("first") if then else path
    inputs = " ".join((MOVING, SOUND) if sound else (MOVING,)).format(size=size, rate=rate, seconds=seconds)
    run(*f"ffmpeg -v error -y {inputs} {options}".split(), str(first))
    if then:
        cut, copy = then.split("-c copy")
        run(*f"ffmpeg -v error -y {cut} -i {first} -c copy {copy}".split(), str(path))
    return path


def played(path: Path, stream: str = "0:v:0") -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all frames as ffmpeg decodes them, upright, and the seconds at which a player shows each."""
    told = json.loads(
        run(
            *"ffprobe -v error -of json -show_format -show_entries frame=best_effort_timestamp_time".split(),
            *("-select_streams", stream[2:], str(path)),
        )
    )
    zero = float(told["format"].get("start_time", 0))
    seconds = np.array([float(frame.get("best_effort_timestamp_time", "nan")) - zero for frame in told["frames"]])
    wide, high = "if(gt(sar,1),round(iw*sar),iw)", "if(gt(sar,0)*lt(sar,1),round(ih/sar),ih)"
    raw = run(
        *f"ffmpeg -v error -i {path} -map {stream} -fps_mode passthrough".split(),
        *("-vf", f"scale='{wide}':'{high}':flags=bilinear", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"),
    )
    return np.frombuffer(raw, np.uint8), seconds


def look_of(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of 8 × 8 blocks of each frame, and its mean colour: programs differ in where they put colours."""
    brightness = frames @ np.array([0.299, 0.587, 0.114], np.float32)
    rows, columns = (np.linspace(0, size, 9).astype(int)[:8] for size in frames.shape[1:3])
    if min(frames.shape[1:3]) < 8:
        return brightness, frames.mean(axis=(1, 2))
    sums = np.add.reduceat(np.add.reduceat(brightness, rows, axis=1), columns, axis=2)
    return sums * 64 / brightness[0].size, frames.mean(axis=(1, 2))


def test_there_are_enough_files() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_ffmpeg_plays_it(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, name)
    raw, seconds = played(path, "0:v:1" if name == "two.mkv" else "0:v:0")
    frames, metadata = read_video(path)
    assert len(frames) == len(seconds)
    assert raw.size == frames.size, "another size"
    ours, theirs = look_of(frames), look_of(raw.reshape(frames.shape))
    assert np.abs(ours[0] - theirs[0]).max() < 10 and np.abs(ours[1] - theirs[1]).max() < 5
    if len(frames) == 1:
        return
    errors = np.array(metadata.timestamps) - seconds
    if path.suffix == ".avi":  # It holds times of decoding only, later by the frames that are held back.
        errors -= np.nanmedian(errors)
    # ffprobe tells no times of raw h264, and not all of AVI.
    assert path.suffix == ".h264" or np.nanmax(np.abs(errors)) <= np.nanmin(np.diff(seconds)) / 2 + 1e-3


@pytest.mark.parametrize("name", ["sound.ts", "container.mkv", "open-gop.mkv", "screen.webm", "trimmed-hevc.mp4"])
def test_a_rate_looks_at_what_is_on_screen(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, name)
    raw, seconds = played(path)
    frames, metadata = read_video(path, fps=3)
    expected = raw.reshape(-1, *frames.shape[1:])
    looked_at = seconds[0] + np.arange(len(frames)) / 3
    on_screen = np.searchsorted(seconds, looked_at + 1e-3, "right") - 1
    assert np.array_equal(frames, expected[on_screen])
    assert metadata.sampled_fps == pytest.approx(3, rel=0.02)


#: What the header of an mp4 file may ask of a player, as its matrix: a, b, c, d.
MATRICES = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", MATRICES + MIRRORED)
def test_every_matrix_turns_as_ffmpeg_turns(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = make(tmp_path, "container.mp4")
    whole = bytearray(path.read_bytes())
    # Of the track's header: 4 bytes name, 4 flags, 32 times and ids, 16 layer, group and volume, then the matrix.
    place = whole.index(b"tkhd") + 4 + 4 + 20 + 16
    assert whole[place : place + 4] == (1 << 16).to_bytes(4, "big")
    for offset, value in zip((0, 4, 12, 16), matrix, strict=True):
        whole[place + offset : place + offset + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(whole)
    frames, _ = read_video(path)
    assert frames.shape[1:3] == ((96, 64) if matrix[1] else (64, 96))
    assert np.array_equal(frames.reshape(-1), played(path)[0])


def test_pictures_of_songs_are_no_videos(tmp_path: Path) -> None:
    run(*"ffmpeg -v error -y -f lavfi -i testsrc2=s=64x64 -frames:v 1".split(), str(tmp_path / "cover.png"))
    run(*"ffmpeg -v error -y -f lavfi -i sine=d=1".split(), str(tmp_path / "a.mp3"))
    clip = make(tmp_path, "sound.mp4")
    covered = "-map 0 -map 1 -c copy -disposition:v:{} attached_pic"
    for source, result, place in (("a.mp3", "song.mp3", 0), (clip.name, "film.mp4", 1)):
        run(
            *f"ffmpeg -v error -y -i {tmp_path / source} -i {tmp_path / 'cover.png'}".split(),
            *covered.format(place).split(),
            str(tmp_path / result),
        )
    with pytest.raises(VideoError, match="holds no video stream, but a cover picture"):
        read_video(tmp_path / "song.mp3")
    assert np.array_equal(read_video(tmp_path / "film.mp4")[0], read_video(clip)[0])


def test_joined_recordings_are_read_to_the_end(tmp_path: Path) -> None:
    one = make(tmp_path, "container.ts")
    (tmp_path / "two.ts").write_bytes(one.read_bytes() * 2)
    frames, metadata = read_video(tmp_path / "two.ts")
    assert len(frames) == 64 and np.array_equal(frames[:32], frames[32:])
    assert metadata.timestamps == pytest.approx([i / 8 for i in range(64)])


def test_every_cut_mp4_is_refused_and_no_damage_raises_anything_else(tmp_path: Path) -> None:
    whole = make(tmp_path, "faststart.mp4").read_bytes()
    generator = random.Random(0)
    last_frame = whole.rindex(b"mdat") + 4 + (len(whole) - whole.rindex(b"mdat")) * 9 // 10
    for _ in range(60):
        with pytest.raises(VideoError):
            read_video(whole[: generator.randrange(1, last_frame)])
    sources = [make(tmp_path, name).read_bytes() for name in ("sound.webm", "sound.ts", "trimmed.mp4", "sound.avi")]
    for _ in range(200):
        damaged = bytearray(generator.choice(sources))
        for _ in range(generator.choice([1, 30])):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        try:
            read_video(bytes(damaged), fps=2)
        except VideoError:
            pass


MEASURE = """
import resource, sys
from sparrow_hf.video import read_video
read_video(sys.argv[1], num_frames=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_video(sys.argv[2], num_frames=8)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_memory_does_not_grow_with_the_length(tmp_path: Path, suffix: str) -> None:
    options = "-preset ultrafast -pix_fmt yuv420p -c:v libx264 -g 50 -y".split()
    paths = [tmp_path / f"{seconds}.{suffix}" for seconds in (10, 600)]
    for path in paths:
        source = f"testsrc2=s=320x240:r=25:d={path.stem}"
        run("ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *options, str(path))
    before, after = map(int, run(sys.executable, "-c", MEASURE, *map(str, paths)).split())
    # Fifteen thousand frames of 230 kB, of which eight are kept; kB.
    assert after - before < 20_000
