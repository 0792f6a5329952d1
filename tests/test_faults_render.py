"""Hostile input to the renderer: names that lead out, Blender files with scripts, meshes that want more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from surgpose.cli import main
from surgpose.config import project_root
from surgpose.data.coco import read_coco
from surgpose.data.overlay import labelled_pictures
from surgpose.files import MANIFEST, read_json
from surgpose.synth import obj as obj_room
from surgpose.synth.bop import write_bop
from surgpose.synth.mesh_import import export_tool, import_obj
from surgpose.synth.obj import read_obj
from surgpose.synth.tools import parametric_asset

HOLDER = parametric_asset("needle_holder")

# 14: names in a dataset -------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path) -> Path:
    "A small rendered dataset beside a secret picture."
    sample, out = project_root() / "data" / "sample" / "render", tmp_path / "set"
    (out / "images").mkdir(parents=True)
    for path in (*sample.glob("*.json*"), *sorted((sample / "images").iterdir())[:20]):
        (out / path.relative_to(sample)).write_bytes(path.read_bytes())
    cv2.imwrite(str(tmp_path / "secret.jpg"), np.full((60, 80, 3), 200, np.uint8))
    return out


@pytest.mark.parametrize(
    "name",
    ["../secret.jpg", "images/../../secret.jpg", "..\\secret.jpg", "{secret}", "images/link.jpg",
     "hop/secret.jpg", "a\0b.jpg", "", "."],
)
@pytest.mark.parametrize(
    "read",
    [lambda d, out: read_coco(d / "coco_annotations.json"), lambda d, out: labelled_pictures(d),
     lambda d, out: write_bop(d, out, depth=False)],
    ids=["read", "draw", "bop"],
)
def test_a_name_that_leads_out_of_the_dataset_is_refused(dataset, tmp_path, name, read):
    (dataset / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (dataset / "hop").symlink_to(tmp_path)
    coco = read_json(dataset / "coco_annotations.json")
    coco["images"][0]["file_name"] = name.format(secret=tmp_path / "secret.jpg")
    (dataset / "coco_annotations.json").write_text(json.dumps(coco))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"annotations.json: images\[0\].file_name: .*(leads out|expected)"):
        read(dataset, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stem", ["../x", "/x", "a/../../x", "..\\x", "a\0b"])
def test_a_name_of_an_export_stays_in_its_folder(tmp_path, stem):
    with pytest.raises(ValueError, match="stem"):
        export_tool(HOLDER, 0.0, tmp_path / "models", stem)
    assert not list(tmp_path.rglob("*"))


# 20: Blender files with scripts -----------------------------------------------------------------------------

MAKE = """
import bpy, os, sys
path, mark = sys.argv[1:]
text = bpy.data.texts.new("evil.py")
text.write(f"open({mark!r}, 'a').write('script ')")
text.use_module = True
thing = bpy.data.objects.new("thing", None)
bpy.context.scene.collection.objects.link(thing)
thing.driver_add("location", 0).driver.expression = f"open({mark!r}, 'a').write('driver ')"
bpy.ops.wm.save_as_mainfile(filepath=path)
os._exit(0)
"""
OPEN = """
import bpy, os, sys
path, trusting = sys.argv[1], sys.argv[2] == "trusting"
if trusting: bpy.context.preferences.filepaths.use_scripts_auto_execute = True
else:
    from surgpose.config import RenderConfig
    from surgpose.synth.startup import start_blender
    start_blender(RenderConfig(), device="cpu", temp=os.path.dirname(path))
assert bpy.context.preferences.filepaths.use_scripts_auto_execute == trusting
bpy.ops.wm.open_mainfile(filepath=path)
bpy.context.scene.frame_set(3)
assert "thing" in bpy.data.objects
sys.stderr.flush()
os._exit(0)
"""


def run(code: str, *args: object) -> None:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_scripts_and_drivers_in_a_blender_file_stay_asleep(tmp_path):
    file, mark = tmp_path / "evil.blend", tmp_path / "mark"
    run(MAKE, file, mark)
    mark.unlink(missing_ok=True)
    run(OPEN, file, "trusting")
    assert set(mark.read_text().split()) == {"script", "driver"}, "the trap works"
    mark.unlink()
    run(OPEN, file, "ours")
    assert not mark.exists()


# 21: meshes -------------------------------------------------------------------------------------------------

CORNERS = [f"v {x} {y} {z}" for x in (0, 1) for y in (0, 1) for z in (0, 1)]
BOX = "\n".join([*CORNERS, "f 1 2 4", "f 5 6 8", ""])


@pytest.mark.parametrize("library", ["../secret.mtl", "{root}/secret.mtl", "hop/secret.mtl", "link.mtl",
                                     "..\\secret.mtl", "a/../../secret.mtl"])
def test_a_mesh_may_not_name_files_outside_its_folder(tmp_path, library):
    home = tmp_path / "models" / "needle_holder"
    home.mkdir(parents=True)
    (home.parent / "secret.mtl").write_text("newmtl gold\nKd 0.9 0.6 0.2\n")
    (tmp_path / "secret.mtl").write_text("newmtl gold\nKd 0.9 0.6 0.2\n")
    (home / "link.mtl").symlink_to(tmp_path / "secret.mtl")
    (home / "hop").symlink_to(tmp_path)
    (home / "evil.obj").write_text(f"mtllib {library.format(root=tmp_path)}\n{BOX}")
    with pytest.raises(ValueError, match="evil.obj mtllib: .* leads out of"):
        read_obj(home / "evil.obj")


WATCH = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from surgpose.synth.obj import read_obj
opened.clear()
read_obj(sys.argv[1])
print(*(name for name in opened if "secret" in name or name.startswith(sys.argv[2])), sep="\\n")
"""


