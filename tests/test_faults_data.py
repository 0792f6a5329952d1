"""Data from strangers and machines that fail: only clear errors, and nothing half-written."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from surgpose.data.coco import assign_splits, merge_coco, new_coco, poses_by_image, read_coco, write_coco
from surgpose.data.cvat import TipTracks, read_cvat_tips, write_cvat_skeletons, write_cvat_tips
from surgpose.data.yolo import read_yolo, read_yolo_boxes, write_yolo

hostile = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.sampled_from([10**30, 1e308, float("nan"), float("inf"), -0.5])
    | st.sampled_from(["", "../x", "/", "\0", "\ud800", "x" * 5000, "loop", "tip", "tweezers", "1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "size", "x"]), inner),
    max_leaves=6,
)


def dataset(root: Path) -> dict:
    """One picture with one tool, one without."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for i in (0, 1):
        Image.new("RGB", (64, 48)).save(root / "images" / f"{i}.jpg")
    images = [dict(id=i, file_name=f"images/{i}.jpg", width=64, height=48, scene=i) for i in (0, 1)]
    rle = dict(size=[48, 64], counts="PP3")
    tool = dict(id=1, image_id=0, category_id=2, bbox=[8, 6, 20, 30], area=300, segmentation=rle, iscrowd=0)
    return new_coco(images, [dict(tool, keypoints=[10, 8, 2, 9, 9, 2, 12, 9, 1, 15, 20, 2, 0, 0, 0])])


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON tree."""
    rows = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for key, value in rows for p in places(value, (*path, key)))]


def put(tree: dict, path: tuple, value: object) -> object:
    """The tree with another value at one place."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


