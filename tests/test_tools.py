"""Foreign meshes: a folder of models rendered from end to end, and scans of the optional shared data."""

import base64
import json
import shutil
from collections import Counter

import cv2
import numpy as np
import pytest

from surgpose.cli import main
from surgpose.config import RenderConfig, shared_dir
from surgpose.data.coco import annotations_by_image, mask_of_rle, read_coco
from surgpose.files import read_json, read_jsonl
from surgpose.schema import CLASSES, HANDLE, HINGE, JAW_L, JAW_R, KEYPOINTS, TIP, order_jaws
from surgpose.synth.mesh_import import export_tool, import_obj, import_surgeonet, write_sidecar
from surgpose.synth.obj import read_obj
from surgpose.synth.place import SCRIPT
from surgpose.synth.render import render
from surgpose.synth.tools import build_tool, opening_range, sample_asset

# A folder of models -----------------------------------------------------------------------------------------

STILL = ["--strategy-mix", "studio=1", "--max-occluders", "0", "--distractors", "0=1", "--device", "cpu"]


def of_camera(image: dict) -> np.ndarray:
    return np.array([[image["fx"], 0, image["cx"]], [0, image["fy"], image["cy"]], [0, 0, 1]])


def seen_by(image: dict, row: dict, xyz_m: np.ndarray) -> np.ndarray:
    "Project points of the tool's frame with OpenCV and what the annotation says, nothing else."
    T = np.array(row["T_cam_tool"])
    return cv2.projectPoints(xyz_m, cv2.Rodrigues(T[:3, :3])[0], T[:3, 3], of_camera(image), None)[0][:, 0]


def test_a_folder_of_models_with_sidecars_and_a_calibrated_camera(tmp_path):
    "Meshes in <class>/, sidecars in a folder of their own, a principal point off the middle, a cap."
    rng, models, sidecars = np.random.default_rng(4), tmp_path / "models", tmp_path / "kps"
    for name, stem in (("needle_holder", "one"), ("needle_holder", "two"), ("tweezers", "three")):
        _, kps = export_tool(sample_asset(name, rng), 6.0, models / name, stem)
        sidecars.mkdir(exist_ok=True)
        shutil.move(kps, sidecars / kps.name)
    camera = dict(width=320, height=240, fx=430, fy=390, cx=110.5, cy=150.25)
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    code = main(["render", "--out", str(tmp_path / "set"), "--models", str(models),
                 "--kps-dir", str(sidecars), "--camera", str(tmp_path / "camera.json"),
                 "--per-obj-cap", "2", "--images", "8", "--res-scale", "0.5", "--samples", "1",
                 "--tools-per-image", "2=1", *STILL])
    assert code == 0
    coco = read_coco(tmp_path / "set" / "coco_annotations.json", check_images=True)
    rows, used = annotations_by_image(coco), Counter()
    for image in coco["images"]:
        assert (image["width"], image["height"], image["fx"], image["cx"]) == (160, 120, 215, 55)
        used.update({row["asset"] for row in rows[image["id"]] if row["asset"].startswith("obj-")})
        for row in rows[image["id"]]:
            if row["asset"] == "obj-three":  # tweezers keep their shape: the sidecar is all there is to know
                points = np.array(list(read_json(sidecars / "three_kps.json")["keypoints"].values()))
                expected = order_jaws(seen_by(image, row, points))
                kpts = np.reshape(row["keypoints"], (5, 3))
                assert np.abs(expected - kpts[:, :2])[kpts[:, 2] > 0].max() < 0.02  # px
    assert set(used) == {"obj-one", "obj-two", "obj-three"} and max(used.values()) <= 2
    drawn = Counter(t["asset"]["kind"] for r in read_jsonl(tmp_path / "set" / "scenes.jsonl")
                    for t in r["scene"]["tools"])
    assert drawn["parametric"] > 0, "after the cap parametric tools follow"


def test_a_model_without_sidecar_is_refused_before_anything_is_drawn(tmp_path, capsys):
    asset = sample_asset("tweezers", np.random.default_rng(0))
    export_tool(asset, 5.0, tmp_path / "models" / "tweezers", "mine")
    (tmp_path / "models" / "tweezers" / "mine_kps.json").unlink()
    assert main(["render", "--out", str(tmp_path / "set"), "--models", str(tmp_path / "models")]) != 0
    told = capsys.readouterr().err
    assert "mine.obj needs a sidecar" in told and "20d_place" in told and '"jaw_L": [x, y, z]' in told
    assert not (tmp_path / "set").exists()


