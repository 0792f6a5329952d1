"""Real BlenderProc renders, small ones, held against OpenCV, Blender's own camera and a mirror."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from surgpose.config import RenderConfig
from surgpose.data.coco import annotations_by_image, mask_of_rle, read_coco
from surgpose.files import check_manifest, lock_folder, read_json, read_jsonl
from surgpose.geometry import invert_rigid, project, transform
from surgpose.schema import CLASSES, HANDLE, HINGE, JAW_L, JAW_R, KEYPOINTS, TIP, flip_keypoints, order_jaws
from surgpose.synth.cluster import draw_all
from surgpose.synth.mesh_import import export_tool
from surgpose.synth.parts import Camera, Light, Occluder, Scene
from surgpose.synth.render import render
from surgpose.synth.scene import sample_scene
from surgpose.synth.tools import build_tool, sample_asset
from surgpose.synth.workers import RECORDS

CFG = RenderConfig(images=6, width=160, height=120, samples=3, val_share=0.34, workers=1)
SEED = 3
LABELS = ("coco_annotations.json", "scenes.jsonl")
MIRROR = np.diag([-1.0, 1, 1, 1])
RENDER = """
import sys
from surgpose.config import RenderConfig
from surgpose.synth.render import render
cfg, seed = RenderConfig.model_validate_json(sys.argv[2]), int(sys.argv[3])
render(sys.argv[1], cfg, seed=seed, device="cpu", progress=False)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("render") / "set", CFG, seed=SEED, device="cpu", progress=False)


@pytest.fixture(scope="module")
def labelled(dataset) -> list[tuple[dict, dict, dict, dict]]:
    "Image, annotation, the tool's placement, and the worker's note on it, for every annotated tool."
    coco, rows = read_coco(dataset / "coco_annotations.json", check_images=True), []
    records = {r["scene"]["index"]: r for r in read_jsonl(dataset / "scenes.jsonl")}
    by_image = annotations_by_image(coco)
    for image in coco["images"]:
        record = records[image["scene"]]
        notes = [n for n in record["shots"][0]["tools"] if n["annotated"]]
        for row, note in zip(by_image[image["id"]], notes, strict=True):
            rows.append((image, row, record["scene"]["tools"][note["tool"]], note))
    assert len(rows) >= CFG.images and {r[1]["category_id"] for r in rows} == {1, 2}
    return rows


def points(row: dict) -> np.ndarray:
    return np.reshape(row["keypoints"], (5, 3))


# A dataset --------------------------------------------------------------------------------------------------


def test_dataset_is_whole(dataset):
    assert check_manifest(dataset) == []
    coco = read_coco(dataset / "coco_annotations.json")
    assert len(coco["images"]) == len(list((dataset / "images").iterdir())) == CFG.images
    assert {im["split"] for im in coco["images"]} == {"train", "val"}
    assert not (dataset / RECORDS).exists() and not list(dataset.rglob("*.tmp*"))
    facts = read_json(dataset / "manifest.json")
    assert (facts["seed"], facts["config"]["samples"], facts["failed"]) == (SEED, 3, {})


def test_pictures_show_something(dataset):
    for path in (dataset / "images").iterdir():
        image = cv2.imread(str(path))
        assert image.shape == (120, 160, 3) and 25 < image.mean() < 230 and image.std() > 5, path.name


# Geometry ---------------------------------------------------------------------------------------------------


def test_annotations_are_what_opencv_projects(labelled):
    worst = 0.0
    for image, row, placed, _ in labelled:
        K = np.array([[image["fx"], 0, image["cx"]], [0, image["fy"], image["cy"]], [0, 0, 1]])
        T = np.array(row["T_cam_tool"])
        xyz_m = build_tool(placed["asset"], placed["opening_deg"]).keypoints_m
        expected = cv2.projectPoints(xyz_m, cv2.Rodrigues(T[:3, :3])[0], T[:3, 3], K, None)[0][:, 0]
        kpts = points(row)
        gap = np.abs(order_jaws(expected) - kpts[:, :2])[kpts[:, 2] > 0]
        worst = max(worst, gap.max(initial=0))
        assert (T[2, 3] > 0) and np.isclose(np.linalg.det(T[:3, :3]), 1)
    assert worst < 0.01  # px; the promise is 0.5


