"""What a teacher says of unlabelled video, and what may be held against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from surgpose.adapt.augment import VIEWS, View, show_view, take_back
from surgpose.adapt.fit import fit_tools, guess_camera
from surgpose.adapt.pseudo import (
    FILTERS,
    REASONS,
    candidates,
    frame_states,
    read_candidates,
    write_candidates,
)
from surgpose.adapt.scripted import scripted_clip
from surgpose.config import PredictConfig, PseudoConfig, TrackConfig
from surgpose.data.video import write_video
from surgpose.files import read_jsonl
from surgpose.geometry import box_of_keypoints, project, transform
from surgpose.schema import CLASSES, Frame, Poses, order_jaws
from surgpose.synth.tools import build_tool, opening_range, sample_asset

FRAME = Frame("v", 640, 480)


# Geometry -----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(CLASSES), st.floats(0, 1), st.floats(-55, 55),
       st.floats(-180, 180))
def test_a_true_view_of_a_tool_is_never_doubted(seed, name, share, tilt, turn):
    "Tools that nobody trains on, at any opening and turn, seen by another camera than the one assumed."
    rng = np.random.default_rng(seed)
    asset = sample_asset(name, rng, split="test")
    c, s = np.cos(np.radians([tilt, turn])), np.sin(np.radians([tilt, turn]))
    turned = np.array([[c[1], -s[1], 0], [s[1], c[1], 0], [0, 0, 1]])
    tilted = np.array([[c[0], 0, s[0]], [0, 1, 0], [-s[0], 0, c[0]]])
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = turned @ tilted, (0, 0, 0.5)
    xyz = transform(T, build_tool(asset, share * opening_range(asset)[1]).keypoints_m)
    xy = project(xyz, np.array([[800, 0, 319.5], [0, 800, 239.5], [0, 0, 1]]))
    k = order_jaws(np.column_stack([xy, np.ones(5)]))
    poses = Poses([CLASSES.index(name) + 1], [0.9], [box_of_keypoints(k, 0.05)], k[None])
    assert fit_tools(poses, guess_camera(FRAME)).misfit[0] < 0.03


def test_a_tip_beside_its_jaws_keeps_its_frame_out():
    clip = scripted_clip(6, faults=False)
    frame, poses = clip[2]
    wrong = poses.keypoints.copy()
    wrong[0, 0, :2] += (30, 0)
    found = candidates([*clip[:2], (frame, replace(poses, keypoints=wrong)), *clip[3:]], PseudoConfig())
    assert [n for n in found.table.reasons if n] == [("geometry",)]
    assert frame_states(found)[frame.index] == "doubtful"
    lax = candidates([(frame, replace(poses, keypoints=wrong))], PseudoConfig(max_misfit=1))
    assert [n for n in lax.table.reasons if n] == []


def test_every_doubt_has_a_filter_and_a_meaning():
    filtered = [name for names in FILTERS.values() for name in names]
    assert sorted([*filtered, "gap", "rejected"]) == sorted(REASONS) and all(REASONS.values())


# Other views --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 7), st.booleans())
def test_views_are_undone_to_the_pixel(width, height, quarters, mirrored):
    image = np.arange(width * height).reshape(height, width, 1)
    seen = show_view(image, View("any", mirrored, quarters))
    y, x = np.indices(seen.shape[:2]).reshape(2, -1)
    points = np.repeat(np.stack([x, y, 0 * x + 1.0], -1)[:, None], 5, 1)
    boxes = np.stack([x, y, 0 * x + 1, 0 * x + 1], -1)
    found = Poses(0 * x + 1, 0.5 + 0 * x, boxes, points)
    back = take_back(found, View("any", mirrored, quarters), width, height)
    at = back.keypoints[:, 0, :2].astype(int)
    assert (image[at[:, 1], at[:, 0], 0] == seen[y, x, 0]).all()
    assert (back.xywh_px == np.column_stack([at, np.ones_like(at)])).all()


def test_a_network_is_asked_again_and_a_killed_run_goes_on(tmp_path):
    "Random weights see tools everywhere; what matters is that the line holds."
    import torch

    from surgpose.pipeline import propose_labels
    from surgpose.pose.model import build_model, write_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yolo, _ = build_model("yolov8n-pose", None)
    weights = write_weights(tmp_path / "random.pt", yolo.model, dict(imgsz=64))
    noise = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), np.uint8)
    with write_video(tmp_path / "noise.mp4", fps=10, width=64, height=48) as film:
        for image in noise:
            film.write(image)
    cfg = PseudoConfig(stride=1, doubt_conf=0, det_conf=0, kp_conf=0, augment=("flip", "turn"))
    plain = PredictConfig(backend="torch")
    propose_labels(
        tmp_path / "noise.mp4", weights, tmp_path / "out", cfg, TrackConfig(), base=plain, device="cpu")
    table = read_candidates(tmp_path / "out" / "candidates.json").table
    assert len(table) and table[table.score > 0].support.between(0, 1).all()
    assert {"unsupported", "spread"} & {name for names in table.reasons for name in names}
    path = tmp_path / "out" / "all" / "augmented.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines[: len(lines) - 30])
    propose_labels(
        tmp_path / "noise.mp4", weights, tmp_path / "out", cfg, TrackConfig(), base=plain, device="cpu")
    assert len(read_jsonl(path)) == 4
    again = read_candidates(tmp_path / "out" / "candidates.json").table
    assert again.reasons.tolist() == table.reasons.tolist()


def test_candidates_of_an_older_program_are_still_read(tmp_path):
    import json

    found = candidates(scripted_clip(4), PseudoConfig())
    path = write_candidates(Path(tmp_path) / "candidates.json", found)
    data = json.loads(path.read_text())
    for row in data["rows"]:
        for name in ("misfit", "spread", "flip", "support"):
            del row[name]
    path.write_text(json.dumps(data))
    old = read_candidates(path)
    assert old.table.reasons.tolist() == found.table.reasons.tolist() and old.table.misfit.isna().all()


def test_every_view_of_the_setting_is_another_look_at_the_same_tool():
    offered = get_args(get_args(PseudoConfig.model_fields["augment"].annotation)[0])
    assert set(offered) == set(VIEWS)
    image = cv2.cvtColor(np.random.default_rng(0).integers(0, 255, (30, 40), np.uint8), cv2.COLOR_GRAY2BGR)
    looks = [(view, show_view(image, view)) for views in VIEWS.values() for view in views]
    assert len({(seen.shape, seen.tobytes(), view.zoom) for view, seen in looks}) == len(looks)
    for view, seen in looks:
        assert view.zoom != 1 or seen.shape != image.shape or (seen != image).any()
