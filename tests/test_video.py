"""Video in and out on clips made by PyAV: damaged, uneven, turned, odd; OpenCV is the second opinion."""

import tracemalloc
import warnings
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from surgpose.config import shared_dir
from surgpose.data.video import (
    count_source,
    frame_rate,
    iter_source,
    list_images,
    read_image,
    read_timeline,
    read_video,
    video_info,
    write_video,
)

RED, WIDTH, HEIGHT = (0, 0, 255), 96, 64


def picture(number, width=WIDTH, height=HEIGHT):
    """A grey that tells the number, and a red corner that tells which way is up."""
    image = np.full((height, width, 3), 20 + 11 * number, np.uint8)
    image[: height // 3, : width // 3] = RED
    return image


def number_of(image):
    """The number that `picture` hid in the grey of the middle."""
    h, w = image.shape[:2]
    return round((float(image[h // 2 - 3 : h // 2 + 3, w // 2 - 3 : w // 2 + 3].mean()) - 20) / 11)


def encode(
    path, n=20, *, codec="libx264", pix_fmt="yuv420p", size=(WIDTH, HEIGHT), stamps=None, turn=0, **coding
):
    """Write a clip with PyAV itself, so that the reader is not tested with its own writer."""
    fast = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=fast) as container:
        stream = container.add_stream(codec, rate=25, options=coding)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), "bgr24")
            if stamps:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def box_of(data, name):
    """Start and length of a top-level MP4 box."""
    at = data.index(name) - 4
    return at, int.from_bytes(data[at : at + 4], "big")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("video") / "clip.mp4", g="5")


# Files that are no video, or not a whole one (rows 8 and 11)


def broken(kind, clip, folder):
    data, path = clip.read_bytes(), folder / f"{kind}.mp4"
    if kind == "moovless":
        at, length = box_of(data, b"moov")
        data = data[:at] + data[at + length :]
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.rate = 8000
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
        return path
    elif kind == "mkv":
        path = path.with_name("cut.mkv")
        data = encode(path).read_bytes()
        data = data[: len(data) // 2]
    else:
        data = dict(empty=b"", text=b"dear reader\n" * 20, last=data[:-20], front=data[: len(data) // 2],
                    header=data[: box_of(data, b"moov")[0] + 200], zeros=bytes(5000),
                    playlist=b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.mp4\n#EXT-X-ENDLIST\n")[kind]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "empty file"),
        ("text", "something else"),
        ("zeros", "something else"),
        ("playlist", "something else"),  # must not be followed
        ("moovless", "moov"),
        ("header", "moov"),
        ("front", "truncated"),
        ("last", "truncated"),  # the last frame alone is missing its end
        ("mkv", "truncated"),
        ("sound", "without pictures"),
    ],
)
def test_broken_file_is_named_with_its_size_and_a_remedy(kind, says, clip, tmp_path):
    path = broken(kind, clip, tmp_path)
    for opened in (video_info, read_video, iter_source, count_source):
        with pytest.raises(ValueError, match=says) as e:
            opened(path)  # at once: no frame has been asked for
        for part in (str(path), f"{path.stat().st_size} bytes", ";"):
            assert part in str(e.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        iter_source("http://localhost/a.mp4")
    with pytest.raises(ValueError, match="folder"):
        video_info(tmp_path)


def test_a_batch_goes_on_after_a_broken_file(clip, tmp_path):
    sources, counts = [broken("front", clip, tmp_path), clip], []
    for source in sources:
        try:
            counts.append(len(list(read_video(source))))
        except ValueError:
            counts.append(None)
    assert counts == [None, 20]


def test_all_frames_damaged(clip, tmp_path):
    data, path = bytearray(clip.read_bytes()), tmp_path / "noise.mp4"
    at, length = box_of(bytes(data), b"mdat")
    data[at + 8 : at + length] = b"\xff" * (length - 8)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"noise.mp4: damaged"):
        list(read_video(path))
    with pytest.raises(ValueError, match=r"noise.mp4: damaged"):
        video_info(path)


def test_too_large_frames_are_refused(clip, monkeypatch):
    monkeypatch.setattr("surgpose.data.packets.MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(ValueError, match=f"got {WIDTH} x {HEIGHT}"):
        read_video(clip)


# A hole in the middle (row 9)


@pytest.mark.parametrize("coding", [dict(g="5"), dict(g="5", bf="0"), dict(g="100", bf="3")])
@pytest.mark.parametrize("hole", [3, 11, 18])
def test_damaged_frame_is_skipped_by_its_stamp(hole, coding, tmp_path):
    path = encode(tmp_path / "holed.mp4", **coding)
    with av.open(str(path)) as container:
        packets = sorted((p for p in container.demux(video=0) if p.size), key=lambda p: p.pts)
    data, packet = bytearray(path.read_bytes()), packets[hole]
    data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    lost = []
    with pytest.warns(UserWarning, match=rf"holed.mp4: .*\b{hole} \({hole / 25:.2f} s\)"):
        frames = list(read_video(path, lost=lost))
    assert hole in [f.index for f in lost]
    assert sorted(f.index for f in [f for f, _ in frames] + lost) == list(range(20))
    for frame, image in frames:
        assert frame.t_s == pytest.approx(frame.index / 25)
        if frame.index < hole - 4:
            assert number_of(image) == frame.index
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for frame, image in read_video(path, clean=True):
            assert number_of(image) == frame.index
        even = [f.index for f, _ in frames if f.index % 2 == 0]
        assert [f.index for f, _ in read_video(path, stride=2)] == even


# Uneven, turned, odd, grey, deep, transparent (row 10)


def test_uneven_frame_rate_keeps_the_times(tmp_path):
    stamps = [0, 40, 200, 240, 1000, 1033, 5000]
    path = encode(tmp_path / "uneven.mp4", 7, stamps=stamps)
    frames = list(read_video(path))
    assert [f.index for f, _ in frames] == [number_of(image) for _, image in frames] == list(range(7))
    np.testing.assert_allclose([f.t_s for f, _ in frames], np.array(stamps) / 1000, atol=1e-3)
    assert [f.t_s for f, _ in read_video(path, start=2, stride=3)] == pytest.approx([0.2, 1.033], abs=1e-3)


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_rotation_is_applied_as_opencv_does(turn, tmp_path):
    path = encode(tmp_path / "turned.mp4", 2, turn=turn)
    _, image = next(read_video(path))
    seen = cv2.VideoCapture(str(path)).read()[1]
    info = video_info(path)
    assert image.shape == seen.shape == (info.height, info.width, 3)
    assert np.abs(image.astype(int) - seen).mean() < 2


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "size"),
    [
        ("ffv1", "gray", (97, 63)),
        ("ffv1", "gray16le", (96, 64)),
        ("ffv1", "yuva420p", (96, 64)),
        ("ffv1", "bgr0", (97, 63)),
        ("ffv1", "yuv420p10le", (97, 63)),
        ("libx264", "yuv444p", (97, 63)),
        ("mpeg4", "yuv420p", (98, 62)),
    ],
)
def test_pixel_formats_and_odd_sizes(codec, pix_fmt, size, tmp_path):
    path = encode(tmp_path / "clip.mkv", 4, codec=codec, pix_fmt=pix_fmt, size=size)
    for i, (frame, image) in enumerate(read_video(path)):
        assert image.dtype == np.uint8 and image.shape == (size[1], size[0], 3) and image.flags.c_contiguous
        assert (frame.width, frame.height, frame.index) == (*size, i) and number_of(image) == i
    assert i == 3


@pytest.mark.parametrize("name", ["a.avi", "h264.avi", "a.ts", "a.mov", "a.mkv", "A.MP4"])
def test_containers(name, tmp_path):
    old = dict(codec="mpeg4", b="4M")
    path = encode(tmp_path / name, **(old if name == "a.avi" else {}))
    frames = list(read_video(path))
    assert [number_of(image) for _, image in frames] == [f.index for f, _ in frames] == list(range(20))
    assert [f.t_s for f, _ in frames] == pytest.approx(np.arange(20) / 25, abs=2e-3)
    info = video_info(path)
    assert info.frames == 20 and info.fps == pytest.approx(25, rel=0.06)
    assert info.duration_s == pytest.approx(0.8, abs=0.05)


def test_agrees_with_opencv_frame_by_frame(clip):
    capture = cv2.VideoCapture(str(clip))
    for _, image in read_video(clip):
        assert np.abs(capture.read()[1].astype(int) - image).mean() < 1
    assert not capture.read()[0]


# Names (row 31)


@pytest.mark.parametrize(
    "name", ["with space", "тест ü 手術", "100%d", "a#b?c&d", "file:x", "concat:a|b", "-y", "n" * 200],
)
def test_names(name, clip, tmp_path):
    path = tmp_path / f"{name}.mp4"
    with write_video(path, fps=25, width=WIDTH, height=HEIGHT) as video:
        video.write(picture(3))
    [(frame, image)] = read_video(path)
    assert frame.file_name == path.name and number_of(image) == 3
    still = tmp_path / f"{name}.png"
    still.write_bytes(cv2.imencode(".png", picture(4))[1])
    np.testing.assert_array_equal(read_image(still), picture(4))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_case_twins_and_natural_order(tmp_path):
    names = ["B10.jpg", "b2.png", "B2.JPG", "b1.tif", "10.png", "9.png"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "._b1.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert sorted(p.name for p in list_images(tmp_path)) == sorted(names)
    assert [p.name for p in list_images(tmp_path)][:2] == ["9.png", "10.png"]


# Writing


def test_written_video_is_what_players_expect(tmp_path):
    path, images = tmp_path / "out.mp4", [picture(i, 161, 91) for i in range(6)]
    with write_video(path, fps=30000 / 1001, width=161, height=91) as video:
        for image in images:
            video.write(image)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.pix_fmt, stream.codec_context.name) == (
            Fraction(30000, 1001), 6, "yuv420p", "h264")
        assert (stream.width, stream.height) == (162, 92)
    for image, (_, back) in zip(images, read_video(path), strict=True):
        inner = np.s_[4:20, 4:40]
        assert np.abs(back[:91, :161][inner].astype(int) - image[inner]).max() < 16  # red stays red
        assert np.abs(back[40:91, 70:161].astype(int) - image[40:, 70:]).max() < 8
    assert number_of(cv2.VideoCapture(str(path)).read()[1]) == 0


def test_failure_leaves_nothing_and_keeps_the_old_file(clip, tmp_path):
    def frames():
        yield picture(0)
        raise KeyboardInterrupt
    for before in (None, b"the old one"):
        path = tmp_path / "out.mp4"
        if before:
            path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt), write_video(path, fps=25, width=WIDTH, height=HEIGHT) as video:
            for image in frames():
                video.write(image)
        assert [p.name for p in tmp_path.iterdir()] == (["out.mp4"] if before else [])
        if before:
            assert path.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(OSError), write_video(tmp_path / "file" / "a.mp4", fps=25, width=9, height=9):
        pass


