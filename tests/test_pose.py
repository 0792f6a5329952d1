"""Training, evaluation and prediction, on drawn tools and with networks that have learned next to nothing."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from surgpose.config import EvaluateConfig, PredictConfig, TrainConfig, shared_dir
from surgpose.data.coco import new_coco, read_coco, split_coco, write_coco
from surgpose.data.yolo import write_yolo
from surgpose.files import read_json
from surgpose.geometry import oks
from surgpose.pose.evaluate import evaluate, score
from surgpose.pose.model import build_model, load_model, read_weights, ultralytics, write_weights
from surgpose.pose.openvino import export_files
from surgpose.pose.predict import poses_of_result, predict, predict_frames, read_predictions
from surgpose.pose.recipe import transpose_batch
from surgpose.pose.train import _adopt_yolo, load_splits, train
from surgpose.schema import FLIP_IDX, LENIENT_SIGMAS, SIGMAS, Frame, order_jaws

TINY = TrainConfig(imgsz=96, epochs=2, batch=4, weights_init="scratch", warmup_epochs=0, workers=0)
pytestmark = pytest.mark.filterwarnings("ignore:.*no initial weights")


@pytest.fixture(scope="module")
def run(toy_dataset, tmp_path_factory) -> Path:
    return train(toy_dataset, tmp_path_factory.mktemp("run") / "a", TINY, device="cpu", progress=False)


def losses(folder: Path) -> list[float]:
    with open(folder / "results.csv") as f:
        return [float(row["train/pose_loss"]) for row in csv.DictReader(f)]


# Training ---------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_it_promises(run):
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name[0] != "."}
    curves = {f for f in files if f.startswith("tensorboard/events.")}
    assert len(curves) == 1
    weights = {"weights/best.pt", "weights/last.pt"}
    assert files - curves == {"config.yaml", "results.csv", "provenance.json"} | weights
    facts = read_json(run / "provenance.json")
    assert facts["seed"] == 0 and facts["device"] == "cpu" and facts["tensors_carried"] == 0
    assert {"config_hash", "data_hash", "weights_sha256", "code_hash", "versions", "seconds"} <= set(facts)
    assert len(losses(run)) == 2 and np.isfinite(losses(run)).all()


def test_a_checkpoint_is_small_and_carries_no_paths(run):
    data = (run / "weights" / "best.pt").read_bytes()
    assert len(data) < 8e6 and str(run.parent).encode() not in data and b"/home/" not in data
    assert read_weights(run / "weights" / "best.pt")["surgpose"]["imgsz"] == 96
    assert next(load_model(run / "weights" / "last.pt").model.parameters()).dtype == torch.float32


def test_a_finished_training_is_not_repeated_and_another_one_is_refused(run, toy_dataset):
    before = (run / "weights" / "best.pt").stat().st_mtime_ns
    assert train(toy_dataset, run, TINY, device="cpu") == run
    assert (run / "weights" / "best.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"lr0 was 0\.001, is 0\.1"):
        train(toy_dataset, run, TINY.model_copy(update=dict(lr0=0.1)), device="cpu")
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train(toy_dataset, run, TINY, seed=1, device="cpu")


def test_other_pixels_are_another_training(run, toy_dataset, tmp_path):
    folder, again = shutil.copytree(toy_dataset, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
    image = folder / "images" / "000001.jpg"
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    with pytest.raises(ValueError, match="images_hash was"):
        train(folder, again, TINY, device="cpu")
    told = yaml.safe_load((again / "config.yaml").read_text())
    assert told.pop("images_hash") == read_json(again / "provenance.json")["images_hash"]
    (again / "config.yaml").write_text(yaml.safe_dump(told))
    assert train(folder, again, TINY, device="cpu") == again  # as old as that, it says nothing of images


@pytest.mark.parametrize("wrong", [
    dict(model="yolov8q-pose"), dict(model="no.yaml"), dict(weights_init="state.pt"),
])
def test_a_network_that_cannot_be_built_leaves_nothing_behind(toy_dataset, tmp_path, monkeypatch, wrong):
    torch.save({"tensor": torch.ones(2)}, tmp_path / "state.pt")
    monkeypatch.chdir(tmp_path)
    cfg = TrainConfig.model_validate({**TINY.model_dump(), **wrong})
    with pytest.raises(ValueError, match="expected a pose model|none of its 1 tensors fits"):
        train(toy_dataset, tmp_path / "run", cfg, device="cpu")
    assert not (tmp_path / "run").exists()


KILLED = """
import os, signal, sys
from surgpose.config import TrainConfig
from surgpose.pose import recipe
from surgpose.pose.train import train
def die(self, trainer):
    if trainer.epoch == 0: os.kill(os.getpid(), signal.SIGKILL)
