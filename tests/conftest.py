"""Data that several tests share: a handful of drawn tools with exact keypoints."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# a shell's background job ignores Ctrl-C, and so would every process that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before a test imports torch; `pose.model` tells why

import cv2
import numpy as np
import pytest
from hypothesis import settings

from surgpose.adapt.scripted import scripted_clip
from surgpose.data.coco import new_coco, write_coco
from surgpose.data.draw import draw_poses
from surgpose.data.video import write_video
from surgpose.schema import order_jaws

# The same examples in every run: a suite that fails by chance teaches people to run it again. To look for new
# failures, run with --hypothesis-profile=default.
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")


def draw_toys(folder: Path, n: int = 16, size: int = 128, seed: int = 0) -> Path:
    "Write a dataset folder of V-shaped tools, one per picture; every fourth picture is for validation."
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, rows = [], []
    for i in range(n):
        angle, length = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.3, 0.4)
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]]) * size * 0.08
        hinge = np.full(2, size / 2) + rng.uniform(-0.08, 0.08, 2) * size
        tip = hinge + along * length
        points = np.stack([tip, tip - across, tip + across, hinge, hinge - along * length])
        points = order_jaws(np.c_[points, np.full(5, 2.0)])
        image = rng.integers(40, 90, (size, size, 3), dtype=np.uint8)
        for a, b in ((1, 3), (2, 3), (3, 4)):
            ends = [tuple(int(v) for v in points[k, :2].round()) for k in (a, b)]
            cv2.line(image, *ends, (230, 220, 210) if i % 2 else (90, 190, 240), 3)
        name = f"images/{i:06d}.jpg"
        cv2.imwrite(str(folder / name), image)
        low, high = points[:, :2].min(0) - 2, points[:, :2].max(0) + 2
        images.append(dict(id=i + 1, file_name=name, width=size, height=size, scene=i, strategy="studio",
                           split="train" if i % 4 else "val"))
        rows.append(dict(id=i + 1, image_id=i + 1, category_id=1 + i % 2, bbox=[*low, *(high - low)],
                         area=float(0.4 * np.prod(high - low)), keypoints=points.ravel().tolist()))
    write_coco(folder / "coco_annotations.json", new_coco(images, rows))
    return folder


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory) -> Path:
    "A dataset folder of 16 pictures of 128 px: 12 to train on, 4 for validation."
    return draw_toys(tmp_path_factory.mktemp("toy") / "dataset")


@pytest.fixture(scope="session")
def trained_toy(tmp_path_factory) -> Path:
    "A checkpoint that predict and evaluate accept; it has learned nothing."
    import warnings

    from surgpose.pose.model import build_model, write_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yolo, _ = build_model()
    return write_weights(tmp_path_factory.mktemp("weights") / "toy.pt", yolo.model, dict(imgsz=96))


def film_scripted(path: Path, samples: int = 40) -> Path:
    "Film the scripted clip, each sample for two frames, with the tools drawn on a plain backdrop."
    backdrop = np.full((360, 640, 3), 215, np.uint8)
    with write_video(path, fps=25, width=640, height=360) as film:
        for _, poses in scripted_clip(samples, faults=False):
            for _ in range(2):
                film.write(draw_poses(backdrop, poses, labels=False))
    return path
