"""Scenes that move, scenes that several cameras see: frames, clips, rigs, and the words that ask for them."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from surgpose.cli import main, parse_verb
from surgpose.config import PROFILES, RenderConfig, profile
from surgpose.data.coco import annotations_by_image, check_splits, read_coco
from surgpose.data.video import read_image, read_video, video_info
from surgpose.files import check_manifest, read_jsonl
from surgpose.geometry import invert_rigid, transform
from surgpose.measure import find_truth, read_truth
from surgpose.schema import CLASSES, HANDLE, HINGE, JAW_L, JAW_R, TIP
from surgpose.synth.clip import clip_config, sample_clip
from surgpose.synth.mesh_import import export_tool
from surgpose.synth.parts import Scene, plain
from surgpose.synth.render import render
from surgpose.synth.scene import sample_scene, sample_still
from surgpose.synth.tools import build_tool, sample_asset

FRAMES, FPS = 24, 12.0
MOVING = RenderConfig(sequence={"frames": FRAMES, "fps": FPS}, val_share=0.5, width=160, height=120)
STRATEGIES = ("studio", "hdri", "composite", "theatre")


def keypoints_m(scene: Scene, i: int) -> np.ndarray:
    tool = scene.tools[i]
    return transform(tool.T_world_tool, build_tool(tool.asset, tool.opening_deg).keypoints_m)


def of(strategy: str, **changes) -> RenderConfig:
    return MOVING.model_copy(update=dict(strategy_mix={strategy: 1.0}, **changes))


# Frames -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=STRATEGIES)
def moving(request) -> list[Scene]:
    "Every third frame of one sequence that has a held tool."
    cfg = of(request.param, tools_per_image={2: 1.0}, cameras=2)
    number = next(k for k in range(20) if any(t.held for t in sample_still(k, 5, cfg).tools))
    return [sample_scene(number * FRAMES + i, 5, cfg) for i in range(0, FRAMES, 3)]


def test_a_frame_depends_on_nothing_but_its_index():
    backwards = [sample_scene(i, 1, MOVING).to_dict() for i in (30, 25, 24)]
    assert [sample_scene(i, 1, MOVING).to_dict() for i in (24, 25, 30)] == backwards[::-1]
    other = MOVING.model_copy(update=dict(workers=3, images=500, scenes_per_worker=2))
    assert sample_scene(25, 1, other).to_dict() == backwards[1] != sample_scene(25, 2, MOVING).to_dict()


def test_a_frame_knows_its_place(moving):
    assert [s.frame for s in moving] == list(range(0, FRAMES, 3))
    assert [s.t_s for s in moving] == pytest.approx([s.frame / FPS for s in moving], abs=1e-6)
    assert {s.index - s.frame for s in moving} == {moving[0].sequence * FRAMES}
    assert len({s.split for s in moving}) == 1 and len({s.post.seed for s in moving}) == len(moving)


def test_only_what_moves_moves(moving):
    def still(s: Scene) -> list:
        kept = [plain(getattr(s, f)) for f in ("lights", "world", "background", "split", "family")]
        return [*kept, [plain(p) for p in s.props if p.kind != "thread"],
                [(t.asset, t.material, t.held) for t in s.tools], [o.kind for o in s.occluders]]

    assert all(still(s) == still(moving[0]) for s in moving[1:])
    for i, tool in enumerate(moving[0].tools):
        way = np.ptp([keypoints_m(s, i)[TIP] for s in moving], axis=0).max()
        assert (way > 5e-4) == tool.held
        if not tool.held:
            assert {s.tools[i].travel_m for s in moving} == {(0.0, 0.0, 0.0)}


def test_tips_go_at_plausible_speeds_and_never_sink(moving):
    for i in range(len(moving[0].tools)):
        tips = np.array([keypoints_m(s, i)[TIP] for s in moving])
        speed = np.linalg.norm(np.diff(tips, axis=0), axis=1) * FPS / 3
        assert speed.max() < 4.5 * 1e-3 * MOVING.speed_mm_s[1]
        first = sample_still(moving[0].sequence, 5, of(moving[0].strategy, tools_per_image={2: 1.0}))
        assert tips[:, 2].min() >= keypoints_m(first, i)[TIP, 2] - 1e-9


def test_a_hand_keeps_its_hold(moving):
    held = [(k, o.holds) for k, o in enumerate(moving[0].occluders) if o.holds is not None]
    for k, i in held:
        forearm = [transform(invert_rigid(s.tools[i].T_world_tool), s.occluders[k].capsules[:, :3])
                   for s in moving]
        spread = np.ptp(forearm, axis=0).max(1)
        assert spread.min() < 1e-3, "nothing of the hand is fixed to the tool"
        assert spread.max() < 0.05, "a finger has lost the tool"
        assert all(s.occluders[k].travel_m == s.tools[i].travel_m for s in moving)


def test_blur_is_true_to_the_motion():
    cfg = of("theatre", sequence={"frames": 96, "fps": 48.0}, exposure_s=(1 / 48, 1 / 48), closed_share=1.0)
    one, two, three = (sample_scene(i, 2, cfg) for i in (40, 41, 42))
    for a, b, c in zip(one.tools, two.tools, three.tools, strict=True):
        travel, way = np.array(b.travel_m), (c.T_world_tool - a.T_world_tool)[:3, 3] / 2
        assert np.allclose(travel, way, atol=4e-4 + 0.1 * np.linalg.norm(way))
    short = sample_scene(41, 2, cfg.model_copy(update=dict(exposure_s=(1 / 96, 1 / 96))))
    for b, s in zip(two.tools, short.tools, strict=True):
        assert np.allclose(np.array(b.travel_m) / 2, s.travel_m, atol=2e-5)


def test_sequences_are_whole_in_one_split():
    scenes = [sample_scene(i, 0, of("studio")) for i in range(0, 4 * FRAMES, FRAMES // 2)]
    sides = {k: {s.split for s in group} for k, group in itertools.groupby(scenes, lambda s: s.sequence)}
    assert sides == {0: {"train"}, 1: {"val"}, 2: {"train"}, 3: {"val"}}


def test_tools_from_files_move_as_well_and_their_cap_counts_frames(tmp_path):
    for name in CLASSES:
        for k in range(2):
            export_tool(sample_asset(name, np.random.default_rng(k)), 5.0, tmp_path / name, f"m{k}")
    cfg = of("theatre", models_dir=tmp_path, per_obj_cap=2 * FRAMES + 1, val_share=0.0)
    used = [{t.asset.get("path") for t in sample_scene(k * FRAMES, 0, cfg).tools} for k in range(6)]
    assert all(None not in paths for paths in used[:4]), "two files, two sequences each"
    assert used[4:] == [{None}, {None}], "then they are used up"
    one, two = (sample_scene(i, 0, cfg) for i in (0, FRAMES - 1))
    assert [t.asset for t in one.tools] == [t.asset for t in two.tools]
    assert any(np.abs(keypoints_m(one, i) - keypoints_m(two, i)).max() > 1e-3 for i in range(len(one.tools)))


# Cameras ----------------------------------------------------------------------------------------------------


def test_a_rig_stays_calibrated(moving):
    def between(s: Scene) -> np.ndarray:
        return invert_rigid(s.cameras[0].T_world_cam) @ s.cameras[1].T_world_cam

    assert all(np.allclose(between(s), between(moving[0]), atol=1e-12) for s in moving)
    sways = np.ptp([s.cameras[0].T_world_cam[:3, 3] for s in moving], axis=0).max()
    assert sways < 2.1e-3 * MOVING.sway_mm[1] and (sways > 0) == (moving[0].background.kind != "picture")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_cameras_change_nothing_else(strategy):
    cfg = RenderConfig(strategy_mix={strategy: 1.0})
    for index in range(3):
        alone, four = (sample_scene(index, 0, cfg.model_copy(update=dict(cameras=n))) for n in (1, 4))
        assert len(four.cameras) == 4
        first = four.to_dict() | dict(cameras=four.to_dict()["cameras"][:1])
        assert first == alone.to_dict()
        eyes = np.array([c.T_world_cam[:3, 3] for c in four.cameras])
        assert eyes[:, 2].min() > 0.02
        gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(eyes, 2)]
        assert min(gaps) > 0.01


# The job ----------------------------------------------------------------------------------------------------

SMALL = RenderConfig(images=4, sequence={"frames": 2, "fps": 10}, cameras=3, val_share=0.5, width=160,
                     height=120, samples=1, denoise=False, strategy_mix={"studio": 0.5, "theatre": 0.5},
                     tools_per_image={2: 1.0})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    "Two sequences of two frames, seen by three cameras."
    return render(tmp_path_factory.mktemp("moving") / "set", SMALL, seed=4, device="cpu", progress=False)


def test_images_know_their_clip(dataset):
    coco = read_coco(dataset / "coco_annotations.json", check_images=True)
    assert check_manifest(dataset) == [] and len(coco["images"]) == 12
    assert len({im["id"] for im in coco["images"]}) == 12
    videos = {im["video"] for im in coco["images"]}
    assert videos == {f"sequences/00000{k}{c}.mp4" for k in (0, 1) for c in ("", "_c1", "_c2")}
    assert {(im["frame"], im["t_s"]) for im in coco["images"]} == {(0, 0.0), (1, 0.1)}
    assert check_splits(coco, by="video") == {"train": 3, "val": 3}
    assert check_splits(coco, by="sequence") == {"train": 1, "val": 1}


def test_clips_show_the_frames_and_have_their_labels_beside_them(dataset):
    coco = read_coco(dataset / "coco_annotations.json")
    for video in sorted({im["video"] for im in coco["images"]}):
        info = video_info(dataset / video)
        assert (info.frames, round(info.fps, 6), info.width, info.height) == (2, 10.0, 160, 120)
        truth = read_truth(find_truth(dataset / video), info)
        rows, all_rows = annotations_by_image(truth), annotations_by_image(coco)
        mine = {im["frame"]: im for im in coco["images"] if im["video"] == video}
        assert [im["frame"] for im in truth["images"]] == [0, 1]
        for im in truth["images"]:
            boxes = [[a["bbox"] for a in r[i["id"]]] for r, i in ((rows, im), (all_rows, mine[im["frame"]]))]
            assert boxes[0] == boxes[1]
        for frame, image in read_video(dataset / video):
            there = read_image(dataset / mine[frame.index]["file_name"])
            assert np.abs(image.astype(int) - there).mean() < 12


def projection(image: dict) -> np.ndarray:
    K = np.array([[image["fx"], 0, image["cx"]], [0, image["fy"], image["cy"]], [0, 0, 1]])
    return K @ invert_rigid(np.array(image["T_world_cam"]))[:3]


def pairs_of_views(dataset: Path) -> list[tuple]:
    "The same tool seen by two cameras in the same instant: scene, tool, and (image, annotation) of both."
    coco = read_coco(dataset / "coco_annotations.json")
    scenes = {r["scene"]["index"]: Scene.from_dict(r["scene"]) for r in read_jsonl(dataset / "scenes.jsonl")}
    rows, found = annotations_by_image(coco), []
    for index, scene in scenes.items():
        views = [im for im in coco["images"] if im["scene"] == index]
        for i, tool in enumerate(scene.tools):
            seen = [(im, a) for im in views for a in rows[im["id"]]
                    if np.abs(np.array(im["T_world_cam"]) @ a["T_cam_tool"] - tool.T_world_tool).max() < 1e-6]
            found += [(scene, i, *pair) for pair in itertools.combinations(seen, 2)]
    return found


def test_all_cameras_agree_where_the_tools_are(dataset):
    coco = read_coco(dataset / "coco_annotations.json")
    matched = {a["id"] for _, _, *pair in pairs_of_views(dataset) for _, a in pair}
    cameras = {im["id"]: im["camera"] for im in coco["images"]}
    assert {cameras[a["image_id"]] for a in coco["annotations"] if a["id"] in matched} == {0, 1, 2}
    for a in coco["annotations"]:
        im = next(im for im in coco["images"] if im["id"] == a["image_id"])
        T = np.array(im["T_world_cam"]) @ a["T_cam_tool"]
        scene = next(Scene.from_dict(r["scene"]) for r in read_jsonl(dataset / "scenes.jsonl")
                     if r["scene"]["index"] == im["scene"])
        assert min(np.abs(T - t.T_world_tool).max() for t in scene.tools) < 1e-7


def test_two_views_triangulate_to_the_tool_itself(dataset):
    "OpenCV gets K, poses and keypoints from the labels alone and must meet the tool within a tenth of a mm."
    solid, checked = [TIP, HINGE, HANDLE], 0
    for scene, i, (one, a), (two, b) in pairs_of_views(dataset):
        xyz_m = keypoints_m(scene, i)
        first, second = (np.reshape(r["keypoints"], (5, 3)) for r in (a, b))
        same = [k for k in solid if first[k, 2] and second[k, 2]]
        jaws = [JAW_L, JAW_R] if (first[[JAW_L, JAW_R], 2] * second[[JAW_L, JAW_R], 2]).all() else []
        # Left and right are decided in the image, so two views may name the jaws the other way round.
        for turn in ([(JAW_L, JAW_L), (JAW_R, JAW_R)], [(JAW_L, JAW_R), (JAW_R, JAW_L)]):
            where = [(k, k) for k in same] + (turn if jaws else [])
            points = [p[[w[n] for w in where], :2].T for n, p in enumerate((first, second))]
            if not where:
                continue
            X = cv2.triangulatePoints(projection(one), projection(two), *points)
            X = (X[:3] / X[3]).T
            error = np.linalg.norm(X[: len(same)] - xyz_m[same], axis=1)
            assert (error < 1e-4).all(), (scene.index, i, error)
            checked += len(same)
            apart = np.linalg.norm(X[len(same):, None] - xyz_m[[JAW_L, JAW_R]], axis=-1)
            if not jaws or np.allclose(apart.min(1), 0, atol=1e-4):
                break
        else:
            pytest.fail(f"scene {scene.index}, tool {i}: the jaws do not meet either way")
    assert checked >= 20


def test_two_workers_make_the_same_clips(dataset, tmp_path):
    cfg = SMALL.model_copy(update=dict(workers=2))
    other = render(tmp_path / "two", cfg, seed=4, device="cpu", progress=False)
    for name in ("coco_annotations.json", "scenes.jsonl", "sequences/000001_c2_coco.json"):
        assert (other / name).read_bytes() == (dataset / name).read_bytes(), name
    for image in (dataset / "images").iterdir():
        difference = read_image(image).astype(float) - read_image(other / "images" / image.name)
        assert (difference**2).mean() < 30, f"{image.name} depends on what its process drew before"
    assert video_info(other / "sequences" / "000001.mp4").frames == 2


def test_a_longer_job_goes_on_and_a_lost_clip_comes_back(dataset, tmp_path):
    import shutil

    out = tmp_path / "more"
    shutil.copytree(dataset, out)
    before = {p.name: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    (out / "sequences" / "000000.mp4").unlink()
    render(out, SMALL.model_copy(update=dict(images=5)), seed=4, device="cpu", progress=False)
    assert check_manifest(out) == [] and video_info(out / "sequences" / "000002.mp4").frames == 1
    assert video_info(out / "sequences" / "000000.mp4").frames == 2
    after = {p.name: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    assert {k: after[k] for k in before} == before and len(after) == 15
    coco, old = (read_coco(p / "coco_annotations.json") for p in (out, dataset))
    assert coco["annotations"][: len(old["annotations"])] == old["annotations"]


# The clip ---------------------------------------------------------------------------------------------------


def apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return max(a) < min(b) or max(b) < min(a)


def boxes(ranges: object) -> list[tuple]:
    "All boxes of hue, saturation and value in a table of looks."
    if isinstance(ranges, dict):
        return [box for part in ranges.values() for box in boxes(part)]
    return [ranges] if np.shape(ranges) == (3, 2) else [box for part in ranges for box in boxes(part)]


@pytest.mark.parametrize("seen", ["train", "val"])
def test_the_clip_wears_and_shows_nothing_that_training_has(seen):
    from surgpose.synth import gloves, hard, instruments, soft, steel, surroundings
    from surgpose.synth.tools import length_bands

    for palette in (gloves.LATEX, gloves.NITRILE, gloves.SKINS, gloves.SLEEVES, gloves.INKS, steel.COATS,
                    surroundings.WORLDS):
        assert palette["test"] and not set(palette["test"]) & set(palette[seen])
    for table in (soft.DRAPES, soft.SKIN, hard.STRAPS):
        for one, other in itertools.product(boxes(table["test"]), boxes(table[seen])):
            assert any(apart(a, b) for a, b in zip(one, other, strict=True)), (one, other)
    assert apart(instruments.LENGTHS["test"], instruments.LENGTHS[seen])
    for name in CLASSES:
        for one, other in itertools.product(length_bands(name, "test"), length_bands(name, seen)):
            assert one[1] <= other[0] or other[1] <= one[0]


def edge(cfg: RenderConfig) -> tuple[float, float]:
    "Least and largest slope of the ray through the middle of a side border, after jitter."
    half = np.tan(np.radians(cfg.fov_deg) / 2)
    return half[0] / (1 + cfg.intrinsics_jitter), half[1] / (1 - cfg.intrinsics_jitter)


@pytest.mark.parametrize("name", ["default", *PROFILES])
def test_the_clip_has_a_camera_and_a_codec_of_its_own(name):
    cfg = RenderConfig() if name == "default" else profile(name).render
    film = clip_config(cfg, 8, 12.0)
    assert apart(edge(cfg), edge(film))
    for field in ("noise_sigma", "blur_sigma_px", "jpeg_quality"):
        assert apart(getattr(cfg, field), getattr(film, field)), field
    mine = RenderConfig(**{**cfg.model_dump(), "models_dir": "mine", "hdri_dir": "mine", "cameras": 3})
    assert clip_config(mine, 8, 12.0) == film, "assets of the user are training's"


def test_a_clip_is_of_the_test_split_from_seed_alone():
    scenes = sample_clip(6, RenderConfig(width=160, height=120), seed=3)
    again = sample_clip(6, RenderConfig(width=160, height=120), seed=3)
    assert [s.to_dict() for s in scenes] == [s.to_dict() for s in again]
    assert {(s.split, s.strategy, s.world.hdri) for s in scenes} == {("test", "theatre", "courtyard")}
    assert [(s.index, s.frame, s.sequence) for s in scenes] == [(k, k, 0) for k in range(6)]


# Asking for it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "name", "wanted"), [
    (["--sequence", "frames=48"], "sequence", {"frames": 48}),
    (["--sequence", "frames=48", "fps=25"], "sequence", {"frames": 48, "fps": 25}),
    (["--sequence", "frames", "48", "fps", "25"], "sequence", {"frames": 48, "fps": 25}),
    (["--sequence=frames=48"], "sequence", {"frames": 48}),
    (["--sequence"], "sequence", {}),
    (["--strategy-mix", "theatre=1", "studio=0"], "strategy_mix", {"theatre": 1, "studio": 0}),
    (["--strategy_mix", "hdri=.5"], "strategy_mix", {"hdri": 0.5}),
    (["--theatre-mix", "operating_room=1"], "theatre_mix", {"operating_room": 1}),
    (["--tools-per-image", "1=1"], "tools_per_image", {1: 1}),
    (["--distractors", "0=.5", "2", "1"], "distractors", {0: 0.5, 2: 1}),
    (["--models", "a dir"], "models_dir", Path("a dir")),
    (["--backgrounds=b"], "backgrounds_dir", Path("b")),
    (["--hdris", "w"], "hdri_dir", Path("w")),
    (["--camera", "camera.json"], "camera_json", Path("camera.json")),
    (["--camera-json", "camera.json"], "camera_json", Path("camera.json")),
    (["--kps-dir", "k"], "kps_dir", Path("k")),
    (["--cameras", "4"], "cameras", 4),
    (["--scheduler", "tcp://host:8786"], "scheduler", "tcp://host:8786"),
])
def test_words_become_settings(words, name, wanted):
    cfg = parse_verb("render", [*words, "--images", "3"]).render
    assert getattr(cfg, name) == wanted and cfg.images == 3
    rest = RenderConfig(**{**cfg.model_dump(), name: getattr(parse_verb("render", []).render, name)})
    assert rest == parse_verb("render", ["--images", "3"]).render, "nothing else is changed"


@pytest.mark.parametrize(("words", "told"), [
    (["--sequence", "frames"], "expected name=value"),
    (["--sequence", "frames="], "expected name=value"),
    (["--sequence", "farmes=3"], "farmes"),
    (["--sequence", "frames=many"], "valid number"),
    (["--sequence", "fps=12"], "expected frames=48"),
    (["--sequence", "frames=2.5"], "expected frames=48"),
    (["--strategy-mix", "theater=1"], "'theatre'"),
    (["--strategy-mix", "theatre=0"], "not all 0"),
    (["--strategy-mix"], "not all 0"),
    (["--tools-per-image", "two=1"], "valid integer"),
    (["--cameras", "0"], "--cameras"),
])
def test_words_that_make_no_sense_are_usage_errors(words, told, capsys):
    assert main(["render", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and told in " ".join(err.split()) and "Traceback" not in err


def test_help_tells_how_weights_are_given(capsys):
    assert main(["render", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("{frames,fps}=VALUE", "{studio,hdri,composite,theatre}=VALUE", "theatre=0.45", "--bop DIR",
                  "--models", "--camera stand for", "gpu (the first"):
        assert words in text, words


def test_bop_is_written_after_the_render(monkeypatch, tmp_path):
    import sys
    from types import ModuleType

    from surgpose.synth import render as rendering

    done, bop = [], ModuleType("surgpose.synth.bop")
    bop.write_bop = lambda data, out, *, device: done.append((data, out, device))
    monkeypatch.setitem(sys.modules, "surgpose.synth.bop", bop)
    monkeypatch.setattr(rendering, "render", lambda out, cfg, **rest: Path(out))
    verb = parse_verb("render", ["--out", str(tmp_path / "set"), "--bop", str(tmp_path / "bop")])
    assert verb.run() == tmp_path / "set" and done == [(tmp_path / "set", tmp_path / "bop", "auto")]
    assert parse_verb("render", []).bop is None


