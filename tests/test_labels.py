"""Labels of real renders against oracles: a depth pass, OpenCV, Blender's camera, scenes made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from surgpose.config import RenderConfig
from surgpose.data.coco import mask_of_rle, new_coco, validate_coco
from surgpose.files import read_json
from surgpose.geometry import camera_matrix, invert_rigid, look_at, project, rigid, transform
from surgpose.schema import HANDLE, HINGE, JAW_L, JAW_R, KEYPOINTS, TIP, order_jaws
from surgpose.synth.cluster import draw_all
from surgpose.synth.labels import ONE_PIECE, TINY_PX, parent_side, side_of, silhouette
from surgpose.synth.parts import Background, Camera, Light, Occluder, Post, Scene, ToolPlacement, World
from surgpose.synth.placing import turned
from surgpose.synth.props import moved, plate
from surgpose.synth.tools import Tool, build_tool, parametric_asset
from surgpose.synth.workers import RECORDS

# A depth pass as oracle -------------------------------------------------------------------------------------

SCENES, WIDTH, HEIGHT = 50, 480, 360
STRATEGIES = tuple(RenderConfig().strategy_mix)
DRAW = """
import json, os, sys
import numpy as np
from surgpose.config import RenderConfig
from surgpose.geometry import transform
from surgpose.synth.blender import build_scene
from surgpose.synth.scene import sample_scene
from surgpose.synth.sight import blender_projection, draw_bare, enable_depth, find_causes, set_camera
from surgpose.synth.startup import start_blender
out, cfg = sys.argv[1], RenderConfig.model_validate_json(sys.argv[2])
names = list(cfg.strategy_mix)
bproc = start_blender(cfg, device="cpu", temp=out)
enable_depth(bproc)
for i in range(cfg.images):
    scene = sample_scene(i, 11, cfg.model_copy(update=dict(strategy_mix={names[i % len(names)]: 1.0})))
    tools, camera = build_scene(bproc, scene), scene.cameras[0]
    set_camera(bproc, camera)
    numbers, z_m = draw_bare(bproc, depth=True)
    points = [transform(p.T_world_tool, t.keypoints_m) for t, p in zip(tools, scene.tools)]
    np.savez(f"{out}/{i}.npz", numbers=numbers, z_m=z_m, causes=find_causes(bproc, scene, tools, camera),
             by_blender=[blender_projection(p, camera) for p in points])
    with open(f"{out}/{i}.json", "w") as f: json.dump(scene.to_dict(), f)