# Clicking keypoints -----------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = """<div id="here"></div><script type="module">%s
const said = window.said = [], hear = {}, png = Uint8Array.from(atob("%s"), c => c.charCodeAt(0));
const model = { get: () => png, on: (what, f) => { hear[what] = f; }, send: m => said.push(m) };
window.answer = () => hear["change:image"]();
render({ model, el: document.getElementById("here") });</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_a_browser_tells_clicks_drags_and_scrolls():
    "A click is told in pixels of the picture; a drag waits for the next picture before it goes on."
    sync_api = pytest.importorskip("playwright.sync_api")
    png = cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1].tobytes()
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        tab, wrong = browser.new_page(), []
        tab.on("pageerror", lambda e: wrong.append(str(e)))
        script = SCRIPT.replace("export default", "window.module =")
        tab.set_content(PAGE % (script, base64.b64encode(png).decode()))
        box = tab.locator("img").bounding_box()  # with a border of one pixel
        tab.mouse.click(box["x"] + 1 + 30.5, box["y"] + 1 + 20.5)
        tab.mouse.move(box["x"] + 40, box["y"] + 30)
        tab.mouse.down()
        for step in (10, 15, 20):
            tab.mouse.move(box["x"] + 40 + step, box["y"] + 30)
        tab.mouse.up()
        before = tab.evaluate("said")
        tab.evaluate("answer()")
        tab.mouse.wheel(0, -100)
        tab.wait_for_function("said.length > 3")
        after = tab.evaluate("said")
        browser.close()
    assert wrong == [] and [m["kind"] for m in after] == ["click", "drag", "drag", "zoom"]
    assert (before[0]["x"], before[0]["y"]) == pytest.approx((30, 20), abs=0.6) and len(before) == 2
    assert sum(m["dx"] for m in after[1:3]) == 20 and after[1]["dx"] < 20 and after[3]["steps"] == 1


# Scans ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cad():
    folder = shared_dir()
    if folder is None or not (folder / "cad/surgeonet/Nadelhalter.obj").is_file():
        pytest.skip("needs cad/surgeonet of the shared data (SURGPOSE_SHARED, or ../shared)")
    return folder / "cad/surgeonet"


@pytest.fixture(scope="module")
def scan(cad):
    return import_surgeonet(cad / "Nadelhalter.obj", cad / "kps.csv", "Nadelhalter", "needle_holder")


def test_table_counts_vertices_of_the_file(cad):
    obj = read_obj(cad / "Nadelhalter.obj")
    assert len(obj.vertices) == 21906
    assert np.allclose(obj.vertices[0], [0.00019, 0.000005, 0.038528])
    assert set(obj.roles.values()) == {"gold", "steel"}, "gilt rings are told by the colour in the MTL"


def test_scan_lies_in_the_frame_of_a_tool(scan):
    tool = build_tool(scan, opening_range(scan)[0])
    kps = tool.keypoints_m
    assert np.ptp(tool.mesh.vertices[:, 0]) == pytest.approx(0.3155, abs=2e-3)
    assert np.ptp(tool.mesh.vertices[:, 2]) < 5e-3, "flat in z"
    assert np.allclose(kps[HINGE], 0, atol=1e-9) and np.allclose(kps[TIP, 1:], 0, atol=1e-4)
    assert kps[TIP, 0] == pytest.approx(0.040, abs=2e-3) and kps[HANDLE, 0] == pytest.approx(-0.275, abs=2e-3)
    assert kps[JAW_L, 1] > 0 > kps[JAW_R, 1]


@pytest.mark.parametrize("turn", [0, 5, 12, 25])
def test_opening_moves_the_jaws_as_it_should(scan, turn):
    rest, widest = opening_range(scan)
    tool = build_tool(scan, min(rest + turn, widest))
    kps = tool.keypoints_m
    reach = np.linalg.norm(kps[[JAW_L, JAW_R]], axis=1)
    angle = np.degrees(np.arccos(kps[JAW_L] @ kps[JAW_R] / reach.prod()))
    assert angle == pytest.approx(rest + turn, abs=0.01)
    apart = 2 * reach.mean() * np.sin(np.radians(rest + turn) / 2)
    assert np.linalg.norm(kps[JAW_L] - kps[JAW_R]) == pytest.approx(apart, abs=5e-5)
    assert np.allclose(kps[TIP], kps[[JAW_L, JAW_R]].mean(0))
    for jaw in (JAW_L, JAW_R):
        assert np.linalg.norm(tool.mesh.vertices - kps[jaw], axis=1).min() < 1e-9, "a jaw's end is a vertex"
    rings = np.concatenate([m.vertices for k, m in tool.parts.items() if tool.materials[k] == "gold"])
    spread = 0.08 + 2 * 0.27 * np.sin(np.radians(turn) / 2) * 0.95
    assert np.ptp(rings[:, 1]) > spread, "rings go apart with the jaws"


