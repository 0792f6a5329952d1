"""Bad input and broken machines, seen from the command line: one clear line, and nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from surgpose.cli import main
from surgpose.config import profile
from surgpose.data.video import write_video
from surgpose.engine import Job, Phase, run_phases
from surgpose.files import atomic_write, read_json


def command(*args: object) -> SimpleNamespace:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(a) for a in args])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def clip(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    with write_video(tmp_path / "clip.mp4", fps=10, width=64, height=48) as film:
        for _ in range(20):
            film.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return tmp_path / "clip.mp4"


def dataset(folder: Path, change=lambda coco: None) -> Path:
    "A dataset folder of one picture, spoiled by `change`."
    (folder / "images").mkdir(parents=True)
    cv2.imwrite(str(folder / "images" / "000000.jpg"), np.full((48, 64, 3), 90, np.uint8))
    points = [10.0, 10, 2, 9, 12, 2, 11, 12, 2, 30, 30, 2, 50, 40, 2]
    coco = dict(
        info={},
        images=[dict(id=1, file_name="images/000000.jpg", width=64, height=48, split="train", scene=0)],
        categories=[dict(id=i, name=n) for i, n in enumerate(("needle_holder", "tweezers"), 1)],
        annotations=[
            dict(
                id=1,
                image_id=1,
                category_id=1,
                bbox=[8, 8, 44, 34],
                area=500,
                iscrowd=0,
                keypoints=points,
                num_keypoints=5,
            )
        ],
    )
    change(coco)
    (folder / "coco_annotations.json").write_text(json.dumps(coco))
    return folder


def refused(tmp_path: Path, told: str, *args: object, code: int = 1) -> str:
    "A command that must fail with a line that holds `told` (a bar may stand before it) and leave no result."
    out = tmp_path / "out"
    done = command(*args, "--out", out)
    assert (done.code, done.out) == (code, ""), done.err
    *bars, line = done.err.strip().splitlines()
    assert told in line and line.startswith(f"surgpose {args[0]}: ") and all("%|" in b for b in bars if b), (
        done.err
    )
    assert not [p for p in out.rglob("*") if p.is_file() and p.name not in (".lock", ".lock.owner")], (
        "half-written"
    )
    return line


# Videos


@pytest.mark.parametrize("verb", ["run", "predict", "pseudo"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda p: p.unlink(), "there is no such file"),
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: p.write_text("a text that calls itself a video"), "expected a video"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "moov"),
    ],
)
def test_a_video_that_is_none(tmp_path, clip, verb, spoil, told, trained_toy):
    spoil(clip)
    source = ["--video", clip] if verb == "run" else [clip, "--weights", trained_toy]
    message = refused(tmp_path, told, verb, *source)
    assert "clip.mp4" in message, "the file is named"


# Pictures and labels


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda p: p.write_text("a text that calls itself a picture"), "000000.jpg"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "000000.jpg"),
        (lambda p: p.unlink(), "000000.jpg"),
    ],
)
def test_a_picture_that_is_none(tmp_path, spoil, told, trained_toy):
    data = dataset(tmp_path / "data")
    spoil(data / "images" / "000000.jpg")
    refused(tmp_path, told, "predict", data / "images" / "000000.jpg", "--weights", trained_toy)
    refused(tmp_path, told, "train", "--data", data, "--weights-init", "scratch")
    refused(tmp_path, told, "evaluate", "--data", data, "--split", "train", "--weights", trained_toy)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["images"][0].update(file_name="../../x"), "leads out of"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "leads out of"),
        (lambda c: c["categories"][1].update(name="tweezer"), "did you mean 'tweezers'"),
        (lambda c: c["categories"][1].update(name="hammer"), "hammer"),
        (lambda c: c["annotations"][0].update(category_id=7), "category_id"),
        (lambda c: c["annotations"][0].update(image_id=9), "image_id"),
        (lambda c: c["annotations"][0].update(keypoints=[1, 2, 2]), "keypoints"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, -5, 5]), "bbox"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 5]), "bbox"),
        (lambda c: c["images"].append(dict(c["images"][0])), "images"),
    ],
)
@pytest.mark.parametrize("verb", ["stats", "train", "evaluate"])
def test_labels_that_are_wrong(tmp_path, verb, change, told, trained_toy):
    data = dataset(tmp_path / "data", change)
    more = dict(train=["--weights-init", "scratch"], evaluate=["--weights", trained_toy]).get(verb, [])
    assert "coco_annotations.json" in refused(tmp_path, told, verb, "--data", data, *more)


def test_labels_that_are_no_json(tmp_path):
    data = dataset(tmp_path / "data")
    (data / "coco_annotations.json").write_text('{"images": [')
    assert "line 1" in refused(tmp_path, "coco_annotations.json", "stats", "--data", data)


# Weights and config


def test_weights_that_carry_code_run_none_of_it(tmp_path, clip, toy_dataset):
    import torch

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save(dict(model=Evil()), tmp_path / "evil.pt")
    refused(tmp_path, "evil.pt", "predict", clip, "--weights", tmp_path / "evil.pt")
    refused(tmp_path, "evil.pt", "train", "--data", toy_dataset, "--weights-init", tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {epcohs: 3}", "did you mean 'epochs'"),
        ("trian: {epochs: 3}", "did you mean 'train'"),
        ("render: {strategy_mix: {studoi: 1}}", "studoi"),
        ("!!python/object/apply:os.system ['touch pwned']", "expected YAML"),
        ("- a list", "expected a mapping"),
    ],
)
def test_a_config_that_is_wrong(tmp_path, text, told):
    atomic_write(tmp_path / "config.yaml", text)
    refused(tmp_path, told, "run", "--config", tmp_path / "config.yaml", code=2)


def test_a_render_with_inputs_that_are_not_there(tmp_path, monkeypatch):
    refused(tmp_path, "models", "render", "--models-dir", tmp_path / "no" / "models")
    monkeypatch.setenv("PROJ_DATA", str(tmp_path / "no"))
    refused(tmp_path, "PROJ_DATA", "render", code=2)


def test_a_device_that_is_not_there(tmp_path, clip):
    refused(tmp_path, "device", "run", "--video", clip, "--device", "gpu")


# A folder in use, a kill

WORK = """
import sys, time
from pathlib import Path
from surgpose.config import profile
from surgpose.engine import Job, Phase, run_phases
def work(name, seconds):
    def function(job):
        print("at work on", name, file=sys.stderr, flush=True)
        time.sleep(seconds)
        (job.out / name).write_text(name)
        return {}
    return Phase(name, function, makes=(name,))
