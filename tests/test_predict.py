"""Prediction from the source to its files: continued after a kill, with sound, by OpenVINO as by torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec

import av
import cv2
import numpy as np
import pytest

from surgpose.cli import main
from surgpose.config import PredictConfig, shared_dir
from surgpose.data.video import read_camera, read_video, video_info, write_video
from surgpose.files import read_json
from surgpose.pose import openvino
from surgpose.pose import predict as rooms
from surgpose.pose.model import find_weights, load_model
from surgpose.pose.predict import predict, read_predictions

LOOSE = dict(conf=0.0, max_det=2, same_tool=1.0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "One cache of exported networks for this file."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGPOSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "Twelve noisy frames at 10 a second."
    path, rng = tmp_path_factory.mktemp("clip") / "clip.mp4", np.random.default_rng(0)
    with write_video(path, fps=10, width=96, height=64) as film:
        for _ in range(12):
            film.write(rng.integers(0, 255, (64, 96, 3), np.uint8))
    return path


@pytest.fixture(scope="module")
def hummed(tmp_path_factory):
    "Two seconds of pictures with a tone of 440 Hz."
    path = tmp_path_factory.mktemp("hum") / "hum.mp4"
    with av.open(str(path), "w") as film:
        pictures = film.add_stream("libx264", rate=20)
        sound = film.add_stream("aac", rate=48000, layout="mono")
        pictures.width, pictures.height, pictures.pix_fmt = 96, 64, "yuv420p"
        for i in range(40):
            image = np.full((64, 96, 3), 5 * i, np.uint8)
            film.mux(pictures.encode(av.VideoFrame.from_ndarray(image, "bgr24")))
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(96000) / 48000).astype(np.float32)
        for k in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, k : k + 1024].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts = 48000, k
            film.mux(sound.encode(frame))
        film.mux(pictures.encode(None))
        film.mux(sound.encode(None))
    return path


def run(source, out, weights, **settings):
    cfg = PredictConfig(**{**LOOSE, **settings})
    return predict(source, out, cfg, weights=weights, device="cpu", progress=False)


def written(out):
    "What a prediction says, but for the time of day."
    data = read_json(out / "predictions.json")
    data["info"].pop("finished")
    images = [image for _, image in read_video(out / "overlay.mp4")]
    return data, (out / "predictions.csv").read_text(), np.stack(images)


def same(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    np.testing.assert_array_equal(a[2], b[2])


# Interrupted -----------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_behind_its_last_whole_part(clip, trained_toy, tmp_path):
    "SIGKILL in mid-work; the second run repeats no finished part and ends with the same files."
    whole = written(run(clip, tmp_path / "whole", trained_toy, checkpoint=3))
    code = """