def test_scan_shows_its_keypoints_from_above(scan):
    tool = build_tool(scan, opening_range(scan)[0] + 15)
    for probes, radius in zip(tool.probes_m, tool.probe_radius_m, strict=True):
        for height in (0.5, -0.5):
            eye = probes + [0, 0, height]
            way = np.tile([0, 0, -np.sign(height)], (len(eye), 1))
            hits, ray, _ = tool.mesh.ray.intersects_location(eye, way, multiple_hits=False)
            assert len(hits) == len(probes) and (np.linalg.norm(hits - probes[ray], axis=1) <= radius).all()


def test_scan_survives_export_and_import(scan, tmp_path):
    opening = opening_range(scan)[0] + 10
    back = import_obj(*export_tool(scan, opening, tmp_path, "scan"), "needle_holder")
    for turn in (opening, opening + 8):
        assert np.allclose(build_tool(back, turn).keypoints_m, build_tool(scan, turn).keypoints_m, atol=1e-6)
    assert opening_range(back) == pytest.approx(opening_range(scan))


def test_scan_and_distractors_are_rendered_with_right_keypoints(cad, scan, tmp_path):
    "The needle holder as a labelled tool, the others unlabelled beside it."
    models, others = tmp_path / "models" / "needle_holder", tmp_path / "others"
    models.mkdir(parents=True)
    others.mkdir()
    for ending in ("obj", "mtl"):
        shutil.copy(cad / f"Nadelhalter.{ending}", models)
        for name in ("Scissor", "Metzenb", "KlemmeOverholt"):
            shutil.copy(cad / f"{name}.{ending}", others)
    write_sidecar(scan, models)
    cfg = RenderConfig(images=4, width=240, height=180, samples=1, models_dir=tmp_path / "models",
                       distractors_dir=others, distractors={2: 1.0}, tools_per_image={1: 1.0},
                       max_occluders=0, strategy_mix={"studio": 0.5, "theatre": 0.5}, closed_share=1.0,
                       tool_span=(0.7, 0.9))
    render(tmp_path / "set", cfg, seed=6, device="cpu", progress=False)
    coco = read_coco(tmp_path / "set" / "coco_annotations.json", check_images=True)
    scenes = {r["scene"]["index"]: r["scene"] for r in read_jsonl(tmp_path / "set" / "scenes.jsonl")}
    forms = [p["shape"]["path"] for s in scenes.values() for p in s["props"] if p["kind"] == "instrument"]
    assert len(forms) >= 4 and all(path.startswith(str(others)) for path in forms)
    rows, solid = annotations_by_image(coco), 0
    points = np.array([scan["kps"]["keypoints"][k] for k in KEYPOINTS])  # of the scan, in its own frame
    for image in coco["images"]:
        for row in (r for r in rows[image["id"]] if r["asset"] == "obj-Nadelhalter"):
            kpts, T = np.reshape(row["keypoints"], (5, 3)), np.array(row["T_cam_tool"])
            tool = build_tool(scan, row["opening_deg"])
            expected = order_jaws(seen_by(image, row, tool.keypoints_m))
            assert np.abs(expected - kpts[:, :2])[kpts[:, 2] > 0].max(initial=0) < 0.02  # px
            near = cv2.dilate(mask_of_rle(row["segmentation"]).astype(np.uint8), np.ones((5, 5)))
            for k in (JAW_L, JAW_R, HINGE):
                if kpts[k, 2] == 2:
                    x, y = kpts[k, :2].round().astype(int)
                    assert near[y, x], "a point that is seen lies on the steel"
                    solid += 1
            assert 0.1 < T[2, 3] < 2.5
    built = build_tool(scan, opening_range(scan)[0]).keypoints_m
    assert np.allclose(*(np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (points, built)), atol=1e-6)
    assert solid >= 3
    assert {CLASSES[r["category_id"] - 1] for r in coco["annotations"]} <= set(CLASSES)


@pytest.mark.parametrize("name", ["Scissor", "Metzenb", "KlemmeOverholt"])
def test_other_scans_read_as_distractors(cad, name):
    obj = read_obj(cad / f"{name}.obj")
    assert obj.parts and all(len(m.faces) for m in obj.parts.values())


def test_scan_without_sidecar_says_how_to_make_one(cad):
    with pytest.raises(FileNotFoundError, match=r"Scissor.obj needs a sidecar.*write one like .*jaw_L"):
        import_obj(cad / "Scissor.obj", cad / "Scissor_kps.json", "needle_holder")