def test_blender_sees_the_keypoints_where_we_do(labelled):
    assert max(note["against_renderer_px"] for *_, note in labelled) < 0.01  # px


def test_principal_points_are_off_centre(labelled):
    "Else the tests above would not notice a sign error."
    assert max(abs(image["cx"] - 79.5) for image, *_ in labelled) > 3


def test_boxes_and_areas_are_those_of_the_masks(labelled):
    for image, row, _, note in labelled:
        mask = mask_of_rle(row["segmentation"])
        y, x = np.nonzero(mask)
        assert mask.shape == (image["height"], image["width"]) and row["area"] == len(x) == note["visible_px"]
        assert row["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]


def test_seen_points_lie_on_the_rendered_tool(labelled):
    "Those that are part of the steel do; the others are midpoints, seen when both their parents are."
    solid = {"needle_holder": (JAW_L, JAW_R, HINGE), "tweezers": (JAW_L, JAW_R, HANDLE)}
    checked = 0
    for _, row, _, _ in labelled:
        kpts, mask = points(row), mask_of_rle(row["segmentation"])
        near = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))  # 2 px
        for k in solid[CLASSES[row["category_id"] - 1]]:
            if kpts[k, 2] == 2:
                x, y = kpts[k, :2].round().astype(int)
                assert near[y, x], (row["image_id"], KEYPOINTS[k])
                checked += 1
        assert (kpts[TIP, 2] == 2) == (kpts[JAW_L, 2] == kpts[JAW_R, 2] == 2) or kpts[TIP, 2] == 0
    assert checked >= 12


def test_hidden_points_have_a_reason(labelled):
    for _, row, _, note in labelled:
        hidden = sum(why not in ("", "outside") for why in note["hidden_by"].values())
        outside = sum(why == "outside" for why in note["hidden_by"].values())
        flags = points(row)[:, 2]
        assert ((flags == 1).sum(), (flags == 0).sum()) == (hidden, outside)


# Hand-made scenes, drawn in one go --------------------------------------------------------------------------


def opposite(K: np.ndarray, width: int) -> np.ndarray:
    K = K.copy()
    K[0, 2] = width - 1 - K[0, 2]
    return K


def mirrored(scene: Scene) -> Scene:
    "The same things in a mirror at x = 0; tools become their mirror images."
    def turned(T: np.ndarray) -> np.ndarray:
        return MIRROR @ T @ MIRROR

    cameras = tuple(replace(c, T_world_cam=turned(c.T_world_cam), K=opposite(c.K, c.width))
                    for c in scene.cameras)
    tools = tuple(replace(t, T_world_tool=MIRROR @ t.T_world_tool) for t in scene.tools)
    lights = tuple(replace(lamp, T_world_light=turned(lamp.T_world_light)) for lamp in scene.lights)
    occluders = tuple(replace(o, capsules=o.capsules * [-1, 1, 1, -1, 1, 1, 1, 1]) for o in scene.occluders)
    return replace(scene, cameras=cameras, tools=tools, lights=lights, occluders=occluders)