run_phases([work("first", 0), work("second", 60)], Job(profile("demo"), Path(sys.argv[1])))
"""


@contextlib.contextmanager
def long_run(out: Path):
    "A run in another process that is in the middle of its second phase."
    process = subprocess.Popen([sys.executable, "-c", WORK, str(out)], stderr=subprocess.PIPE, text=True)
    try:
        while "at work on second" not in process.stderr.readline():
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


def quick(name: str, ran: list[str]) -> Phase:
    def function(job: Job) -> dict:
        ran.append(name)
        (job.out / name).write_text(name)
        return {}

    return Phase(name, function, makes=(name,))


def test_a_second_run_in_the_same_folder_is_refused_and_told_by_whom(tmp_path):
    with long_run(tmp_path) as other, pytest.raises(RuntimeError, match=f"in use by process {other.pid}"):
        run_phases([quick("first", [])], Job(profile("demo"), tmp_path))


def test_a_killed_run_is_taken_up_where_it_was(tmp_path):
    with long_run(tmp_path) as process:
        process.kill()
        process.wait()
    given_up = time.monotonic() + 300
    while True:  # the system frees the lock when the process is gone
        with contextlib.suppress(RuntimeError):
            ran = []
            assert run_phases([quick("first", ran), quick("second", ran)], Job(profile("demo"), tmp_path))
            break
        assert time.monotonic() < given_up, "the lock of a dead process is never freed"
        time.sleep(0.1)
    assert ran == ["second"]
    assert {n: p["status"] for n, p in read_json(tmp_path / "run.json")["phases"].items()} == dict(
        first="fresh", second="ok"
    )
    assert not [p for p in tmp_path.rglob("*.tmp*")]
