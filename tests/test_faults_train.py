"""A training among hostile files and failing machines: it stops with a clear word, or goes on."""

from __future__ import annotations

import csv
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from surgpose.config import MAX_YAML_BYTES, TrainConfig, load_config
from surgpose.data.coco import read_coco, split_coco, write_coco
from surgpose.data.yolo import write_yolo
from surgpose.files import read_json
from surgpose.pose import train as training
from surgpose.pose.model import read_weights, ultralytics
from surgpose.pose.train import load_splits, train

FOUR = TrainConfig(imgsz=64, epochs=4, batch=4, weights_init="scratch", warmup_epochs=0, workers=0)
ONE = FOUR.model_copy(update=dict(epochs=1))
pytestmark = pytest.mark.filterwarnings("ignore:.*no initial weights")


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "results.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def as_yolo(dataset: Path, out: Path) -> Path:
    coco = read_coco(dataset / "coco_annotations.json")
    return write_yolo(out, {s: [(split_coco(coco, s), dataset)] for s in ("train", "val")}, progress=False)


# Images and labels ------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def bomb(path: Path) -> None:
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", b"")]
    told = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(told))


@pytest.mark.parametrize(
    ("spoil", "says"), [(cut, "damaged"), (bomb, "at most"), (Path.unlink, "there is no such file")]
)
def test_damaged_images_are_counted_left_out_and_too_many_refused(toy_dataset, tmp_path, spoil, says):
    folder = shutil.copytree(toy_dataset, tmp_path / "data")
    for name in ("000002.jpg", "000003.jpg"):
        spoil(folder / "images" / name)
    with pytest.raises(ValueError, match=rf"2 of 16 images are damaged; the first is .*000002\.jpg.*{says}"):
        train(folder, tmp_path / "run", ONE, device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="2 of 16 .*left out"):
        splits = load_splits(folder, 0.2)
    assert sum(len(s["images"]) for s in splits.values()) == 14
    told = {a["image_id"] for s in splits.values() for a in s["annotations"]}
    assert told == {im["id"] for s in splits.values() for im in s["images"]}


def test_a_training_goes_on_without_the_damaged_image(toy_dataset, tmp_path):
    folder = shutil.copytree(toy_dataset, tmp_path / "data")
    cut(folder / "images" / "000003.jpg")
    with pytest.warns(UserWarning, match=r"1 of 16 .*000003\.jpg"):
        cfg = ONE.model_copy(update=dict(max_broken=0.1))
        out = train(folder, tmp_path / "run", cfg, device="cpu", progress=False)
    assert (out / "weights" / "best.pt").is_file()


def test_none_may_be_damaged_where_none_can_be_left_out(toy_dataset, tmp_path):
    folder = shutil.copytree(toy_dataset, tmp_path / "data")
    data = as_yolo(folder, tmp_path / "yolo")
    cut(folder / "images" / "000003.jpg")
    with pytest.raises(ValueError, match=r"1 of 12 images are damaged"):
        load_splits(data, 0.5)


def test_what_lies_outside_the_image_does_not_cost_the_image(toy_dataset, tmp_path):
    "Ultralytics would drop the whole picture for one number above 1."
    from surgpose.data.yolo import read_yolo

    folder = shutil.copytree(toy_dataset, tmp_path / "data")
    coco = read_coco(folder / "coco_annotations.json")
    coco["annotations"][1]["keypoints"][:3] = [140.0, -7.0, 2.0]
    coco["annotations"][2]["bbox"] = [-20.0, 5.0, 180.0, 60.0]
    write_coco(folder / "coco_annotations.json", coco)
    with pytest.warns(UserWarning, match="lie outside; left out"):
        out = train(folder, tmp_path / "run", ONE, device="cpu", progress=False)
        told = read_yolo(as_yolo(folder, tmp_path / "yolo"))["train"]
    assert len(told["annotations"]) == 12 and (out / "weights" / "best.pt").is_file()
    boxes = np.array([a["bbox"] for a in told["annotations"]])
    assert (boxes[:, :2] >= -1e-6).all() and (boxes[:, :2] + boxes[:, 2:] <= 128 + 1e-6).all()


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("moved", [False, True])
def test_a_cache_beside_the_labels_is_neither_believed_nor_run(toy_dataset, tmp_path, moved):
    data = as_yolo(toy_dataset, tmp_path / "yolo")
    places = [data.parent / "labels" / f"{s}.cache" for s in ("train", "val")]
    if moved:  # the other common layout: train/images beside train/labels
        for s in ("train", "val"):
            (data.parent / s).mkdir()
            for part in ("images", "labels"):
                (data.parent / part / s).rename(data.parent / s / part)
        text = data.read_text()
        for s in ("train", "val"):
            text = text.replace(f"images/{s}", f"{s}/images")
        data.write_text(text)
        places = [data.parent / s / "labels.cache" for s in ("train", "val")]
    for place in places:
        with open(place, "wb") as f:
            np.save(f, np.array(Evil(tmp_path / "it_ran"), dtype=object), allow_pickle=True)
    training._adopt_yolo(data, tmp_path / "own.yaml")
    assert not any(p.exists() for p in places)
    if not moved:
        (data.parent / "labels" / "train.cache").write_bytes(b"stale")
        out = train(data, tmp_path / "run", ONE, device="cpu", progress=False)
        assert (out / "weights" / "best.pt").is_file()
    assert not (tmp_path / "it_ran").exists()