def test_same_frames_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        with write_video(tmp_path / name, fps=25, width=WIDTH, height=HEIGHT) as video:
            for i in range(8):
                video.write(picture(i))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_copy_keeps_uneven_times(tmp_path):
    stamps = [0, 80, 120, 160, 480]
    source, copy = encode(tmp_path / "in.mkv", 5, stamps=stamps), tmp_path / "copy.mp4"
    with write_video(copy, fps=video_info(source).fps, width=WIDTH, height=HEIGHT) as video:
        for frame, image in read_video(source):
            video.write(image, frame.t_s)
    assert [f.t_s for f, _ in read_video(copy)] == pytest.approx([s / 1000 for s in stamps], abs=1e-3)


def test_exact_rates():
    assert [frame_rate(x) for x in (25, 29.97002997, 2075 / 82, Fraction(24000, 1001))] == [
        25, Fraction(30000, 1001), Fraction(2075, 82), Fraction(24000, 1001)]


# One frame at a time


def test_memory_does_not_grow_with_length(tmp_path):
    path = tmp_path / "long.mp4"
    with write_video(path, fps=25, width=320, height=240) as video:
        for i in range(60):
            video.write(picture(i % 20, 320, 240))
    tracemalloc.start()
    for _ in read_video(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 320 * 240 * 3  # of 60 frames


def test_reader_can_be_dropped_midway(clip):
    reader = read_video(clip)
    next(reader)
    reader.close()
    assert len(list(read_video(clip))) == 20


@pytest.mark.filterwarnings("ignore:left out")
def test_a_folder_with_a_damaged_image(tmp_path):
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), picture(i))
    (tmp_path / "1.jpg").write_text("not a picture")
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    lost = []
    with pytest.warns(UserWarning, match="1.jpg"):
        frames = [f for f, _ in iter_source(tmp_path, lost=lost)]
    assert [f.file_name for f in frames] == ["0.jpg", "3.jpg"] and [f.index for f in frames] == [0, 3]
    assert [f.file_name for f in lost] == ["1.jpg", "2.jpg"]
    for name in ("0.jpg", "3.jpg"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="none of 4 images"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(iter_source(tmp_path))


# Real footage, where it is at hand


@pytest.mark.skipif(shared_dir() is None, reason="no shared folder with real footage")
def test_frame_numbers_of_real_footage_are_those_of_its_labels():
    path = shared_dir() / "real" / "video" / "surgery_test.mkv"
    line, capture = read_timeline(path), cv2.VideoCapture(str(path))
    assert line.frames == 83  # as many as the CVAT task has
    for frame, image in read_video(path, stop=4):
        seen = capture.read()[1]
        assert frame.index == round(capture.get(cv2.CAP_PROP_POS_FRAMES)) - 1
        assert (frame.width, frame.height) == (1920, 1080) and np.abs(seen.astype(int) - image).mean() < 2
    assert [f.index for f, _ in read_video(path, stride=40)] == [0, 40, 80]