import sys, time
from pathlib import Path
from surgpose.config import PredictConfig
from surgpose.pose import predict as rooms
calm = rooms.draw_poses
def slow(image, poses): time.sleep(0.3); return calm(image, poses)
rooms.draw_poses = slow
cfg = PredictConfig(conf=0.0, max_det=2, same_tool=1.0, checkpoint=3)
rooms.predict(sys.argv[1], sys.argv[2], cfg, weights=sys.argv[3], device="cpu", progress=False)
"""
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", code, str(clip), str(out), str(trained_toy)])
    parts = out / ".partial"
    end = time.monotonic() + 120
    while not (parts / "000001.jsonl").exists() and time.monotonic() < end and child.poll() is None:
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert child.returncode == -signal.SIGKILL and not (out / "predictions.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in parts.glob("00000[01].*") if p.suffix in (".mp4", ".jsonl")}
    assert len(kept) == 4
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        finish = rooms._finish

        def look(source, made, *args):
            seen.extend(p.stat().st_mtime_ns == then for p, then in kept.items())
            finish(source, made, *args)

        patch.setattr(rooms, "_finish", look)
        run(clip, out, trained_toy, checkpoint=3)
    assert seen == [True] * 4, "finished parts are not made again"
    same(written(out), whole)
    assert not parts.exists()


def test_parts_of_other_settings_are_not_continued(clip, trained_toy, tmp_path, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rooms, "_finish", dies)
        with pytest.raises(KeyboardInterrupt):
            run(clip, tmp_path / "a", trained_toy, checkpoint=5)
    assert (tmp_path / "a" / ".partial" / "000002.jsonl").is_file()
    run(clip, tmp_path / "a", trained_toy, stride=4)
    assert [f.index for f, _ in read_predictions(tmp_path / "a")] == [0, 4, 8]


def test_what_is_finished_is_kept_as_long_as_it_is_what_is_asked_for(
    clip, trained_toy, tmp_path, monkeypatch, capfd
):
    out, cfg, worked, work = tmp_path / "out", PredictConfig(**LOOSE, backend="torch"), [], rooms._work
    monkeypatch.setattr(rooms, "_work", lambda *args: (worked.append(args), work(*args)))

    def works(source=clip, **changed) -> bool:
        worked.clear()
        predict(source, out, cfg.model_copy(update=changed), weights=trained_toy, device="cpu")
        assert read_predictions(out) and (out / "predictions.csv").is_file()
        return bool(worked)

    assert works()
    capfd.readouterr()
    assert not works() and "up to date" in capfd.readouterr().err
    assert not works(overlay=False) and works(imgsz=64) and works(conf=0.5, imgsz=64)
    (out / "overlay.mp4").unlink()
    assert works(conf=0.5, imgsz=64) and (out / "overlay.mp4").is_file()
    with write_video(tmp_path / clip.name, fps=10, width=96, height=64) as film:
        film.write(np.zeros((64, 96, 3), np.uint8))
    assert works(tmp_path / clip.name) and not works(tmp_path / clip.name), "another film of the same name"
    monkeypatch.setattr(rooms, "source_hash", lambda *names: "newer")
    assert works(tmp_path / clip.name), "another program"


def test_the_size_of_parts_changes_nothing(clip, trained_toy, tmp_path):
    a, b = (written(run(clip, tmp_path / str(n), trained_toy, checkpoint=n)) for n in (1, 500))
    assert a[0] == b[0] and a[1] == b[1] and a[2].shape == b[2].shape


# What is written -------------------------------------------------------------------------------------


def heard(path):
    with av.open(str(path)) as film:
        wave = np.concatenate([f.to_ndarray().mean(0) for f in film.decode(audio=0)])
        rate = film.streams.audio[0].rate
    return len(wave) / rate, np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)


@pytest.mark.parametrize("stride", [1, 3])
def test_the_overlay_plays_as_the_source_does_and_keeps_its_sound(hummed, trained_toy, tmp_path, stride):
    out = run(hummed, tmp_path, trained_toy, stride=stride, checkpoint=6)
    info = video_info(out / "overlay.mp4")
    assert (info.codec, info.frames) == ("h264", -(-40 // stride))
    assert info.fps == pytest.approx(20 / stride, rel=0.05)
    times = [f.t_s for f, _ in read_video(out / "overlay.mp4")]
    assert times == pytest.approx([i / 20 for i in range(0, 40, stride)], abs=2e-3)
    seconds, hertz = heard(out / "overlay.mp4")
    assert seconds == pytest.approx(2.0, abs=0.08) and hertz == pytest.approx(440, abs=2)


def test_only_the_classes_that_were_asked_for(clip, trained_toy, tmp_path):
    for name, number in (("needle_holder", 1), ("tweezers", 2)):
        for backend in ("torch", "openvino"):
            wanted = dict(classes=(name,), backend=backend, frames=2)
            out = run(clip, tmp_path / name / backend, trained_toy, **wanted)
            assert {int(c) for _, poses in read_predictions(out) for c in poses.category_id} <= {number}


def test_a_broken_picture_is_listed_and_the_rest_goes_on(trained_toy, tmp_path, capfd):
    folder = tmp_path / "stills"
    folder.mkdir()
    for name in ("a.jpg", "c.jpg"):
        cv2.imwrite(str(folder / name), np.zeros((64, 64, 3), np.uint8))
    (folder / "b.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    arguments = ["--weights", str(trained_toy), "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="b.jpg"):
        assert main(["predict", str(folder), *arguments]) == 0
    data = read_json(tmp_path / "out" / "predictions.json")
    assert data["info"]["lost"] == [dict(frame=1, file_name="b.jpg")] and len(data["images"]) == 2
    for name in ("a.jpg", "c.jpg"):
        (folder / name).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="c.jpg"):
        assert main(["predict", str(folder), *arguments[:-1], str(tmp_path / "none")]) == 1
    assert "none of 3 images" in capfd.readouterr().err
    assert not (tmp_path / "none" / ".partial").exists()


# Cameras ---------------------------------------------------------------------------------------------


class Camera:
    "Stands in for cv2.VideoCapture; presses Ctrl-C after some frames."

    def __init__(self, press=None):
        self.count, self.press, self.released = 0, press, False

    def isOpened(self):
        return True

    def read(self):
        self.count += 1
        if self.count == self.press:
            os.kill(os.getpid(), signal.SIGINT)
        return True, np.full((48, 64, 3), self.count % 255, np.uint8)

    def get(self, what):
        return 0.0

    def release(self):
        self.released = True


def test_no_camera_is_a_clear_error(trained_toy, tmp_path, capfd):
    with pytest.raises(RuntimeError, match="camera 97: expected a webcam"):
        read_camera(97)
    out = tmp_path / "out"
    assert main(["predict", "97", "--weights", str(trained_toy), "--out", str(out)]) == 1
    assert "camera 97" in capfd.readouterr().err and not out.exists()


@pytest.mark.parametrize("press, frames", [(None, 4), (9, None)])
def test_a_camera_ends_by_hand_or_by_number(trained_toy, tmp_path, monkeypatch, press, frames):
    camera = Camera(press)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: camera)
    out = run("0", tmp_path / "out", trained_toy, frames=frames, checkpoint=2)
    found = read_predictions(out)
    assert camera.released and video_info(out / "overlay.mp4").frames == len(found)
    assert len(found) == 4 if frames else 1 <= len(found) <= camera.count
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# OpenVINO --------------------------------------------------------------------------------------------


def test_nothing_is_reported_and_torch_stays_out(clip, trained_toy, tmp_path):
    "The first prediction exports, the second imports neither torch nor Ultralytics; no connection is opened."
    code = """