def ball_before_hinge(scene: Scene, sideways_m: float) -> Scene:
    "Hang a small ball between the camera and the first tool's hinge, or beside that line."
    T, eye = scene.tools[0].T_world_tool, scene.cameras[0].T_world_cam[:3, 3]
    spot = T[:3, 3] + 0.2 * (eye - T[:3, 3]) + sideways_m * scene.cameras[0].T_world_cam[:3, 0]
    ball = np.array([[*spot, *(spot + [1e-4, 0, 0]), 0.012, 0.012]])
    return replace(scene, occluders=(Occluder("blob", ball, 0.0, (0.2, 0.7, 0.3), 0.5),))


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory) -> dict[str, tuple[Scene, dict]]:
    "Name -> scene and the record of its drawing."
    root = tmp_path_factory.mktemp("hand made")
    camera = root / "camera.json"
    camera.write_text(json.dumps(dict(width=300, height=200, fx=420, fy=380, cx=110.5, cy=120.25)))
    for name in CLASSES:
        asset = sample_asset(name, np.random.default_rng(1))
        export_tool(asset, 6.0, root / "models" / name, "mine")
    plain = CFG.model_copy(update=dict(strategy_mix={"studio": 1.0}, tilt_deg=(0.0, 25.0), max_occluders=0,
                                       tools_per_image={2: 1.0}))
    pair = sample_scene(8, 0, plain)
    one = sample_scene(4, 0, plain.model_copy(update=dict(tools_per_image={1: 1})))
    calibrated = sample_scene(1, 0, plain.model_copy(update=dict(camera_json=camera, res_scale=0.5)))
    foreign = sample_scene(0, 0, plain.model_copy(update=dict(models_dir=root / "models")))
    (root / "worlds" / "mine").mkdir(parents=True)
    red = np.full((16, 32, 3), (0.1, 0.1, 40.0), np.float32)
    cv2.imwrite(str(root / "worlds" / "mine" / "mine_2k.hdr"), red)
    (root / "photos").mkdir()
    cv2.imwrite(str(root / "photos" / "red.png"), np.full((90, 70, 3), (0, 0, 200), np.uint8))
    lit = sample_scene(0, 0, plain.model_copy(update=dict(hdri_dir=root / "worlds",
                                                          strategy_mix={"hdri": 1.0})))
    own_world = replace(lit, background=replace(lit.background, kind="world"), lights=())
    own_photo = sample_scene(0, 0, plain.model_copy(update=dict(backgrounds_dir=root / "photos",
                                                                strategy_mix={"composite": 1.0})))
    scenes = dict(pair=pair, mirrored=mirrored(pair), covered=ball_before_hinge(one, 0.0),
                  beside=ball_before_hinge(one, 0.05), calibrated=calibrated, foreign=foreign,
                  two_cameras=replace(one, cameras=one.cameras + calibrated.cameras), own_world=own_world,
                  own_photo=own_photo)
    scenes = {name: replace(scene, index=i) for i, (name, scene) in enumerate(scenes.items())}
    assert draw_all(root, plain, [s.to_dict() for s in scenes.values()], seed=0, device="cpu") == {}
    records = {name: read_json(root / RECORDS / f"{s.index:06d}.json") for name, s in scenes.items()}
    return {name: (s, {**records[name], "root": root}) for name, s in scenes.items()}


def test_a_mirrored_render_obeys_the_rule_of_left_and_right(hand_made):
    (scene, straight), (_, mirror) = hand_made["pair"], hand_made["mirrored"]
    rows, flipped = straight["shots"][0]["annotations"], mirror["shots"][0]["annotations"]
    assert len(rows) == len(flipped) == 2
    for row, other in zip(rows, flipped, strict=True):
        width = scene.cameras[0].width
        assert np.allclose(flip_keypoints(points(row), width), points(other), atol=0.01)  # visibility as well
        a, b = mask_of_rle(row["segmentation"])[:, ::-1], mask_of_rle(other["segmentation"])
        assert (a & b).sum() / (a | b).sum() > 0.85  # thin shanks, one sample per pixel


def test_the_mirror_is_one(hand_made):
    "The mirrored scene has proper cameras, and its labels differ from the straight ones."
    (_, straight), (other, mirror) = hand_made["pair"], hand_made["mirrored"]
    assert np.isclose(np.linalg.det(other.cameras[0].T_world_cam[:3, :3]), 1)
    assert np.linalg.det(other.tools[0].T_world_tool[:3, :3]) < 0
    a, b = (points(record["shots"][0]["annotations"][0]) for record in (straight, mirror))
    assert abs(a - b).max() > 5


