"""Theatres as a whole: nothing sinks, tips are in place, splits share nothing, the config counts."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
import trimesh

from surgpose.config import RenderConfig
from surgpose.geometry import invert_rigid, project, transform
from surgpose.schema import HANDLE, TIP
from surgpose.synth.parts import Scene, ToolPlacement
from surgpose.synth.props import prop_parts
from surgpose.synth.scene import sample_scene
from surgpose.synth.theatre import sample_theatre
from surgpose.synth.tools import build_tool

SCENES = 10
FAMILIES = ("trainer", "operating_room")


@cache
def scenes(family: str, split: str = "train") -> tuple[Scene, ...]:
    cfg = RenderConfig(theatre_mix={family: 1}, width=480, height=270, intrinsics_jitter=0)
    return tuple(sample_theatre(i, 3, cfg, split, np.random.default_rng([3, i])) for i in range(SCENES))


def points(placed: ToolPlacement) -> np.ndarray:
    return transform(placed.T_world_tool, build_tool(placed.asset, placed.opening_deg).keypoints_m)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tool_is_sunk(family):
    "trimesh's ray caster is asked for the height of skin, cloths and boxes at every seventh vertex."
    asked = 0
    for scene in scenes(family)[:8]:
        for prop in scene.props:
            if prop.kind not in ("mound", "cuff", "drape", "box", "gauze"):
                continue
            for part in prop_parts(prop):
                faces = trimesh.geometry.triangulate_quads(part.faces)
                mesh = trimesh.Trimesh(transform(prop.T_world_prop, part.vertices_m), faces, process=False)
                for placed in scene.tools:
                    tool = build_tool(placed.asset, placed.opening_deg)
                    xyz = transform(placed.T_world_tool, tool.mesh.vertices)[::7]
                    down = np.tile([0, 0, -1.0], (len(xyz), 1))
                    at, ray, _ = mesh.ray.intersects_location(xyz + [0, 0, 1], down, multiple_hits=False)
                    asked += len(at)
                    assert not len(at) or (at[:, 2] - xyz[ray, 2]).max() < 0.003, (scene.index, prop.kind)
    assert asked > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_held_tips_are_in_the_middle_of_the_picture_and_hands_hold(family):
    shares = []
    for scene in scenes(family):
        for hand in scene.occluders:
            if hand.holds is not None:
                placed = scene.tools[hand.holds]
                assert placed.held and hand.travel_m == placed.travel_m
                mesh = build_tool(placed.asset, placed.opening_deg).mesh
                near = transform(placed.T_world_tool, mesh.vertices)[:, None] - hand.capsules[9:, 3:6]
                assert np.linalg.norm(near, axis=-1).min() < 0.03
        camera = scene.cameras[0]
        for placed in scene.tools:
            tip = project(transform(invert_rigid(camera.T_world_cam), points(placed)[[TIP]]), camera.K)[0]
            off = np.abs(tip / (camera.width - 1, camera.height - 1) - 0.5).max()
            shares += [off] if placed.held else []
        assert {h.holds for h in scene.occluders} - {None} == {i for i, t in enumerate(scene.tools) if t.held}
    assert np.mean(np.array(shares) < 0.5) > 0.9 and np.median(shares) < 0.25


def test_needle_holders_come_from_either_side():
    "Most surgeons are right-handed; pictures are turned back by the side the other tool comes from."
    sides = Counter()
    for scene in scenes("trainer") + scenes("operating_room"):
        for placed in scene.tools:
            if placed.held and placed.class_name == "needle_holder":
                sides["right" if points(placed)[HANDLE, 0] > points(placed)[TIP, 0] else "left"] += 1
    assert sides["right"] > sides["left"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_nothing(family):
    "No length of a tool, no world around, no field of view."

    def seen(split):
        tools = [t for scene in scenes(family, split) for t in scene.tools]
        lengths = {(t.class_name, t.asset["params"]["length_mm"] // 4) for t in tools}
        worlds = {scene.world.hdri for scene in scenes(family, split)} - {None}
        focal = [scene.cameras[0].K[0, 0] for scene in scenes(family, split)]
        return lengths, worlds, (min(focal), max(focal))

    (lengths, worlds, focal), *others = (seen(split) for split in ("train", "val", "test"))
    for more_lengths, more_worlds, more_focal in others:
        assert not lengths & more_lengths and not worlds & more_worlds and more_focal[1] < focal[0]
    assert others[1][2][1] < others[0][2][0]


def test_the_config_counts():
    cfg = RenderConfig(
        theatre_mix={"trainer": 1}, tools_per_image={3: 1}, distractors={2: 1}, blood_share=0, motion_share=1
    )
    for index in range(6):
        scene = sample_theatre(index, 0, cfg, "train", np.random.default_rng(index))
        kinds = Counter(p.kind for p in scene.props)
        assert len(scene.tools) == 3 and scene.family == "trainer"
        assert sum(kinds[k] for k in ("scissors", "clamp", "scalpel", "retractor", "instrument")) == 2
        assert not any(m.get("blood") for t in scene.tools for m in t.material.values())
    assert any(np.any(t.travel_m) for t in scene.tools if t.held) or not any(t.held for t in scene.tools)


def test_a_scene_depends_on_nothing_else():
    cfg = RenderConfig(strategy_mix={"theatre": 1}, images=30)
    fewer = cfg.model_copy(update={"images": 9, "workers": 2})
    assert sample_scene(7, 1, cfg).to_dict() == sample_scene(7, 1, fewer).to_dict()
    mixed = RenderConfig(images=30)
    found = {sample_scene(i, 0, mixed).strategy for i in range(30)}
    assert found == set(mixed.strategy_mix)


def test_tilt_and_span_follow_the_config():
    cfg = RenderConfig(tilt_deg=(0, 30), theatre_span=(0.5, 0.6), theatre_mix={"trainer": 1})
    for index in range(6):
        scene = sample_theatre(index, 0, cfg, "train", np.random.default_rng(index))
        camera, placed = scene.cameras[0], scene.tools[0]
        assert np.degrees(np.arccos(-camera.T_world_cam[2, 2])) <= 10.001
        long = np.linalg.norm(points(placed)[TIP] - points(placed)[HANDLE])
        depth = (points(placed)[TIP] - camera.T_world_cam[:3, 3]) @ camera.T_world_cam[:3, 2]
        assert 0.35 < camera.K[0, 0] * long / depth / camera.height < 0.9
