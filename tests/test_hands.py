"""Hands on tools that are not of the project's own making, and what the splits keep from each other."""

import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree

from surgpose.config import RenderConfig, shared_dir
from surgpose.geometry import rigid, transform
from surgpose.schema import TIP
from surgpose.synth.gloves import hand_parts
from surgpose.synth.grips import GRIPS, grip, sample_hand_look
from surgpose.synth.hands import capsule_distance
from surgpose.synth.mesh_import import export_tool, import_obj, import_surgeonet
from surgpose.synth.parts import ToolPlacement
from surgpose.synth.placing import turned
from surgpose.synth.scene import sample_scene
from surgpose.synth.tools import build_tool, opening_range, parametric_asset

INDEX, THUMB = 11, 23  # rows of a hand's capsules that end in these fingers' ends


def gaps_mm(asset, style, seed):
    """Skin to steel of index finger and thumb, and the nearest that the hand comes to the tip, in mm."""
    rng = np.random.default_rng(seed)
    opening = 0.6 * opening_range(asset)[0] + 0.4 * opening_range(asset)[1]
    tool, R = build_tool(asset, opening), turned(rng.uniform(0, 6.3), 0.3, rng.normal(0, 0.2))
    T = rigid(R, [0, 0, 0.03] - R @ tool.keypoints_m[TIP])
    hand = grip(rng, ToolPlacement(asset, asset["class"], T, opening, {}, True), style=style)
    steel = transform(T, trimesh.sample.sample_surface(tool.mesh, 4000, seed=1)[0])
    gap = cKDTree(steel).query(hand.capsules[[INDEX, THUMB], 3:6])[0] - hand.capsules[[INDEX, THUMB], 7]
    return *(1e3 * gap), 1e3 * capsule_distance(transform(T, tool.keypoints_m[:3]), hand.capsules).min()


@pytest.mark.parametrize("class_name", GRIPS)
def test_hands_hold_a_mesh_from_a_file(class_name, tmp_path):
    obj, sidecar = export_tool(parametric_asset(class_name), 8.0, tmp_path, "some")
    asset = import_obj(obj, sidecar, class_name)
    for style in GRIPS[class_name]:
        rows = np.array([gaps_mm(asset, style, seed) for seed in range(8)])
        assert np.abs(np.median(rows[:, :2], 0)).max() < 6, (style, rows.round(1))
        assert rows[:, 2].min() > 8, (style, rows.round(1))


def test_hands_hold_a_scanned_needle_holder():
    folder = shared_dir()
    if folder is None or not (folder / "cad/surgeonet/Nadelhalter.obj").is_file():
        pytest.skip("needs cad/surgeonet of the shared data (SURGPOSE_SHARED, or ../shared)")
    cad = folder / "cad/surgeonet"
    asset = import_surgeonet(cad / "Nadelhalter.obj", cad / "kps.csv", "Nadelhalter", "needle_holder")
    rows = np.array([gaps_mm(asset, "rings", seed) for seed in range(6)])
    assert np.abs(np.median(rows[:, :2], 0)).max() < 10 and rows[:, 2].min() > 40, rows.round(1)


def test_splits_have_hues_that_training_lacks_and_training_has_white():
    splits = ("train", "val", "test")
    looks = {s: [sample_hand_look(np.random.default_rng(i), s) for i in range(300)] for s in splits}
    for part in ("glove", "arm"):
        hues = {}
        for split, some in looks.items():
            colours = np.array([look["material"][part]["colour"] for look in some])
            hues[split] = set(map(tuple, (colours / colours.max(1, keepdims=True)).round(1).tolist()))
        assert hues["val"] - hues["train"] and hues["test"] - hues["train"], part
    white = [look["colour"] for look in looks["train"] if min(look["colour"]) > 0.5]
    assert len(white) > 30, "real gloves are white: training must have them"


def test_a_hand_is_made_from_its_scene_alone():
    cfg = RenderConfig(strategy_mix={"theatre": 1.0})
    hands = [o for i in range(6) for o in sample_scene(i, 0, cfg).occluders if o.kind == "hand"]
    again = [o for i in range(6) for o in sample_scene(i, 0, cfg).occluders if o.kind == "hand"]
    assert hands
    for one, two in zip(hands[:4], again, strict=False):
        for a, b in zip(hand_parts(one), hand_parts(two), strict=True):
            assert a.role == b.role and np.array_equal(a.vertices_m, b.vertices_m)
            assert a.faces.max() < len(a.vertices_m)
        assert sum(len(p.faces) for p in hand_parts(one)) < 25_000