def test_a_mesh_opens_its_own_two_files_and_no_other(tmp_path):
    "Textures, included files and URLs named in the OBJ or its MTL are never looked at."
    for name in ("secret.png", "secret.obj", "secret.mtl"):
        (tmp_path / name).write_text(BOX)
    (tmp_path / "mine.mtl").write_text("newmtl steel\nKd 1 1 1\nmap_Kd secret.png\nmap_Bump http://localhost/secret\n")
    (tmp_path / "mine.obj").write_text("call secret.obj\nmtllib mine.mtl\nusemtl steel\nmaplib secret.mtl\n"
                                       "shadow_obj secret.obj\n" + BOX)
    done = subprocess.run([sys.executable, "-c", WATCH, tmp_path / "mine.obj", tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert sorted({Path(name).name for name in done.stdout.split()}) == ["mine.mtl", "mine.obj"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (lambda: BOX + "f 1 2 3\n" * obj_room.MAX_FACES, "triangles"),
        (lambda: BOX + "f" + " 1" * (obj_room.MAX_FACES + 3) + "\n", "triangles"),
        (lambda: "v 0 0 0\n" * (obj_room.MAX_VERTICES + 1) + "f 1 2 3\n", "vertices"),
        (lambda: "# " + "x" * obj_room.MAX_BYTES, "expected at most 64 MB"),
        (lambda: "v 0 0 1e999\n" + BOX, "finite"),
        (lambda: BOX + "f 1 2 99999999999999999999\n", "expected OBJ text"),
        (lambda: "v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "x, y, z"),
        (lambda: "PK\x03\x04" + BOX[:20], "expected OBJ text"),
    ],
)
def test_a_mesh_that_is_too_much_or_none_is_refused_before_it_is_built(tmp_path, text, told, monkeypatch):
    "And the command line says it in one line, before anything is written."
    home = tmp_path / "models" / "tweezers"
    export_tool(parametric_asset("tweezers"), 0.0, home, "good")
    (home / "evil.obj").write_text(text())
    side = read_json(home / "good_kps.json")
    (home / "evil_kps.json").write_text(json.dumps(side))
    with pytest.raises(ValueError, match=told) as error:
        read_obj(home / "evil.obj")
    assert "evil.obj" in str(error.value) and len(str(error.value)) < 400
    monkeypatch.chdir(tmp_path)
    assert main(["render", "--models", "models", "--out", "out", "--images", "1"]) != 0
    assert not (tmp_path / "out").exists()


def test_a_pipe_or_a_folder_is_no_mesh(tmp_path):
    os.mkfifo(tmp_path / "pipe.obj")
    (tmp_path / "folder.obj").mkdir()
    for name in ("pipe.obj", "folder.obj"):
        with pytest.raises(FileNotFoundError, match="expected an OBJ file"):
            read_obj(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.mtl")  # reading it would never end
    (tmp_path / "mine.obj").write_text("mtllib pipe.mtl\n" + BOX)
    assert read_obj(tmp_path / "mine.obj").parts


def test_a_mesh_that_changes_after_it_was_checked_is_not_built(tmp_path):
    from surgpose.synth.tools import build_tool

    obj, kps = export_tool(HOLDER, 0.0, tmp_path, "mine")
    asset = import_obj(obj, kps, "needle_holder")
    obj.write_text(obj.read_text() + "\nv 9 9 9\n")
    with pytest.raises(ValueError, match="has changed since it was imported"):
        build_tool(asset, 0.0)


def test_the_sample_that_the_tests_spoil_is_whole():
    assert (project_root() / "data" / "sample" / "render" / MANIFEST).is_file()