import socket, sys, warnings
def refuse(*args, **kwargs): raise SystemExit(f"network: {args}")
socket.create_connection = socket.getaddrinfo = refuse; socket.socket.connect = refuse
from surgpose.config import PredictConfig
from surgpose.pose.predict import predict
cfg = PredictConfig(conf=0.0, max_det=2, same_tool=1.0, frames=1)
predict(sys.argv[1], sys.argv[2], cfg, weights=sys.argv[3], device="cpu", progress=False)
assert sys.modules["openvino_telemetry"] is None
print("torch" in sys.modules, "ultralytics" in sys.modules)
"""
    env = {**os.environ, "SURGPOSE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(clip), str(tmp_path / "out"), str(trained_toy)]
    first, second = (subprocess.run(command, capture_output=True, text=True, env=env) for _ in range(2))
    assert first.stdout.splitlines()[-1] == "True True", first.stderr
    assert second.stdout == "False False\n", second.stderr


def test_a_damaged_export_is_made_again(trained_toy, tmp_path, monkeypatch):
    folder, made = openvino.cached_network(trained_toy), []
    whole = (folder / "net.bin").read_bytes()

    def again(weights, place, form):
        made.append(form)
        for suffix, data in ((".xml", (folder / "net.xml").read_bytes()), (".bin", whole)):
            (place / f"new{suffix}").write_bytes(data)
        return place / "new.xml"

    monkeypatch.setattr(openvino, "export_network", again)
    (folder / "net.bin").write_bytes(whole[:99])
    assert openvino.cached_network(trained_toy) == folder and made == ["openvino"]
    assert (folder / "net.bin").read_bytes() == whole and len(list(folder.parent.iterdir())) == 1


def test_without_openvino_torch_predicts_and_says_so(monkeypatch):
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="openvino is not installed"):
        assert openvino.choose_backend("auto", "cpu") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert openvino.choose_backend("torch", "cpu") == "torch"


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_an_export_answers_as_the_network_does(trained_toy, tmp_path, capfd, form):
    "By OpenVINO, which reads both; at two sizes that the export did not know."
    import torch

    if missing := [name for name in ("openvino", form) if not find_spec(name)]:
        pytest.skip(f"{missing[0]} is not installed; it comes with the extra `fast`")
    core = openvino.openvino().Core()
    assert main(["export", "--format", form, "--weights", str(trained_toy), "--out", str(tmp_path)]) == 0
    made = capfd.readouterr().out.strip()
    assert {p.suffix for p in tmp_path.iterdir()} == ({".onnx"} if form == "onnx" else {".xml", ".bin"})
    network = core.compile_model(core.read_model(made), "CPU", dict(INFERENCE_PRECISION_HINT="f32"))
    ours = load_model(trained_toy).model.eval()
    for h, w in ((96, 64), (64, 160)):
        blob = np.random.default_rng(h).random((1, 3, h, w), np.float32)
        with torch.inference_mode():
            wanted = ours(torch.from_numpy(blob))[0].numpy()
        np.testing.assert_allclose(network([blob])[0], wanted, atol=0.02)  # px


def closest(a, b):
    "Largest distance of keypoints in px, each tool of one beside the nearest of its class in the other."
    assert sorted(a.category_id) == sorted(b.category_id)
    gaps = [
        min(np.abs(p[:, :2] - q[:, :2]).max() for q in b.keypoints[b.category_id == k])
        for p, k in zip(a.keypoints, a.category_id, strict=True)
    ]
    return max(gaps, default=0.0)


def parity(source, tmp_path, weights, **settings):
    cfg = dict(conf=0.25, overlay=False, **settings)
    a, b = (
        read_predictions(run(source, tmp_path / k, weights, backend=k, **cfg)) for k in ("torch", "openvino")
    )
    gaps = [closest(p, q) for (_, p), (_, q) in zip(a, b, strict=True)]
    assert sum(len(p) for _, p in a)
    return max(gaps)


def test_torch_and_openvino_agree_on_the_sample_clip(tmp_path):
    from surgpose.config import project_root

    sample = project_root() / "data" / "sample" / "clip.mp4"
    assert parity(sample, tmp_path, find_weights(None), stride=4) < 0.5


@pytest.mark.skipif(shared_dir() is None, reason="no shared folder with footage")
def test_a_real_clip_is_predicted_into_its_three_files(tmp_path):
    clip = shared_dir() / "real" / "video" / "surgery_test.mkv"
    assert parity(clip, tmp_path, find_weights(None), stride=20) < 0.5
    out = predict(clip, tmp_path / "out", PredictConfig(frames=8), device="cpu", progress=False)
    assert {"predictions.json", "predictions.csv", "overlay.mp4"} <= {p.name for p in out.iterdir()}


NO_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from surgpose.config import PredictConfig
from surgpose.pose.model import find_weights, load_model
from surgpose.pose.predict import predict_frames
from surgpose.schema import Frame
model, frames = load_model(find_weights(None)), [(Frame("x", 64, 64), np.zeros((64, 64, 3), np.uint8))]
list(predict_frames(model, frames, PredictConfig(), device="cpu"))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
try: list(predict_frames(model, frames, PredictConfig(imgsz=6400), device="cpu"))
except RuntimeError as e: print(e)
"""


def test_no_memory_is_told_with_what_is_used_and_what_to_change():
    said = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=True
    ).stdout
    assert "out of memory at 6400 px" in said and "GiB" in said and "lower predict.imgsz" in said