recipe.Progress.on_fit_epoch_end = die
train(sys.argv[1], sys.argv[2], TrainConfig.model_validate_json(sys.argv[3]), device="cpu", progress=False)
"""


def test_a_killed_training_ends_in_the_same_numbers(run, toy_dataset, tmp_path):
    out = tmp_path / "killed"
    argv = [sys.executable, "-W", "ignore", "-c", KILLED, str(toy_dataset), str(out), TINY.model_dump_json()]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    weights = out / "training" / "run" / "weights"
    assert not (out / "provenance.json").exists() and (weights / "last.pt").is_file()
    (weights / ".1-a.tmp.pt").write_bytes(b"half a checkpoint")
    train(toy_dataset, out, TINY, device="cpu", progress=False)
    assert read_json(out / "provenance.json")["resumed_after_epochs"] == 1
    assert losses(out) == pytest.approx(losses(run), rel=1e-6)
    torn, whole = (read_weights(r / "weights" / "last.pt")["model"].state_dict() for r in (out, run))
    assert all(torch.equal(v, whole[k]) for k, v in torn.items()) and torn.keys() == whole.keys()
    assert not (out / "training").exists()


def test_the_same_seed_trains_the_same_network(run, toy_dataset, tmp_path):
    again = train(toy_dataset, tmp_path / "b", TINY, device="cpu", progress=False)
    assert losses(again) == pytest.approx(losses(run), rel=1e-4)


def test_a_yaml_made_for_ultralytics_can_be_trained_on(toy_dataset, tmp_path):
    coco = read_coco(toy_dataset / "coco_annotations.json")
    data = write_yolo(tmp_path / "yolo", {s: [(split_coco(coco, s), toy_dataset)] for s in ("train", "val")},
                      progress=False)
    one = TINY.model_copy(update=dict(epochs=1, imgsz=64))
    run = train(data, tmp_path / "run", one, device="cpu", progress=False)
    assert (run / "weights" / "best.pt").is_file()
    facts = yaml.safe_load(data.read_text())
    data.write_text(yaml.safe_dump({**facts, "names": dict(enumerate(["tweezers", "needle_holder"]))}))
    with pytest.raises(ValueError, match="in this order"):
        train(data, tmp_path / "other", one, device="cpu")
    plain = {k: v for k, v in facts.items() if k not in ("flip_idx", "kpt_oks_sigmas")}
    for told in ({}, dict(flip_idx=list(FLIP_IDX))):
        data.write_text(yaml.safe_dump({**plain, **told}))
        _adopt_yolo(data, tmp_path / "own.yaml")
        own = yaml.safe_load((tmp_path / "own.yaml").read_text())
        assert (own["flip_idx"], own["kpt_oks_sigmas"]) == (list(FLIP_IDX), list(SIGMAS))
    data.write_text(yaml.safe_dump({**facts, "flip_idx": [0, 1, 2, 3, 4]}))
    with pytest.raises(ValueError, match=r"flip_idx \[0, 2, 1, 3, 4\], got \[0, 1, 2, 3, 4\]; mend it"):
        train(data, tmp_path / "other", one, device="cpu")


@pytest.mark.parametrize(("change", "says"), [
    (lambda c: c["images"].clear() or c["annotations"].clear(), "the split 'train', got none"),
    (lambda c: [im.update(split="train") for im in c["images"]], "the split 'val', got none"),
    (lambda c: c["annotations"].clear(), "expected labelled tools"),
    (lambda c: [im.pop("split") for im in c["images"]], "assign_splits"),
])
def test_data_that_cannot_be_learned_from_are_refused_at_once(toy_dataset, tmp_path, change, says):
    folder = shutil.copytree(toy_dataset, tmp_path / "data")
    coco = read_coco(folder / "coco_annotations.json")
    change(coco)
    write_coco(folder / "coco_annotations.json", coco)
    with pytest.raises(ValueError, match=says):
        train(folder, tmp_path / "run", TINY, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "says"), [
    (RuntimeError("CUDA out of memory. Tried 2 GiB"), r"halve train\.batch to 2, or lower train\.imgsz"),
    (MemoryError(), r"batch 4 at 96 px"),
    (RuntimeError("something else"), "something else"),
])
def test_no_memory_is_answered_with_what_to_change(toy_dataset, tmp_path, monkeypatch, error, says):
    from surgpose.pose import train as module

    def fails(self):
        raise error

    real = module.trainer_class
    monkeypatch.setattr(module, "trainer_class", lambda *a: type("Fails", (real(*a),), dict(train=fails)))
    with pytest.raises(RuntimeError, match=says):
        train(toy_dataset, tmp_path / "run", TINY, device="cpu", progress=False)
    assert not (tmp_path / "run" / "provenance.json").exists()
    less, says = TINY.model_copy(update=dict(batch=2)), says if "something" in says else "batch 2 at"
    with pytest.raises(RuntimeError, match=says):  # nothing was learned, so the same folder serves again
        train(toy_dataset, tmp_path / "run", less, device="cpu", progress=False)


def test_a_loss_that_is_no_number_stops_the_training(toy_dataset, tmp_path):
    cfg = TINY.model_copy(update=dict(lr0=1.0, head_lr=1e30))
    with pytest.raises(RuntimeError, match=r"not a number in epoch \d; lower train\.lr0"):
        train(toy_dataset, tmp_path / "run", cfg, device="cpu", progress=False)


def test_a_broken_image_is_named_before_training(toy_dataset, tmp_path):
    folder = shutil.copytree(toy_dataset, tmp_path / "data")
    image = folder / "images" / "000003.jpg"
    image.write_bytes(image.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"000003\.jpg"):
        load_splits(folder)


def test_a_transposed_batch_keeps_points_on_the_pictures_they_mark():
    image = torch.zeros(1, 3, 16, 16)
    points = torch.tensor([[2.0, 3, 2], [1, 4, 2], [5, 2, 2], [8, 8, 2], [12, 14, 2]])
    points = torch.as_tensor(order_jaws(points.numpy()))
    for value, (x, y, _) in enumerate(points.tolist(), 1):
        image[0, :, int(y), int(x)] = value
    shares = points.clone()
    shares[:, :2] = (points[:, :2] + 0.5) / 16
    batch = dict(img=image, keypoints=shares[None].float(), bboxes=torch.tensor([[0.5, 0.25, 0.2, 0.4]]))
    turned = transpose_batch(batch)
    xy = (turned["keypoints"][0, :, :2] * 16 - 0.5).round().long()
    values = [turned["img"][0, 0, y, x].item() for x, y in xy.tolist()]
    assert values == [1, 3, 2, 4, 5]  # the jaws changed names, the others stayed
    assert turned["bboxes"].tolist() == [pytest.approx([0.25, 0.5, 0.4, 0.2])]


# Weights ----------------------------------------------------------------------------------------------------


def starting_from(weights: Path) -> TrainConfig:
    return TINY.model_copy(update=dict(weights_init=weights))


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("packed", [
    lambda evil, path: path.write_bytes(pickle.dumps(evil)),
    lambda evil, path: torch.save(evil, path),
    lambda evil, path: torch.save({"model": evil}, path),
    lambda evil, path: torch.save({"a": torch.ones(1), "b": evil}, path),
])
def test_code_in_weights_does_not_run(tmp_path, packed, toy_dataset):
    target, weights = tmp_path / "it_ran", tmp_path / "evil.pt"
    packed(Evil(target), weights)
    for use in (read_weights, load_model, lambda w: build_model("yolov8n-pose", w),
                lambda w: predict(toy_dataset, tmp_path / "out", weights=w, device="cpu"),
                lambda w: train(toy_dataset, tmp_path / "run", starting_from(w), device="cpu")):
        with pytest.raises(ValueError, match=r"evil\.pt: expected an Ultralytics checkpoint"):
            use(weights)
    assert not target.exists()


def test_missing_and_foreign_weights_are_refused(tmp_path, toy_dataset):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: .* initial weights.* 'scratch' or 'download'"):
        train(toy_dataset, tmp_path / "run", starting_from(tmp_path / "none.pt"), device="cpu")
    for name in (tmp_path / "none.pt", "scratch", "download"):
        for use in (lambda w: predict(toy_dataset, tmp_path / "out", weights=w, device="cpu"),
                    lambda w: evaluate(w, toy_dataset, tmp_path / "out", device="cpu"),
                    lambda w: export_files(w, tmp_path / "out", "onnx")):
            with pytest.raises(FileNotFoundError, match=f"{name}: .* checkpoint of a trained network"):
                use(name)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="give it as weights_init, and the network's name as model"):
        build_model(str(tmp_path / "surgpose-n.pt"))
    ultralytics()
    from ultralytics.nn.tasks import PoseModel

    people = PoseModel("yolov8n-pose.yaml", verbose=False)
    people.names = {0: "person"}
    write_weights(tmp_path / "people.pt", people, dict(imgsz=64))
    with pytest.raises(ValueError, match="got person with 17"):
        load_model(tmp_path / "people.pt")


def test_nobody_is_asked_for_anything(tmp_path):
    "Importing, building and predicting open no connection."
    code = """