def test_a_thing_in_the_way_hides_what_is_behind_it(hand_made):
    covered, beside = (hand_made[k][1]["shots"][0]["tools"][0]["hidden_by"] for k in ("covered", "beside"))
    assert covered["hinge_base"] == "blob" and beside["hinge_base"] != "blob"


def test_a_calibrated_camera_is_taken_as_it_is(hand_made):
    scene, record = hand_made["calibrated"]
    camera = scene.cameras[0]
    assert (camera.width, camera.height) == (150, 100)
    assert np.allclose(camera.K, [[210, 0, 55], [0, 190, 60.125 - 0.25], [0, 0, 1]])
    assert max(t["against_renderer_px"] for t in record["shots"][0]["tools"]) < 0.01


def test_foreign_meshes_take_the_place_of_parametric_tools(hand_made):
    scene, record = hand_made["foreign"]
    rows = record["shots"][0]["annotations"]
    assert rows and {r["asset"] for r in rows} == {"obj-mine"}
    assert {t.asset["kind"] for t in scene.tools} == {"obj"}


@pytest.mark.parametrize("name", ["own_world", "own_photo"])
def test_worlds_and_photos_of_the_user_are_seen(hand_made, name):
    "Both are red, and however bright a world is, it is exposed for."
    _, record = hand_made[name]
    image = cv2.imread(str(record["root"] / record["shots"][0]["file_name"]))
    blue, green, red = np.median(image.reshape(-1, 3), 0)
    assert red > 60 and red > 1.5 * max(blue, green)


def test_a_scene_has_one_picture_per_camera(hand_made):
    scene, record = hand_made["two_cameras"]
    assert [s["file_name"] for s in record["shots"]] == ["images/000006.jpg", "images/000006_c1.jpg"]
    for camera, shot in zip(scene.cameras, record["shots"], strict=True):
        T_cam_tool = invert_rigid(camera.T_world_cam) @ scene.tools[0].T_world_tool
        xyz_m = build_tool(scene.tools[0].asset, scene.tools[0].opening_deg).keypoints_m
        expected = order_jaws(project(transform(T_cam_tool, xyz_m), camera.K))
        for row in shot["annotations"]:
            kpts = points(row)
            assert np.allclose(expected[kpts[:, 2] > 0], kpts[kpts[:, 2] > 0, :2], atol=0.01)


def test_parts_keep_their_types():
    scene = sample_scene(0, 0, CFG)
    again = Scene.from_dict(json.loads(json.dumps(scene.to_dict())))
    assert again.to_dict() == scene.to_dict() and isinstance(again.cameras[0], Camera)
    assert all(isinstance(lamp, Light) for lamp in again.lights)


# Same seed, same labels; whatever happens -------------------------------------------------------------------


def test_two_workers_write_the_same_bytes(dataset, tmp_path):
    "Labels and images, whoever draws them, with however many threads, after whatever other scenes."
    cfg = CFG.model_copy(update=dict(workers=2, scenes_per_worker=2))
    other = render(tmp_path / "two", cfg, seed=SEED, device="cpu", progress=False)
    assert read_json(other / "manifest.json")["files"] == read_json(dataset / "manifest.json")["files"]


