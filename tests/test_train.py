"""What a training does with data, sizes, networks, curves and several processes, on drawn tools."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from surgpose.config import TrainConfig
from surgpose.data.coco import read_coco, split_coco
from surgpose.data.yolo import write_yolo
from surgpose.pose import download
from surgpose.pose import train as training
from surgpose.pose.ablate import CAD_NAMES, ablate, ablation_table, read_ablation
from surgpose.pose.model import build_model, cpu_threads, find_weights, memory_in_use, ultralytics
from surgpose.pose.recipe import dataset_facts, trainer_class, transpose_batch, ultralytics_settings
from surgpose.pose.train import train
from surgpose.schema import order_jaws

TINY = TrainConfig(
    imgsz=64, epochs=2, batch=4, weights_init="scratch", warmup_epochs=0, workers=0, bfloat16=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*no initial weights")


@pytest.fixture(scope="module")
def run(toy_dataset, tmp_path_factory) -> Path:
    return train(toy_dataset, tmp_path_factory.mktemp("run") / "a", TINY, device="cpu", progress=False)


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "results.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


# What the network sees --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        dict(fliplr=1.0),
        dict(flipud=1.0),
        dict(fliplr=1.0, flipud=1.0),
        dict(mosaic=1.0, scale=0.4, fliplr=0.5),
    ],
)
def test_jaws_keep_the_names_that_the_image_gives_them(toy_dataset, tmp_path, change):
    "However Ultralytics turns a picture, the left jaw in it is called left, and the box holds the points."
    ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset

    coco = split_coco(read_coco(toy_dataset / "coco_annotations.json"), "train")
    facts = dataset_facts(write_yolo(tmp_path / "yolo", {"train": [(coco, toy_dataset)]}, progress=False))
    plain = dict(fliplr=0, flipud=0, mosaic=0, scale=0, translate=0, hsv=(0, 0, 0))
    cfg = TINY.model_copy(update={**plain, **change, "imgsz": 128})
    args = get_cfg(overrides=ultralytics_settings(cfg, 0, "cpu"))
    dataset = build_yolo_dataset(args, facts["train"], 4, facts, mode="train", stride=32)
    random.seed(0)
    seen = 0
    for i in list(range(len(dataset))) * 3:
        item = dataset[i]
        points = item["keypoints"].numpy()
        whole = points[(points[..., 2] > 0).all(-1)]
        np.testing.assert_allclose(order_jaws(whole), whole)
        if len(points) != 1 or len(whole) != 1 or "mosaic" in change:
            seen += len(whole)
            continue
        centre, size = item["bboxes"].numpy()[0, :2], item["bboxes"].numpy()[0, 2:]
        margin = size / 2 - np.abs(whole[0, :, :2] - centre)
        np.testing.assert_allclose(margin.min(0), 1.5 / 128, atol=1e-5)  # 2 px, and a point is half a px in
        seen += 1
    assert seen >= 4


def bare_trainer(transpose: float, multi_scale: float):
    "A trainer that has no network, and can prepare a batch."
    cls = trainer_class(TINY.model_copy(update=dict(transpose=transpose)), set())
    trainer = cls.__new__(cls)
    trainer.args, trainer.stride = SimpleNamespace(imgsz=128, multi_scale=multi_scale), 32
    trainer.device = torch.device("cpu")
    return trainer


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_the_network_gets_a_batch_transposed_or_as_it_is(chance):
    trainer = bare_trainer(chance, 0.0)
    for _ in range(8):
        pixels = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
        batch = dict(img=pixels, keypoints=torch.rand(3, 5, 3), bboxes=torch.rand(3, 4), cls=torch.rand(3, 1))
        plain = {**batch, "img": pixels.float() / 255}
        expected = transpose_batch(plain) if chance else plain
        got = trainer.preprocess_batch(dict(batch))
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
        assert not torch.equal(plain["keypoints"], transpose_batch(plain)["keypoints"])


def test_sizes_vary_from_batch_to_batch_in_whole_strides():
    trainer = bare_trainer(0.0, 0.5)
    random.seed(0)
    sizes = set()
    for _ in range(60):
        batch = dict(img=torch.zeros(1, 3, 128, 128, dtype=torch.uint8), keypoints=torch.rand(1, 5, 3))
        image = trainer.preprocess_batch(batch)["img"]
        assert image.shape[-1] == image.shape[-2]
        sizes.add(image.shape[-1])
    assert sizes == {64, 96, 128, 160, 192}


def test_training_at_several_sizes_runs_on_a_cpu(toy_dataset, tmp_path):
    cfg = TINY.model_copy(update=dict(multi_scale=0.5, imgsz=96, epochs=1))
    out = train(toy_dataset, tmp_path / "run", cfg, device="cpu", progress=False)
    assert np.isfinite(rows(out)[0]["train/pose_loss"])


# Networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolov8s-pose", "yolo11n-pose", "own.yaml"])
def test_any_pose_network_can_be_built_by_name_or_path(name, tmp_path):
    if name == "own.yaml":
        import yaml

        module = Path(ultralytics().__file__).parent / "cfg" / "models" / "v8" / "yolov8-pose.yaml"
        facts = yaml.safe_load(module.read_text())
        facts["scales"] = {"n": [0.33, 0.125, 512]}
        (tmp_path / name).write_text(yaml.safe_dump(facts))
        name = str(tmp_path / name)
    yolo, carried = build_model(name)
    assert yolo.model.yaml["kpt_shape"] == [5, 3] and yolo.model.yaml["nc"] == 2 and not carried


def test_another_generation_trains(toy_dataset, tmp_path):
    cfg = TINY.model_copy(update=dict(model="yolo11n-pose", epochs=1))
    out = train(toy_dataset, tmp_path / "run", cfg, device="cpu", progress=False)
    assert (out / "weights" / "best.pt").is_file()


def test_official_weights_are_fetched_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGPOSE_CACHE", str(tmp_path / "cache"))

    def unreachable(url: str, path: Path, timeout_s: float) -> None:
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(download, "_receive", unreachable)
    assert find_weights("scratch", "yolov8n-pose") is None
    with pytest.raises(RuntimeError, match=r"no route .*yolov8n-pose\.pt\); on a machine with a network"):
        find_weights("download", "yolov8n-pose")
    with pytest.raises(ValueError, match="expected an official pose network"):
        find_weights("download", "mine.yaml")
    place = download.weights_cache() / "yolov8n-pose.pt"
    assert not place.exists() and not list(tmp_path.rglob("*.tmp*"))
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(tensor=torch.ones(2)), place)
    assert find_weights("download", "yolov8n-pose") == place


# Threads and processes --------------------------------------------------------------------------------------


def test_a_network_on_a_cpu_uses_every_core_it_may():
    code = ("from surgpose.pose.model import ultralytics; ultralytics(); import torch, os; "
            "from ultralytics.utils.torch_utils import select_device; select_device('cpu'); "
            "print(torch.get_num_threads(), os.environ['GOMP_SPINCOUNT'])")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    for told, threads in (({}, len(os.sched_getaffinity(0))), (dict(OMP_NUM_THREADS="1"), 1)):
        argv = [sys.executable, "-c", code]
        done = subprocess.run(argv, capture_output=True, text=True, env={**env, **told}, check=True)
        assert done.stdout.split() == [str(threads), "10000"]
    assert cpu_threads() >= 1 and "GiB of memory" in memory_in_use()


def test_a_training_that_is_handed_to_another_process_is_the_same(toy_dataset, tmp_path, monkeypatch):
    "On several GPUs Ultralytics writes trainer and callbacks to a file, which each process reads and runs."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the other process has: two threads add in another order
    alone = rows(train(toy_dataset, tmp_path / "alone", TINY, device="cpu", progress=False))
    real = training.trainer_class

    def hand_over(self):
        from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

        self.__class__ = type(self).__mro__[1]
        file = generate_ddp_file(self)
        try:
            subprocess.run([sys.executable, "-W", "ignore", file], check=True, capture_output=True)
        finally:
            ddp_cleanup(self, file)
        assert not Path(file).exists()

    over = dict(train=hand_over)
    monkeypatch.setattr(training, "trainer_class", lambda *a: type("Over", (real(*a),), over))
    other = train(toy_dataset, tmp_path / "run", TINY, device="cpu", progress=False)
    for mine, theirs, rel in zip(rows(other), alone, (1e-3, 0.02), strict=True):
        assert mine["train/pose_loss"] == pytest.approx(theirs["train/pose_loss"], rel=rel)
        assert mine["lr/pg0"] == theirs["lr/pg0"]
    assert list((other / "tensorboard").glob("events.*"))


def test_a_batch_is_shared_out_evenly_among_gpus(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "resolve_device", lambda device: device)
    with pytest.raises(ValueError, match="expected a multiple of the 3 GPUs, got 4"):
        train(toy_dataset, tmp_path / "run", TINY, device="0,1,2")
    assert not (tmp_path / "run").exists()


# Curves -----------------------------------------------------------------------------------------------------


def test_the_curves_are_those_of_the_table(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(run / "tensorboard")).Reload()
    names = set(seen.Tags()["scalars"])
    assert {"sigma", "lr/pg0", "train/pose_loss", "val/pose_loss", "metrics/mAP50-95(P)"} <= names
    for name in names - {"sigma"}:
        told = [row[name] for row in rows(run)]
        assert [e.value for e in seen.Scalars(name)] == pytest.approx(told, rel=1e-3, abs=1e-5)
    sigmas = [e.value for e in seen.Scalars("sigma")]
    assert sigmas == pytest.approx([TINY.sigma_start, TINY.sigma_end], rel=1e-5)


# One thing at a time ----------------------------------------------------------------------------------------


def test_an_ablation_trains_on_other_names_and_goes_on_where_it_was(tmp_path):
    some, cfg = {"as it is": {}, CAD_NAMES: {}}, TINY.model_copy(update=dict(epochs=1, batch=8))
    sample = Path(__file__).parents[1] / "data/sample/render"
    results = ablate(sample, tmp_path, cfg, variations=some, device="cpu", progress=False)
    runs = tmp_path / "as_it_is", tmp_path / "jaws_named_by_the_CAD"
    told = [training.read_json(run / "provenance.json")["data_hash"] for run in runs]
    assert told[0] != told[1] and len(ablation_table(results)) == 2
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    again = ablate(sample, tmp_path, cfg, variations=some, device="cpu", progress=False)
    assert again == results == read_ablation(tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