@hostile
@given(st.data())
def test_any_value_anywhere_in_a_dataset(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fuzz")
    good = dataset(root)
    (root / "loop").symlink_to(root / "loop")
    bad = put(good, data.draw(st.sampled_from(places(good))), data.draw(anything))
    (root / "c.json").write_text(json.dumps(bad))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            coco = read_coco(root / "c.json")
        except ValueError as e:
            assert "c.json" in str(e)
            return
        poses_by_image(coco)
        merge_coco([coco])
        try:
            assert read_coco(write_coco(root / "d.json", coco)) == coco
        except UnicodeEncodeError:  # half a surrogate pair is JSON, but not UTF-8
            assert sorted(p.name for p in root.iterdir()) == ["c.json", "images", "loop"]
        try:
            made = write_yolo(root / "y", {"train": [(coco, root)]}, progress=False)
        except (ValueError, FileNotFoundError):
            assert not (root / "y").exists() and not list(root.glob(".y*"))
        else:
            read_yolo(made)


@hostile
@given(st.data())
def test_any_value_anywhere_in_a_data_yaml(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fuzz")
    made = write_yolo(root / "y", {"train": [(dataset(root), root)]}, progress=False)
    facts = yaml.safe_load(made.read_text())
    value = data.draw(anything)
    made.write_text(json.dumps(put(facts, data.draw(st.sampled_from(places(facts))), value)))  # JSON is YAML
    try:
        read_yolo(made)
    except (ValueError, FileNotFoundError) as e:
        assert str(root) in str(e)


@hostile
@given(st.data())
def test_any_value_anywhere_in_cvat(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fuzz")
    path = write_cvat_tips(root / "t.xml", TipTracks([1, 2], [0, 3], [[1, 2], [3, 4]], [True, True], 64, 48))
    text = path.read_text()
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start, min(start + 40, len(text))))
    noise = data.draw(st.sampled_from(["", "x", "-1", "9" * 400, "<a>", '"', "&x;"]))
    path.write_text(text[:start] + noise + text[stop:])
    try:
        read_cvat_tips(path)
    except ValueError as e:
        assert str(path) in str(e)


def test_a_frame_number_beyond_any_video(tmp_path):
    path = write_cvat_tips(tmp_path / "t.xml", TipTracks([1], [7], [[1, 2]], [True], 64, 48))
    path.write_text(path.read_text().replace('frame="7"', f'frame="{"9" * 400}"'))
    with pytest.raises(ValueError, match="t.xml.*so many frames"):
        read_cvat_tips(path)


@hostile
@given(st.binary(max_size=200))
def test_any_bytes_as_any_file(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "f").write_bytes(content)
    for read in (read_coco, read_yolo, read_cvat_tips):
        with pytest.raises(ValueError, match=str(root)):
            read(root / "f")


@pytest.mark.parametrize("read", [read_coco, read_yolo, read_cvat_tips, read_yolo_boxes])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_an_empty_dataset_goes_through_everything(tmp_path):
    empty = new_coco([], [])
    assert read_coco(write_coco(tmp_path / "c.json", empty)) == empty
    assert assign_splits(empty, 0.5)["images"] == [] == merge_coco([empty, empty])["images"]
    made = write_yolo(tmp_path / "y", {"train": [(empty, tmp_path)], "val": []}, progress=False)
    assert read_yolo(made)["train"]["images"] == [] == read_yolo(made)["val"]["images"]
    none = TipTracks([], [], [], [], 64, 48)
    assert len(read_cvat_tips(write_cvat_tips(tmp_path / "t.xml", none))) == 0
    assert write_cvat_skeletons(tmp_path / "s.xml", empty).is_file()


# ------------------------------------------------------------------------------------- machines that fail

DIE = """
import os, signal, sys
from pathlib import Path
from surgpose.data import yolo
from surgpose.data.coco import read_coco
root, place, left = Path(sys.argv[1]), yolo._place, [1]
def dying(*args):
    if not left: os.kill(os.getpid(), signal.SIGKILL)
    left.pop(); place(*args)
yolo._place = dying
yolo.write_yolo(root / "y", {"train": [(read_coco(root / "c.json"), root)]}, progress=False)
"""


def test_a_kill_leaves_no_folder_that_looks_finished(tmp_path):
    coco = dataset(tmp_path)
    write_coco(tmp_path / "c.json", coco)
    assert subprocess.run([sys.executable, "-c", DIE, tmp_path]).returncode == -signal.SIGKILL
    assert not (tmp_path / "y").exists()
    made = write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    assert len(read_yolo(made)["train"]["images"]) == 2
    assert subprocess.run([sys.executable, "-c", DIE, tmp_path]).returncode == -signal.SIGKILL
    assert len(read_yolo(made)["train"]["images"]) == 2  # the earlier result is still whole
    write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    assert not list(tmp_path.glob(".y*"))


FULL = """
import resource, signal, sys
from pathlib import Path
from surgpose.data.coco import new_coco, write_coco
from surgpose.data.cvat import TipTracks, write_cvat_tips
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
root, n = Path(sys.argv[1]), 200
big = new_coco([dict(id=i, file_name=f"{i}.jpg", width=9, height=9) for i in range(n)], [])
tips = TipTracks([1] * n, range(n), [[1, 2]] * n, [True] * n, 64, 48)
for write, name, what in ((write_coco, "c.json", big), (write_cvat_tips, "t.xml", tips)):
    try: write(root / name, what)
    except OSError as e: print(e)
"""


def test_a_full_disk_leaves_the_old_files(tmp_path):
    write_coco(tmp_path / "c.json", new_coco([], []))
    write_cvat_tips(tmp_path / "t.xml", TipTracks([], [], [], [], 64, 48))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    said = done.stdout
    assert said.count("File too large") == 2
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    coco = dataset(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_coco(tmp_path / "c.json", coco)
        with pytest.raises(PermissionError):
            write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["images"]
    finally:
        tmp_path.chmod(0o700)


def test_long_odd_and_colliding_names(tmp_path):
    names = ["A.png", "a.png", "ü" * 100 + ".png", " .png", "-rf.png", "$(id).png", "a;b'\"\n.png", "x.JPEG"]
    for n in names:
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / n)
    coco = new_coco([dict(id=i, file_name=n, width=9, height=9) for i, n in enumerate(names)], [])
    assert read_coco(write_coco(tmp_path / "c.json", coco), check_images=True) == coco
    made = write_yolo(tmp_path / "y", {"val": [(coco, tmp_path)]}, progress=False)
    assert len(read_yolo(made)["val"]["images"]) == len(names)