def test_a_config_of_a_size_that_no_config_has(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(ValueError, match="expected YAML of at most"):
        load_config(path)


# Kills, damage, memory --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from surgpose.config import TrainConfig
from surgpose.pose import recipe
from surgpose.pose.train import train
batches = []
def die(self, trainer):
    batches.append(trainer.epoch)
    if batches.count(1) == 2: os.kill(os.getpid(), signal.SIGKILL)
recipe.Progress.on_train_batch_end = die
train(sys.argv[1], sys.argv[2], TrainConfig.model_validate_json(sys.argv[3]), device="cpu", progress=False)
"""


@pytest.fixture(scope="module")
def killed(toy_dataset, tmp_path_factory) -> Path:
    "A training that was killed in the middle of its second epoch."
    ultralytics()  # before a test looks into a checkpoint
    out = tmp_path_factory.mktemp("killed") / "run"
    argv = [sys.executable, "-W", "ignore", "-c", KILLED, str(toy_dataset), str(out), FOUR.model_dump_json()]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    return out


def test_a_killed_training_has_its_epoch_its_optimiser_and_its_numbers_again(
    killed, toy_dataset, tmp_path, monkeypatch
):
    out = shutil.copytree(killed, tmp_path / "run")
    last = out / "training" / "run" / "weights" / "last.pt"
    assert [row["epoch"] for row in rows(out / "training" / "run")] == [1]
    kept = torch.load(last, weights_only=False)
    assert kept["seconds"] > 0
    torch.save({**kept, "seconds": 1000 + kept["seconds"]}, last)
    found, real = [], training._take_up

    def look(trainer, done, spent):
        moments = [float(s["step"]) for s in trainer.optimizer.state.values()]
        found.append((trainer.start_epoch, min(moments), max(moments)))
        real(trainer, done, spent)

    monkeypatch.setattr(training, "_take_up", look)
    train(toy_dataset, out, FOUR, device="cpu", progress=False)
    assert found == [(1, 3.0, 3.0)]  # one epoch is three steps
    told = read_json(out / "provenance.json")
    assert told["resumed_after_epochs"] == 1 and told["seconds"] > 1000 + kept["seconds"]
    whole = train(toy_dataset, tmp_path / "whole", FOUR, device="cpu", progress=False)
    again, times = rows(out), [row["time"] for row in rows(out)]
    assert times[0] < 1000 < times[1] < times[2] and [row["epoch"] for row in again] == [1, 2, 3, 4]
    for mine, theirs in zip(again, rows(whole), strict=True):
        for name in theirs.keys() - {"time"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
    mine, theirs = (read_weights(r / "weights" / "last.pt")["model"].state_dict() for r in (out, whole))
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items()) and mine.keys() == theirs.keys()


@pytest.mark.parametrize("damage", ["cut", "without optimiser"])
def test_a_training_that_cannot_go_on_says_so(killed, toy_dataset, tmp_path, damage):
    out = shutil.copytree(killed, tmp_path / "run")
    last = out / "training" / "run" / "weights" / "last.pt"
    if damage == "cut":
        cut(last)
        says = r"last\.pt: expected an Ultralytics checkpoint"
    else:
        kept = torch.load(last, weights_only=False)
        torch.save({**kept, "optimizer": None}, last)
        says = r"last\.pt: expected the state after epoch 1 to go on from, got epoch 1 and 0 moments"
    with pytest.raises((ValueError, RuntimeError), match=says):
        train(toy_dataset, out, FOUR, device="cpu", progress=False)
    assert not (out / "provenance.json").exists()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory."), RuntimeError("CPUAllocator: can't allocate memory"), MemoryError()],
)
def test_no_memory_is_told_with_what_is_used_and_what_to_change(toy_dataset, tmp_path, monkeypatch, error):
    def fails(self):
        raise error

    real = training.trainer_class
    monkeypatch.setattr(training, "trainer_class", lambda *a: type("Fails", (real(*a),), dict(train=fails)))
    says = r"batch 4 at 64 px \([\d.]+ of [\d.]+ GiB .* in use\); halve train.batch to 2"
    with pytest.raises(RuntimeError, match=says):
        train(toy_dataset, tmp_path / "run", ONE, device="cpu", progress=False)