import socket, sys, warnings
def refuse(*args, **kwargs): raise SystemExit(f"network: {args}")
socket.create_connection = socket.getaddrinfo = refuse; socket.socket.connect = refuse
warnings.simplefilter("ignore")
import numpy as np
from surgpose.pose.model import build_model, ultralytics
ultralytics()
image = np.zeros((64, 64, 3), np.uint8)
build_model("yolov8n-pose")[0].predict(image, imgsz=64, device="cpu", verbose=False)
print("quiet")
"""
    env = {**os.environ, "YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "quiet\n", done.stdout + done.stderr


@pytest.mark.skipif(shared_dir() is None, reason="no shared folder with COCO weights")
def test_coco_weights_carry_over():
    yolo, carried = build_model("yolov8n-pose", shared_dir() / "weights" / "yolov8n-pose_coco_statedict.pt")
    assert (len(carried), len(yolo.model.state_dict())) == (385, 397)


def test_training_from_nothing_says_so():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="starts from random numbers.*, or say weights_init=download"):
            build_model("yolov8n-pose")


# Evaluation -------------------------------------------------------------------------------------------------


def found_of(truth: dict, shift_px: float = 0.0) -> list[dict]:
    def moved(a: dict) -> list[float]:
        return (np.reshape(a["keypoints"], (5, 3)) + [shift_px, 0, 0]).ravel().tolist()
    kept = ("image_id", "category_id", "bbox")
    return [dict({k: a[k] for k in kept}, score=0.9, keypoints=moved(a)) for a in truth["annotations"]]


def test_perfect_predictions_score_one_and_shifted_ones_what_their_oks_says(toy_dataset):
    truth = read_coco(toy_dataset / "coco_annotations.json")
    assert score(truth, found_of(truth))["AP"] == score(truth, found_of(truth))["box_AP"] == 1
    area = {a["area"] for a in truth["annotations"]}
    same = {**truth, "annotations": [{**a, "area": max(area)} for a in truth["annotations"]]}
    kpts = np.reshape(same["annotations"][0]["keypoints"], (1, 5, 3))
    for sigmas in (SIGMAS, LENIENT_SIGMAS):
        for shift in (1.0, 3.0, 6.0):
            similarity = oks(kpts, kpts + [shift, 0, 0], [max(area)], sigmas)[0, 0]
            expected = np.mean(similarity >= np.linspace(0.5, 0.95, 10))
            assert score(same, found_of(same, shift), sigmas=sigmas)["AP"] == pytest.approx(expected)


def test_evaluation_of_a_network_is_written_and_finite(run, toy_dataset, tmp_path):
    cfg = EvaluateConfig(bootstrap=10)
    result = evaluate(run / "weights" / "best.pt", toy_dataset, tmp_path, cfg, device="cpu", progress=False)
    assert read_json(tmp_path / "metrics.json") == result
    assert result["n_images"] == 4 and result["provenance"]["imgsz"] == 96
    assert result["lenient"]["AP"] >= result["strict"]["AP"] >= 0 and result["strict"]["sigma"] == 0.05
    with pytest.raises(ValueError, match="split 'test', got none"):
        evaluate(run / "weights" / "best.pt", toy_dataset, tmp_path, cfg, device="cpu", split="test")


def test_an_empty_truth_has_no_score_but_a_reason():
    empty = new_coco([dict(id=1, file_name="a.jpg", width=9, height=9)], [])
    result = score(empty, [])
    assert np.isnan(result["AP"]) and result["reason"] == "there is no tool in 1 images"


# Prediction -------------------------------------------------------------------------------------------------


def test_poses_are_what_ultralytics_found(run, toy_dataset):
    "Same boxes, scores and points, but for the half pixel between a corner and a centre."
    from surgpose.data.video import read_image

    model, image = load_model(run / "weights" / "best.pt"), read_image(toy_dataset / "images" / "000001.jpg")
    raw = model.predict(image, imgsz=96, conf=0.0, max_det=5, device="cpu", verbose=False)[0]
    cfg = PredictConfig(conf=0.0, max_det=5, iou=0.7, same_tool=1.0)
    (_, _, poses), = predict_frames(model, [(Frame("1.jpg", 128, 128), image)], cfg, device="cpu")
    order = np.argsort(-raw.boxes.conf.numpy(), kind="stable")
    assert len(poses) == 5
    points = raw.keypoints.data.numpy()[order]
    np.testing.assert_allclose(poses.keypoints[..., :2], points[..., :2] - 0.5, atol=1e-3)
    np.testing.assert_allclose(poses.keypoints[..., 2], points[..., 2], atol=1e-6)
    np.testing.assert_allclose(poses.xywh_px[:, 2:], raw.boxes.xywh.numpy()[order][:, 2:], atol=1e-3)
    assert poses.category_id.tolist() == (raw.boxes.cls.numpy()[order] + 1).tolist()
    assert len(poses_of_result(raw[[]])) == 0


def test_a_folder_is_predicted_into_files_that_agree(run, toy_dataset, tmp_path):
    cfg, weights = PredictConfig(conf=0.0, max_det=2, same_tool=1.0, stride=4), run / "weights" / "best.pt"
    out = predict(toy_dataset, tmp_path, cfg, weights=weights, device="cpu", progress=False)
    rows = read_predictions(out)
    assert [f.file_name for f, _ in rows] == [f"{i:06d}.jpg" for i in (0, 4, 8, 12)]
    with open(out / "predictions.csv") as f:
        assert len(list(csv.DictReader(f))) == sum(len(p) for _, p in rows) == 8
    assert sorted(p.name for p in (out / "overlay").iterdir()) == [f.file_name for f, _ in rows]