def test_a_damaged_image_is_drawn_again(dataset, tmp_path):
    import shutil

    out = tmp_path / "damaged"
    shutil.copytree(dataset, out)
    (out / "images" / "000001.jpg").write_bytes((out / "images" / "000001.jpg").read_bytes()[:500])
    render(out, CFG, seed=SEED, device="cpu", progress=False)
    assert check_manifest(out) == [] and cv2.imread(str(out / "images" / "000001.jpg")).shape == (120, 160, 3)
    for name in LABELS:
        assert (out / name).read_bytes() == (dataset / name).read_bytes()


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "told"), [
    (dict(hdri_dir="none"), "render.hdri_dir: expected a folder"),
    (dict(backgrounds_dir="empty"), "expected photos"),
    (dict(models_dir="empty"), "needle_holder/*.obj or tweezers/*.obj"),
    (dict(models_dir="bare"), "needs a sidecar"),
    (dict(camera_json="none.json"), "expected a JSON file"),
    (dict(camera_json="bad.json"), "expected fy as a number"),
])
def test_bad_input_is_told_and_leaves_nothing(tmp_path, changes, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "tweezers").mkdir(parents=True)
    (tmp_path / "bare" / "tweezers" / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "bad.json").write_text('{"width": 640, "height": 480, "fx": 500, "cx": 1, "cy": 2}')
    cfg = CFG.model_copy(update={k: tmp_path / v for k, v in changes.items()})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        render(tmp_path / "out", cfg, seed=0, progress=False)
    assert told in str(error.value) and not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(dataset):
    before = (dataset / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"samples 3 -> 9"):
        render(dataset, CFG.model_copy(update=dict(samples=9)), seed=SEED)
    with pytest.raises(ValueError, match=r"seed 3 -> 4"):
        render(dataset, CFG, seed=4)
    with pytest.raises(ValueError, match=r"images 6 -> 5"):
        render(dataset, CFG.model_copy(update=dict(images=5)), seed=SEED)
    assert (dataset / "manifest.json").read_bytes() == before


def test_a_folder_in_use_is_refused(tmp_path):
    job = [sys.executable, "-c", RENDER, str(tmp_path), CFG.model_dump_json(), str(SEED)]
    with lock_folder(tmp_path):
        done = subprocess.run(job, capture_output=True, text=True)
    assert done.returncode == 1 and f"in use by process {os.getpid()}" in done.stderr


def test_photos_that_cannot_be_decoded_fail_the_job_and_nothing_is_assembled(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "abcd":
        (tmp_path / "photos" / f"{name}.jpg").write_text("not a photo")
    cfg = CFG.model_copy(update=dict(backgrounds_dir=tmp_path / "photos", strategy_mix={"composite": 1.0}))
    with pytest.raises(RuntimeError, match="expected a photo, cannot decode it"):
        render(tmp_path / "out", cfg, device="cpu", progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").rglob("*.jpg"))


def test_the_committed_sample_is_whole():
    from surgpose.config import project_root

    sample = project_root() / "data" / "sample"
    assert check_manifest(sample / "render") == []
    coco = read_coco(sample / "render" / "coco_annotations.json", check_images=True)
    assert len(coco["images"]) >= 8 and {im["split"] for im in coco["images"]} == {"train", "val"}


def test_the_committed_clip_is_what_the_code_films():
    "Labels follow from the still scene that they keep, so they can be checked without drawing a frame."
    from surgpose.config import project_root
    from surgpose.data.video import video_info
    from surgpose.synth.clip import scenes_of_clip

    sample = project_root() / "data" / "sample"
    clip, info = read_coco(sample / "clip_coco.json"), video_info(sample / "clip.mp4")
    assert (sample / "clip.mp4").stat().st_size < 400_000
    assert [im["frame"] for im in clip["images"]] == list(range(info.frames))
    assert (info.width, info.height) == (clip["images"][0]["width"], clip["images"][0]["height"])
    scenes, rows = scenes_of_clip(clip["info"]), annotations_by_image(clip)
    for image, scene in zip(clip["images"], scenes, strict=True):
        for row in rows[image["id"]]:
            tool = next(t for t in scene.tools if t.class_name == CLASSES[row["category_id"] - 1])
            T_cam_tool = invert_rigid(scene.cameras[0].T_world_cam) @ tool.T_world_tool
            assert np.allclose(row["T_cam_tool"], T_cam_tool, atol=1e-6)
            assert row["opening_deg"] == pytest.approx(tool.opening_deg, abs=1e-3)