sys.stderr.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> list[SimpleNamespace]:
    "Fifty scenes of all strategies: numbers and depth as rendered, and what rays say hides each keypoint."
    out = tmp_path_factory.mktemp("depth")
    cfg = RenderConfig(images=SCENES, width=WIDTH, height=HEIGHT, samples=1, tool_span=(0.7, 1.2),
                       theatre_span=(0.7, 1.2))
    done = subprocess.run([sys.executable, "-c", DRAW, str(out), cfg.model_dump_json()], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for i in range(SCENES):
        with np.load(out / f"{i}.npz") as data:
            arrays = {name: data[name] for name in data.files}
        found.append(SimpleNamespace(scene=Scene.from_dict(read_json(out / f"{i}.json")), **arrays))
    assert {v.scene.strategy for v in found} == set(STRATEGIES)
    assert {v.scene.family for v in found} >= {"trainer", "operating_room"}
    return found


def front_m(parts: list, way: np.ndarray, reach_m: float) -> float:
    "Where along a ray from the camera the material begins that a point lies in; the point itself in the air."
    spans = []
    for mesh in parts:
        hits = np.sort(mesh.ray.intersects_location([[0, 0, 0]], [way])[0] @ way)
        spans += list(zip(hits[::2], hits[1::2], strict=False))
    for near, far in sorted(spans, key=lambda span: -span[1]):
        if near < reach_m < far + 3e-4:
            reach_m = near
    return reach_m


def judge(view: SimpleNamespace, tool: Tool, i: int, k: int) -> tuple[bool, bool]:
    """By depth alone: is a keypoint seen, and is it away from edges?

    Seen: for each of its parents the pixel shows this tool, and nothing nearer than the front of the material
    that the parent lies in. Away from edges: the depth in the 5 x 5 pixels round each of them is continuous.
    """
    camera, seen, smooth = view.scene.cameras[0], True, True
    T_cam_tool = invert_rigid(camera.T_world_cam) @ view.scene.tools[i].T_world_tool
    for probe, xyz_m in zip(tool.probes_m[k], transform(T_cam_tool, tool.probes_m[k]), strict=True):
        x, y = np.rint(project(xyz_m, camera.K)).astype(int)
        around = view.z_m[max(y - 2, 0):y + 3, max(x - 2, 0):x + 3]
        smooth &= around.shape == (5, 5) and np.ptp(around) < 2e-3
        own = [mesh.copy().apply_transform(T_cam_tool) for name, mesh in tool.parts.items()
               if k == ONE_PIECE[tool.class_name] or side_of(name) == parent_side(tool, probe)]
        reach_m = float(np.linalg.norm(xyz_m))
        nearest_m = front_m(own, xyz_m / reach_m, reach_m) / reach_m * xyz_m[2]
        shown = (view.numbers[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2] == i + 1).any()
        seen &= bool(view.z_m[y, x] > nearest_m - 3e-4 and shown)
    return seen, smooth


@pytest.fixture(scope="module")
def verdicts(views) -> list[tuple[str, str, bool, bool, bool]]:
    "Strategy, keypoint, seen by our labels, seen by depth, away from edges; for every keypoint in an image."
    rows = []
    for view in views:
        for i, placed in enumerate(view.scene.tools):
            tool = build_tool(placed.asset, placed.opening_deg)
            for k, name in enumerate(KEYPOINTS):
                cause = str(view.causes[i][k])
                if cause not in ("outside", "border"):
                    rows.append((view.scene.strategy, name, cause == "", *judge(view, tool, i, k)))
    return rows


def test_visibility_is_that_of_a_depth_pass(verdicts, capsys):
    def share(rows: list) -> str:
        return f"{sum(r[2] == r[3] for r in rows):4}/{len(rows):<4}"

    with capsys.disabled():
        print(f"\nagreement with a depth pass, {SCENES} scenes\n{'':14}away from edges   near edges")
        for name in (*KEYPOINTS, *STRATEGIES):
            far, near = (share([r for r in verdicts if name in r[:2] and r[4] == s]) for s in (True, False))
            print(f"{name:14}{far}         {near}")
    clear, edge = ([r for r in verdicts if r[4] == smooth] for smooth in (True, False))
    assert len(clear) >= 60 and len({r[2] for r in clear}) == 2, "seen and hidden ones"
    assert np.mean([r[2] == r[3] for r in clear]) >= 0.99
    assert np.mean([r[2] == r[3] for r in edge]) >= 0.93  # a pixel's depth is that of its centre


def test_points_are_where_blender_and_opencv_see_them(views):
    for view in views:
        camera = view.scene.cameras[0]
        for placed, by_blender in zip(view.scene.tools, view.by_blender, strict=True):
            T = invert_rigid(camera.T_world_cam) @ placed.T_world_tool
            xyz_m = build_tool(placed.asset, placed.opening_deg).keypoints_m
            mine = project(transform(T, xyz_m), camera.K)
            theirs = cv2.projectPoints(xyz_m, cv2.Rodrigues(T[:3, :3])[0], T[:3, 3], camera.K, None)[0][:, 0]
            assert np.abs(mine - theirs).max() < 1e-6
            assert np.abs(mine - by_blender).max() < 0.02  # px; the promise is .5


def filled(tool: Tool, T_cam_tool: np.ndarray, camera: Camera, fine: int = 9) -> np.ndarray:
    "The tool's outline by OpenCV: triangles filled at a ninth of a pixel, looked up at pixel centres."
    image = np.zeros((camera.height * fine, camera.width * fine), np.uint8)
    xyz_m, still = transform(T_cam_tool, tool.mesh.vertices), np.zeros(3)
    xy = (cv2.projectPoints(xyz_m, still, still, camera.K, None)[0][:, 0] + 0.5) * fine - 0.5
    for triangle in np.round(xy * 16).astype(np.int32)[tool.mesh.faces]:
        cv2.fillConvexPoly(image, triangle, 1, shift=4)
    return image[fine // 2 :: fine, fine // 2 :: fine].astype(bool)


def test_masks_are_what_opencv_fills(views):
    "The rendered mask of a tool that nothing hides, our silhouette by rays, and filled triangles."
    whole, checked = [], 0
    for view in views[::3]:
        camera = view.scene.cameras[0]
        for i, placed in enumerate(view.scene.tools):
            tool = build_tool(placed.asset, placed.opening_deg)
            T_cam_tool = invert_rigid(camera.T_world_cam) @ placed.T_world_tool
            expected, mine = filled(tool, T_cam_tool, camera), silhouette(tool.mesh, T_cam_tool, camera)
            mask = view.numbers == i + 1
            assert not (mask & ~expected).sum() > 0.01 * expected.sum(), "a mask never leaves the silhouette"
            assert (mine & expected).sum() / (mine | expected).sum() > 0.97
            checked += 1
            if mask.sum() > 0.99 * mine.sum():
                whole.append((mask & expected).sum() / (mask | expected).sum())
    assert len(whole) >= 5 and min(whole) >= 0.97 and checked >= 25


# Scenes made by hand ----------------------------------------------------------------------------------------

K = camera_matrix(420.0, 400.0, 150.0, 112.0)  # off centre, and not square
ABOVE = Camera(K, 320, 240, look_at([0, 0, 0.4], [0, 0, 0]))
HOLDER = parametric_asset("needle holder", length_mm=150)
SHORT = parametric_asset("needle holder", length_mm=125)
FORCEPS = parametric_asset("tweezers", length_mm=140)
STEEL = dict.fromkeys(("steel", "gold", "insert"), dict(colour=(0.6, 0.6, 0.6), roughness=0.3, metallic=1.0))
LAMP = Light(look_at([0.2, 0.3, 0.9], [0, 0, 0]), 0.3, 9.0, (1.0, 1.0, 1.0))
POST = Post(0, 0.45, 1.0, (1, 1, 1), 0.0, 0.0, 90)
MIDDLE = (0.03, 0.0)  # a needle holder's hinge there fills the picture


def put(x: float, y: float, z: float, yaw: float = 0.0, tilt: float = 0.0, roll: float = 0.0) -> np.ndarray:
    return rigid(turned(yaw, tilt, roll), [x, y, z])


def tool(asset: dict, T: np.ndarray, opening: float = 0.0, travel: tuple = (0.0, 0.0, 0.0)) -> ToolPlacement:
    return ToolPlacement(asset, asset["class"], T, opening, STEEL, True, travel)


def scene(*tools: ToolPlacement, **more) -> Scene:
    world = World(None, (0.3, 0.3, 0.3), 1.0)
    ground = Background("table", "drape", 3, 0.4, 0.7)
    return replace(Scene(0, 0, "studio", "train", tools, (), (LAMP,), world, ground, (ABOVE,), POST), **more)


def blob(x: float, y: float, z: float, radius: float, length: float = 1e-4) -> Occluder:
    capsule = np.array([[x, y, z, x + length, y, z, radius, radius]])
    return Occluder("blob", capsule, 0.0, (0.2, 0.7, 0.3), 0.5)


PLATE = moved(plate(np.random.default_rng(0)), put(-0.02, 0, 0.06, yaw=np.pi / 2))


def slab(alpha: float) -> tuple:
    surface = dict(colour=(0.8, 0.9, 0.9), roughness=0.1, alpha=alpha)
    return (replace(PLATE, material=dict.fromkeys(PLATE.material, surface)),)


open_holder = tool(HOLDER, put(*MIDDLE, 0.01), 20.0)
HAND_MADE = dict(
    opened=scene(open_holder),
    closed=scene(tool(HOLDER, put(*MIDDLE, 0.01))),
    on_edge=scene(tool(HOLDER, put(*MIDDLE, 0.03, roll=np.pi / 2), 20.0)),
    tweezers_on_edge=scene(tool(FORCEPS, put(0, 0, 0.03, roll=np.pi / 2), 8.0)),
    pointing_at_us=scene(tool(HOLDER, put(0, 0, 0.12, tilt=-np.pi / 2), 10.0)),
    leaving=scene(tool(HOLDER, put(0.15, 0, 0.01), 20.0)),
    gone=scene(tool(HOLDER, put(0.5, 0, 0.01)), open_holder),
    covered=scene(open_holder, tool(FORCEPS, put(0, 0.05, 0.005)),
                  occluders=(blob(-0.1, 0.05, 0.05, 0.02, 0.2),)),
    half_covered=scene(open_holder, occluders=(blob(-0.03, 0, 0.2, 0.03),)),
    under_clear=scene(open_holder, props=(PLATE,)),
    under_film=scene(open_holder, props=slab(0.4)),
    under_solid=scene(open_holder, props=slab(1.0)),
    crossing=scene(open_holder, tool(SHORT, put(*MIDDLE, 0.03, yaw=np.pi / 2))),
    moving=scene(replace(open_holder, travel_m=(0.0, 0.02, 0.0))),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, SimpleNamespace]:
    "Name -> the scene, its COCO annotations, the notes on all its tools, and the picture."
    out = tmp_path_factory.mktemp("made")
    scenes = [replace(s, index=i) for i, s in enumerate(HAND_MADE.values())]
    cfg = RenderConfig(samples=2)
    assert draw_all(out, cfg, [s.to_dict() for s in scenes], seed=0, device="cpu") == {}
    found = {}
    for s, name in zip(scenes, HAND_MADE, strict=True):
        shot = read_json(out / RECORDS / f"{s.index:06d}.json")["shots"][0]
        found[name] = SimpleNamespace(scene=s, rows=shot["annotations"], notes=shot["tools"],
                                      image=cv2.imread(str(out / shot["file_name"])))
    return found


def flags(row: dict) -> list[int]:
    return [int(v) for v in row["keypoints"][2::3]]


def test_an_open_tool_that_lies_flat_shows_everything(made):
    (row,), (note,) = made["opened"].rows, made["opened"].notes
    assert flags(row) == [2] * 5 and set(note["hidden_by"].values()) == {""}
    assert row["visible_fraction"] > 0.99 and note["inside_px"] == note["whole_px"]
    assert np.allclose(row["bbox"], row["bbox_amodal"], atol=1.1)


def test_a_closed_tool_has_its_jaws_side_by_side(made):
    (row,) = made["closed"].rows
    points = np.reshape(row["keypoints"], (5, 3))
    assert np.linalg.norm(points[JAW_L, :2] - points[JAW_R, :2]) < 0.02 * row["bbox"][2]
    assert np.allclose(points[TIP, :2], points[[JAW_L, JAW_R], :2].mean(0), atol=0.01)
    assert row["opening_deg"] == 0 and np.array_equal(order_jaws(points), points) and flags(row) == [2] * 5


def test_on_edge_one_jaw_hides_the_other(made):
    "What a tool hides of itself is called `self`, and takes nothing from its silhouette."
    (row,), (note,) = made["on_edge"].rows, made["on_edge"].notes
    assert sorted(flags(row)[JAW_L:JAW_R + 1]) == [1, 2] and flags(row)[TIP] == 1 and flags(row)[HINGE] == 2
    assert sorted(note["hidden_by"][k] for k in ("jaw_L", "jaw_R")) == ["", "self"]
    assert row["visible_fraction"] > 0.97
    (row,), (note,) = made["tweezers_on_edge"].rows, made["tweezers_on_edge"].notes
    assert note["hidden_by"]["hinge_base"] == "self" and flags(row)[HANDLE] == 2


def test_a_tool_that_points_at_the_camera_hides_its_own_hinge_and_handle(made):
    (row,), (note,) = made["pointing_at_us"].rows, made["pointing_at_us"].notes
    assert flags(row)[TIP] == flags(row)[JAW_L] == flags(row)[JAW_R] == 2
    assert note["hidden_by"]["handle_end"] != "" and row["bbox"][2] < 60


def test_a_tool_that_leaves_the_image_keeps_its_full_box(made):
    (row,), (note,) = made["leaving"].rows, made["leaving"].notes
    assert flags(row)[TIP] == 0 and row["keypoints"][:3] == [0, 0, 0] and flags(row)[HINGE] == 2
    x, y, w, h = row["bbox_amodal"]
    left, top, width, height = row["bbox"]
    assert left + width == 320 and x + w > 340 and abs(x - left) < 1.1
    assert row["visible_fraction"] < 0.9 and note["visible_px"] > 0.97 * note["inside_px"]
    placed = made["leaving"].scene.tools[0]
    mesh, T = build_tool(placed.asset, placed.opening_deg).mesh, np.array(row["T_cam_tool"])
    xy = cv2.projectPoints(mesh.vertices, cv2.Rodrigues(T[:3, :3])[0], T[:3, 3], K, None)[0][:, 0]
    assert np.allclose([x, y, x + w, y + h], [*(xy.min(0) + 0.5), *(xy.max(0) + 0.5)], atol=2e-3)


def test_a_tool_that_is_not_seen_is_not_annotated_but_noted(made):
    for name, (lost, causes) in dict(gone=(0, {"outside"}), covered=(1, {"blob"})).items():
        notes, rows = made[name].notes, made[name].rows
        assert len(notes) == 2 and len(rows) == 1, name
        assert [n["annotated"] for n in notes] == [i != lost for i in range(2)]
        assert notes[lost]["visible_px"] < TINY_PX
        assert set(notes[lost]["hidden_by"].values()) <= causes and notes[lost]["whole_px"] > 500
    assert made["covered"].notes[1]["inside_px"] > 500 and made["gone"].notes[0]["inside_px"] == 0


def test_what_hides_a_tool_is_told(made):
    (row,), (note,) = made["half_covered"].rows, made["half_covered"].notes
    assert set(note["hidden_by"].values()) == {"", "blob"} and sorted(set(flags(row))) == [1, 2]
    hidden = note["inside_px"] - note["visible_px"]
    assert 0.1 < hidden / note["inside_px"] < 0.9, "by something foreign"
    assert row["visible_fraction"] == pytest.approx(note["visible_px"] / note["whole_px"], abs=1e-4)
    assert np.allclose(row["bbox_amodal"], made["opened"].rows[0]["bbox_amodal"])


def test_one_sees_through_clear_plastic_but_not_through_solid(made):
    bare, solid = made["opened"], made["under_solid"]
    for clear in (made["under_clear"], made["under_film"]):
        assert np.array_equal(*(mask_of_rle(v.rows[0]["segmentation"]) for v in (bare, clear)))
        assert flags(clear.rows[0]) == flags(bare.rows[0]) and clear.notes == bare.notes
        assert np.abs(clear.image.astype(int) - bare.image).mean() > 1, "it is in the picture"
    assert "plate" in solid.notes[0]["hidden_by"].values()
    assert solid.notes[0]["visible_px"] < 0.7 * bare.notes[0]["visible_px"]


def test_of_two_crossing_tools_the_upper_one_hides_the_lower(made):
    lower, upper = made["crossing"].notes
    below, above = (mask_of_rle(row["segmentation"]) for row in made["crossing"].rows)
    assert not (below & above).any() and set(upper["hidden_by"].values()) == {""}
    assert lower["visible_px"] < lower["inside_px"] and upper["visible_px"] > 0.98 * upper["inside_px"]
    assert lower["hidden_by"]["hinge_base"] == "tool"


def test_a_moving_tool_is_labelled_where_it_is_in_mid_exposure(made):
    still, moving = made["opened"], made["moving"]
    assert moving.rows[0]["segmentation"] == still.rows[0]["segmentation"] and moving.notes == still.notes
    sharp, blurred = (cv2.Laplacian(v.image, cv2.CV_64F).std() for v in (still, moving))
    assert np.abs(moving.image.astype(int) - still.image).mean() > 2 and blurred < sharp


def test_boxes_and_fractions_pass_the_check_of_datasets(made):
    images = [dict(id=i, file_name=f"{i}.jpg", width=320, height=240) for i in range(1, len(made) + 1)]
    rows = [row | dict(image_id=i) for i, view in enumerate(made.values(), 1) for row in view.rows]
    coco = new_coco(images, [row | dict(id=n) for n, row in enumerate(rows, 1)])
    for row in coco["annotations"]:
        left, top, width, height = row["bbox"]
        x, y, w, h = row["bbox_amodal"]
        assert x < left + 1 and y < top + 1 and x + w > left + width - 1 and y + h > top + height - 1
        assert 0 < row["visible_fraction"] <= 1
    for wrong in (dict(visible_fraction=1.01), dict(bbox_amodal=[0, 0, -1, 4]), dict(bbox_amodal=[1, 2, 3])):
        bad = json.loads(json.dumps(coco))
        bad["annotations"][0] |= wrong
        with pytest.raises(ValueError, match=r"annotations\[0\].*" + next(iter(wrong))):
            validate_coco(bad)
