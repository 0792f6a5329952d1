"""COCO, YOLO and CVAT: round trips as properties, outside oracles, and malformed input."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
import re
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from surgpose.config import shared_dir
from surgpose.data import yolo
from surgpose.data.coco import (
    annotations_by_image,
    area_px2,
    assign_splits,
    check_image,
    check_splits,
    mask_of_rle,
    merge_coco,
    new_coco,
    poses_by_image,
    read_coco,
    rle_of_mask,
    split_coco,
    validate_coco,
    write_coco,
)
from surgpose.data.cvat import TipTracks, read_cvat_tips, write_cvat_skeletons, write_cvat_tips
from surgpose.data.yolo import (
    POINT_SHIFT,
    annotation_of_line,
    read_yolo,
    read_yolo_boxes,
    write_yolo,
    yolo_line,
)
from surgpose.schema import FLIP_IDX, SIGMAS, coco_categories

few = settings(max_examples=100, deadline=None)
needs_shared = pytest.mark.skipif(shared_dir() is None, reason="the shared data are not beside this checkout")


# ----------------------------------------------------------------------------------------- what is made up


def inside(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=64)


@st.composite
def annotation(draw, width: int, height: int, spill: float = 0.0) -> dict:
    """A tool; with `spill`, box and points may lie that share of the image beyond its border."""
    w0, h0 = spill * width, spill * height
    x0, x1 = sorted([draw(inside(-w0, width + w0)), draw(inside(-w0, width + w0))])
    y0, y1 = sorted([draw(inside(-h0, height + h0)), draw(inside(-h0, height + h0))])
    points = []
    for _ in range(5):
        v = draw(st.sampled_from([0, 1, 2]))
        x, y = draw(inside(-0.5 - w0, width - 0.5 + w0)), draw(inside(-0.5 - h0, height - 0.5 + h0))
        points += [x, y, v] if v else [0, 0, 0]
    box = [x0, y0, max(x1 - x0, 0.5), max(y1 - y0, 0.5)]
    if not spill:
        box[:2] = [min(x0, width - box[2]), min(y0, height - box[3])]
    return dict(category_id=draw(st.sampled_from([1, 2])), bbox=box, keypoints=points)


sizes = st.tuples(st.integers(10, 8192), st.integers(10, 8192))


def picture(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return path


def dataset(root: Path, names: tuple[str, ...] = ("images/0.jpg", "images/1.png")) -> dict:
    """Pictures on disk, and labels: a tool in the first one, nothing in the others."""
    for n in names:
        picture(root / n)
    images = [dict(id=10 + i, file_name=n, width=64, height=48, scene=i) for i, n in enumerate(names)]
    mask = np.zeros((48, 64), bool)
    mask[6:36, 8:28] = True
    tool = dict(
        id=1,
        image_id=10,
        category_id=2,
        bbox=[8, 6, 20, 30],
        area=600,
        segmentation=rle_of_mask(mask),
        keypoints=[10, 8, 2, 9, 9, 2, 12, 9, 1, 15, 20, 2, 0, 0, 0],
        num_keypoints=4,
        iscrowd=0,
    )
    return new_coco(images, [tool])


# ----------------------------------------------------------------------------------------------- YOLO lines


@few
@given(st.data(), sizes)
def test_a_line_brings_everything_back(data, size):
    a = data.draw(annotation(*size))
    back = annotation_of_line(yolo_line(a, *size), *size)
    assert back["category_id"] == a["category_id"]
    np.testing.assert_allclose(back["bbox"], a["bbox"], atol=1e-3)
    np.testing.assert_allclose(back["keypoints"], a["keypoints"], atol=1e-3)
    assert back["keypoints"][2::3] == a["keypoints"][2::3]


@few
@given(st.data(), sizes)
def test_a_line_is_always_one_that_ultralytics_takes(data, size):
    a = data.draw(annotation(*size, spill=0.7))
    line = yolo_line(a, *size)
    x, y, w, h = a["bbox"]
    if x >= size[0] or y >= size[1] or x + w <= 0 or y + h <= 0:
        assert line == ""
    if not line:
        return
    v = np.array(line.split(), float)
    assert len(v) == 20 and v[0] in (0, 1)
    assert (v[1:5] >= 0).all() and (v[1:5] <= 1).all()
    points, told = v[5:].reshape(-1, 3), np.reshape(a["keypoints"], (-1, 3))
    assert (points[:, :2] >= 0).all() and (points[:, :2] <= 1).all()
    room = np.minimum(told[:, :2] + 0.5, np.array(size) - 0.5 - told[:, :2]).min(1)  # px to the border
    is_in, is_out = (room > 1e-6) & (told[:, 2] > 0), (room < -1e-6) | (told[:, 2] == 0)
    assert (points[is_out] == 0).all()
    assert (points[is_in, 2] == told[is_in, 2]).all()  # hidden ones stay hidden, they do not vanish


@few
@given(st.text(max_size=80))
def test_a_line_of_nonsense_is_refused_or_sound(text):
    try:
        a = annotation_of_line(text, 64, 48, where="x.txt line 1")
    except ValueError as e:
        assert str(e).startswith("x.txt line 1: ")
    else:
        assert np.isfinite(a["bbox"]).all()


# --------------------------------------------------------------------------------------------- YOLO folders


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_folder_brings_everything_back(tmp_path_factory, data):
    root, images, rows = tmp_path_factory.mktemp("set"), [], []
    for i in range(data.draw(st.integers(1, 4))):
        w, h = data.draw(st.tuples(st.integers(10, 300), st.integers(10, 300)))
        Image.new("L", (w, h)).save(root / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=w, height=h))
        for a in data.draw(st.lists(annotation(w, h), max_size=3)):
            rows.append(dict(a, id=len(rows), image_id=i))
    coco = new_coco(images, rows)
    back = read_yolo(write_yolo(root / "yolo", {"train": [(coco, root)]}, progress=False))["train"]
    truth, found = annotations_by_image(coco), annotations_by_image(back)
    by_name = {im["file_name"].rpartition("/")[2]: im for im in back["images"]}
    assert len(by_name) == len(images)
    for im in images:
        twin = by_name[f"0_{im['id']}_0_{im['id']}.png"]
        assert (twin["width"], twin["height"]) == (im["width"], im["height"])
        for a, b in zip(truth[im["id"]], found[twin["id"]], strict=True):
            assert a["category_id"] == b["category_id"]
            np.testing.assert_allclose(b["bbox"], a["bbox"], atol=1e-3)
            np.testing.assert_allclose(b["keypoints"], a["keypoints"], atol=1e-3)


NAMES = (
    "images/naïve 病院 [1]*?.jpg",
    "images/" + "long" * 40 + ".png",
    "images/sub/A.png",
    "images/a.png",
    "images/sub/a.jpg",
)


def test_odd_names_repeats_and_merged_sources(tmp_path):
    first, second = dataset(tmp_path / "eins", NAMES), dataset(tmp_path / "zwei", NAMES)
    made = write_yolo(
        tmp_path / "yölo [x]",
        {
            "train": [(first, tmp_path / "eins"), (second, tmp_path / "zwei")],
            "val": [(first, tmp_path / "eins")],
        },
        repeat={"train": [1, 3]},
        progress=False,
    )
    images = [p for p in made.parent.glob("images/train/*")]
    labels = [p for p in made.parent.glob("labels/train/*")]
    assert len(images) == len(labels) == 4 * len(NAMES)
    assert {p.stem for p in images} == {p.stem for p in labels}
    assert len({p.name.lower() for p in images}) == len(images)  # apart also where case does not count
    assert sum(p.stat().st_size > 0 for p in labels) == 4  # the others are background
    assert all(p.is_symlink() and p.is_file() for p in images)
    back = read_yolo(made)
    assert {k: len(c["annotations"]) for k, c in back.items()} == {"train": 4, "val": 1}


def test_data_yaml_says_it_all(tmp_path):
    coco = dataset(tmp_path)
    facts = yaml.safe_load(
        write_yolo(
            tmp_path / "y",
            {"train": [(coco, tmp_path)], "val": [(coco, tmp_path)]},
            sigmas=(0.1,) * 5,
            progress=False,
        ).read_text()
    )
    assert Path(facts["path"]).is_absolute() and Path(facts["path"]) == tmp_path / "y"
    assert (facts["train"], facts["val"]) == ("images/train", "images/val")
    assert facts["names"] == {0: "needle_holder", 1: "tweezers"}
    assert facts["kpt_shape"] == [5, 3] and facts["flip_idx"] == list(FLIP_IDX)
    assert facts["kpt_oks_sigmas"] == [0.1] * 5 and len(SIGMAS) == 5


def test_a_rebuild_drops_old_labels_and_caches(tmp_path):
    coco = dataset(tmp_path)
    made = write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)] * 2}, progress=False)
    (made.parent / "labels" / "train.cache").write_text("stale")
    write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    assert not list(tmp_path.rglob("*.cache"))
    assert len(list(made.parent.rglob("*.txt"))) == 2


def test_without_links_pictures_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "links are not possible")

    monkeypatch.setattr(os, "symlink", no_links)
    coco = dataset(tmp_path)
    made = write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    assert all(not p.is_symlink() and check_image(p) == (64, 48) for p in made.parent.glob("images/train/*"))


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    coco = dataset(tmp_path)
    made = write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(yolo, "_place", full)
    with pytest.raises(OSError, match="no space"):
        write_yolo(tmp_path / "y", {"val": [(coco, tmp_path)]}, progress=False)
    with pytest.raises(OSError, match="no space"):
        write_yolo(tmp_path / "z", {"val": [(coco, tmp_path)]}, progress=False)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert "train" in read_yolo(made)


def test_what_a_killed_run_left_is_swept(tmp_path):
    coco = dataset(tmp_path)
    for _ in range(2):
        for left in (".y.tmp", ".y.old"):
            picture(tmp_path / left / "images" / "train" / "0_10_0_0.jpg")
        write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "y"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    coco = dataset(tmp_path / "set")
    write_coco(tmp_path / "set" / "coco_annotations.json", coco)
    for target in (tmp_path / "set", tmp_path / "set" / "coco_annotations.json"):
        with pytest.raises(ValueError, match="expected an empty folder or an earlier result"):
            write_yolo(target, {"train": [(coco, tmp_path / "set")]}, progress=False)
    assert len(list((tmp_path / "set" / "images").iterdir())) == 2


def test_what_lies_outside_is_counted(tmp_path):
    coco = dataset(tmp_path)
    coco["annotations"][0]["keypoints"][:3] = [64.0, 8, 2]
    coco["annotations"].append(dict(id=2, image_id=11, category_id=1, bbox=[70, 0, 9, 9]))
    with pytest.warns(UserWarning, match="train: 2 boxes or keypoints"):
        write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)


def test_a_crowd_is_not_trained_on(tmp_path):
    coco = dataset(tmp_path)
    coco["annotations"][0]["iscrowd"] = 1
    made = write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    assert not any(p.stat().st_size for p in made.parent.rglob("*.txt"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(path="/no/such", train="images/none"), "expected a folder of images"),
        (dict(train="../../elsewhere"), "leads out of"),
        (dict(train="/etc"), "leads out of"),
        (dict(kpt_shape=[17, 3]), "expected kpt_shape"),
        (dict(kpt_shape=None), "kpt_shape: "),
        (dict(names=["needle_holder", "twezers"]), "did you mean 'tweezers'"),
        (dict(names=None), "names"),
    ],
)
def test_hostile_data_yaml(tmp_path, change, says):
    coco = dataset(tmp_path)
    made = write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)
    made.write_text(yaml.safe_dump({**yaml.safe_load(made.read_text()), **change}))
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_yolo(made)


def test_data_yaml_runs_no_code(tmp_path):
    (tmp_path / "data.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/evil']")
    with pytest.raises(ValueError, match="expected YAML"):
        read_yolo(tmp_path / "data.yaml")
    assert not (tmp_path / "evil").exists()


def test_a_moved_folder_still_reads(tmp_path):
    coco = dataset(tmp_path / "set")
    write_yolo(tmp_path / "y", {"train": [(coco, tmp_path / "set")]}, progress=False)
    shutil.move(tmp_path / "y", tmp_path / "moved")
    assert len(read_yolo(tmp_path / "moved" / "data.yaml")["train"]["annotations"]) == 1


@needs_shared
def test_the_stills_have_one_box_each():
    coco = read_yolo_boxes(shared_dir() / "real" / "images")
    assert len(coco["images"]) == len(coco["annotations"]) == 150
    assert [sum(a["category_id"] == c for a in coco["annotations"]) for c in (1, 2)] == [75, 75]
    assert {(im["width"], im["height"]) for im in coco["images"]} == {(416, 416)}
    assert all(len(p) == 1 and not p.keypoints.any() for p in poses_by_image(coco).values())


# ---------------------------------------------------------------------------------- Ultralytics as the judge


@pytest.fixture(scope="module")
def spots(tmp_path_factory) -> tuple[Path, np.ndarray, dict]:
    """A folder with one picture: five Gaussian spots, and keypoints at their exact centres."""
    root = tmp_path_factory.mktemp("spots")
    points = np.array([[40.3, 30.7], [60.0, 90.5], [120.9, 40.2], [200.25, 100.0], [250.6, 150.4]])
    y, x = np.mgrid[:180, :300]
    grey = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 4.0**2)) for px, py in points)
    Image.fromarray(np.clip(255 * grey, 0, 255).astype(np.uint8)).convert("RGB").save(root / "0.png")
    keypoints = np.c_[points, [2, 2, 2, 1, 2]]
    box = dict(id=1, image_id=1, category_id=1, bbox=[30, 20, 240, 140], keypoints=keypoints.ravel().tolist())
    coco = new_coco([dict(id=1, file_name="0.png", width=300, height=180)], [box])
    return write_yolo(root / "yolo", {"train": [(coco, root)]}, progress=False), keypoints, box


def centre(image: np.ndarray, near: np.ndarray, reach: float) -> np.ndarray:
    """The centre of the light near a point; pixel centres have whole coordinates."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    light = image.astype(float) * (np.hypot(x - near[0], y - near[1]) < reach)
    return np.array([(light * x).sum(), (light * y).sum()]) / light.sum()


def ultralytics_dataset(data_yaml: Path, imgsz: int):
    from surgpose.pose.model import ultralytics

    ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(data_yaml))
    return YOLODataset(
        img_path=data["train"],
        data=data,
        task="pose",
        imgsz=imgsz,
        augment=False,
        rect=False,
        hyp=get_cfg(overrides=dict(mosaic=0.0)),
        batch_size=1,
        prefix="",
    )


def test_ultralytics_reads_what_we_meant(spots):
    data_yaml, keypoints, box = spots
    label = ultralytics_dataset(data_yaml, 320).get_image_and_label(0)
    assert label["cls"].tolist() == [[0]]
    got = label["instances"].keypoints[0] * [300, 180, 1]
    np.testing.assert_allclose(got[:, :2] - POINT_SHIFT, keypoints[:, :2], atol=2e-4)
    assert got[:, 2].tolist() == [2, 2, 2, 1, 2]
    np.testing.assert_allclose(
        label["instances"].bboxes[0] * [300, 180, 300, 180], [150, 90, 240, 140], atol=1e-3
    )


@pytest.mark.parametrize("imgsz", [160, 320, 480])
def test_labels_sit_on_the_picture_at_every_size(spots, imgsz):
    """What the network is shown and what it is told agree to a tenth of a pixel, also mirrored."""
    data_yaml, keypoints, _ = spots
    item = ultralytics_dataset(data_yaml, imgsz)[0]
    image = item["img"][0].numpy()
    told = item["keypoints"][0].numpy()[:, :2] * imgsz
    image = np.where(image == 114, 0, image)  # the padding is grey
    gain = imgsz / 300
    for xy in told:
        seen = centre(image, xy - POINT_SHIFT, 10 * gain)
        np.testing.assert_allclose(xy - POINT_SHIFT, seen, atol=0.1)


def test_labels_sit_on_the_mirrored_picture(spots):
    from surgpose.pose.model import ultralytics

    data_yaml, keypoints, _ = spots
    ultralytics()
    from ultralytics.data.augment import RandomFlip

    label = RandomFlip(p=1.0, direction="horizontal", flip_idx=list(FLIP_IDX))(
        ultralytics_dataset(data_yaml, 300).get_image_and_label(0)
    )
    label["instances"].denormalize(300, 180)
    told = label["instances"].keypoints[0][:, :2]
    order = list(FLIP_IDX)
    np.testing.assert_allclose(told[:, 0] - POINT_SHIFT, 299 - keypoints[order, 0], atol=1e-3)
    for xy in told:
        np.testing.assert_allclose(xy - POINT_SHIFT, centre(label["img"][..., 0], xy, 10), atol=0.1)


@pytest.mark.parametrize("imgsz", [160, 320, 640])
def test_a_perfect_network_comes_back_to_the_same_pixel(spots, imgsz):
    import torch

    from surgpose.pose.model import ultralytics

    data_yaml, keypoints, _ = spots
    item = ultralytics_dataset(data_yaml, imgsz)[0]
    ultralytics()
    from ultralytics.utils.ops import scale_coords

    predicted = torch.tensor(item["keypoints"][0].numpy()[:, :2] * imgsz)[None]
    back = scale_coords((imgsz, imgsz), predicted, (180, 300))[0].numpy() - POINT_SHIFT
    np.testing.assert_allclose(back, keypoints[:, :2], atol=2e-3)


# ------------------------------------------------------------------------------------------------------ COCO


def test_pycocotools_reads_what_we_write(tmp_path):
    path = write_coco(tmp_path / "coco_annotations.json", dataset(tmp_path))
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCO(str(path))
    (a,) = judge.loadAnns(judge.getAnnIds())
    mask = judge.annToMask(a).astype(bool)
    assert mask.sum() == a["area"] == 600 and (mask == mask_of_rle(a["segmentation"])).all()
    from pycocotools import mask as coco_mask

    assert (
        coco_mask.area(a["segmentation"]) == 600 and coco_mask.toBbox(a["segmentation"]).tolist() == a["bbox"]
    )
    assert judge.loadCats([1])[0]["keypoints"] == coco_categories()[0]["keypoints"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_masks_come_back(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    rle = rle_of_mask(mask)
    json.dumps(rle)
    assert (mask_of_rle(rle) == mask).all()


def test_a_file_keeps_what_we_do_not_know(tmp_path):
    coco = dataset(tmp_path)
    coco["images"][0].update(fx=500.0, fy=500.0, cx=31.5, cy=23.5, T=[[1, 0], [0, 1]], hospital="北")
    coco["annotations"][0].update(opening_deg=12.5, score=0.7)
    coco["licences"] = ["CC0"]
    back = read_coco(write_coco(tmp_path / "c.json", coco), check_images=True)
    assert back == coco


def test_numpy_numbers_are_numbers(tmp_path):
    coco = dataset(tmp_path)
    a = coco["annotations"][0]
    a.update(id=np.int64(1), bbox=np.array(a["bbox"], np.float32), keypoints=np.array(a["keypoints"], float))
    back = read_coco(write_coco(tmp_path / "c.json", coco))["annotations"][0]
    assert back["bbox"] == [8, 6, 20, 30] and back["num_keypoints"] == 4


def bend(coco: dict, change) -> dict:
    coco = copy.deepcopy(coco)
    change(coco)
    return coco


def tool_with(**fields):
    return lambda c: c["annotations"][0].update(fields)


def image_with(**fields):
    return lambda c: c["images"][0].update(fields)


def class_with(**fields):
    return lambda c: c["categories"][0].update(fields)


MALFORMED = [
    (lambda c: c["annotations"].append(c["annotations"][0]), r"annotations\[1\]\.id: 1 occurs twice"),
    (
        lambda c: c["images"].append(dict(c["images"][0], file_name="x.jpg")),
        r"images\[2\]\.id: 10 occurs twice",
    ),
    (lambda c: c["images"].append(dict(c["images"][0], id=99)), r"images\[2\]\.file_name: .* occurs twice"),
    (
        lambda c: c["categories"].append(dict(c["categories"][0], id=9)),
        r"categories\[2\]\.name: 1 occurs twice",
    ),
    (lambda c: c["categories"].append(dict(c["categories"][1], id=1)), r"categories\[2\]\.id"),
    (tool_with(image_id=7), r"annotations\[0\]\.image_id: there is no image with id 7"),
    (tool_with(category_id=3), r"annotations\[0\]\.category_id: there is no category"),
    (tool_with(keypoints=[0] * 51), "5 points need 15 numbers, got 51"),
    (tool_with(keypoints=[10, 8, 2] * 4 + [float("nan"), 1, 2], num_keypoints=5), r"keypoints\[12\].*finite"),
    (tool_with(keypoints=[1, 2, 0] * 5, num_keypoints=0), r"must be \(0, 0, 0\)"),
    (tool_with(keypoints=[1, 2, 3] * 5, num_keypoints=5), "visibility 0, 1 or 2"),
    (tool_with(keypoints=None), r"annotations\[0\]\.keypoints"),
    (tool_with(bbox=[8, 6, -20, 30]), "width and height must be > 0"),
    (tool_with(bbox=[8, 6, 20, 0]), "width and height must be > 0"),
    (tool_with(bbox=[8, 6, float("inf"), 30]), r"bbox\[2\].*finite"),
    (tool_with(bbox=[8, 6, 20]), r"annotations\[0\]\.bbox"),
    (tool_with(bbox="8 6 20 30"), r"annotations\[0\]\.bbox"),
    (tool_with(area=-5), r"annotations\[0\]\.area"),
    (tool_with(num_keypoints=5), "num_keypoints: 4 keypoints are labelled, got 5"),
    (tool_with(id="1"), r"annotations\[0\]\.id"),
    (tool_with(segmentation=dict(size=[100000, 100000], counts="0")), "segmentation.size"),
    (image_with(width=0), r"images\[0\]\.width"),
    (image_with(height=-3), r"images\[0\]\.height"),
    (image_with(fx=float("nan")), r"images\.0\.fx: expected a finite number"),
    (tool_with(T_cam_tool=[[1], [float("inf")]]), r"annotations\.0\.T_cam_tool\.1\.0: expected a finite"),
    (image_with(file_name="../../x"), r"images\[0\]\.file_name: name: '../../x' leads out of"),
    (image_with(file_name="/etc/passwd"), r"images\[0\]\.file_name: name: '/etc/passwd' leads out of"),
    (image_with(file_name="..\\..\\x"), r"images\[0\]\.file_name"),
    (image_with(file_name="a\0.jpg"), r"images\[0\]\.file_name"),
    (image_with(file_name=""), r"images\[0\]\.file_name"),
    (class_with(name="needle_holdr"), r"categories\[0\]: .*did you mean 'needle_holder'"),
    (class_with(name="hammer"), "expected one of needle_holder, tweezers, got 'hammer'"),
    (class_with(skeleton=[[0, 3], [1, 3], [2, 3], [3, 4]]), "COCO counts from 1 to 5"),
    (class_with(skeleton=[[1, 6]]), "COCO counts from 1 to 5"),
    (class_with(keypoints=["tip", "jaw_R", "jaw_L", "hinge_base", "handle_end"]), "in this order"),
    (lambda c: c.pop("categories"), "categories: Field required"),
    (lambda c: c.update(images={}), "images: "),
]


@pytest.mark.parametrize(("change", "says"), MALFORMED, ids=[says for _, says in MALFORMED])
def test_a_malformed_dataset_is_refused(tmp_path, change, says):
    good = dataset(tmp_path)
    bad = bend(good, change)
    kept = write_coco(tmp_path / "kept.json", good).read_bytes()
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=says) as e:
        read_coco(tmp_path / "bad.json")
    assert str(e.value).startswith(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match=says):
        write_coco(tmp_path / "kept.json", bad)
    with pytest.raises(ValueError, match=says):
        write_coco(tmp_path / "new.json", bad)
    with pytest.raises(ValueError):
        write_yolo(tmp_path / "yolo", {"train": [(bad, tmp_path)]}, progress=False)
    assert (tmp_path / "kept.json").read_bytes() == kept
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_many_faults_are_not_a_flood():
    bad = new_coco([], [])
    bad["annotations"] = [dict(id=i, image_id=0, category_id=1, bbox=[0, 0, 1, 1]) for i in range(1000)]
    with pytest.raises(ValueError, match="1000 such in all") as e:
        validate_coco(bad)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "null", '"coco"', "{}", '{"images": [null]}', "\xff"])
def test_a_file_that_is_no_dataset(tmp_path, text):
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="c.json"):
        read_coco(tmp_path / "c.json")


def test_a_link_may_not_lead_out(tmp_path):
    secret = picture(tmp_path / "secret.jpg")
    coco = dataset(tmp_path / "set")
    (tmp_path / "set" / "images" / "0.jpg").unlink()
    (tmp_path / "set" / "images" / "0.jpg").symlink_to(secret)
    (tmp_path / "set" / "c.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="leads out of"):
        read_coco(tmp_path / "set" / "c.json")


def test_area_is_made_up_only_where_there_is_none(tmp_path):
    coco = dataset(tmp_path)
    coco["annotations"][0]["area"] = 0
    (tmp_path / "c.json").write_text(json.dumps(coco))
    with pytest.warns(UserWarning, match="1 areas missing"):
        back = read_coco(tmp_path / "c.json")
    assert back["annotations"][0]["area"] == pytest.approx(0.53 * 600) == area_px2(coco["annotations"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_coco(write_coco(tmp_path / "d.json", back)) == back


def test_foreign_ids_are_mapped_by_name(tmp_path):
    coco = dataset(tmp_path)
    coco["categories"] = [dict(id=0, name="Tweezers"), dict(id=7, name="needle holder")]
    coco["annotations"][0]["category_id"] = 0
    (tmp_path / "c.json").write_text(json.dumps(coco))
    back = read_coco(tmp_path / "c.json")
    assert back["annotations"][0]["category_id"] == 2 and back["categories"] == coco_categories()
    with pytest.raises(ValueError, match="read it with read_coco"):
        write_yolo(tmp_path / "y", {"train": [(coco, tmp_path)]}, progress=False)


# ---------------------------------------------------------------------------------------------------- images


def png_claiming(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))
    return path


def test_a_bomb_is_refused_by_its_header(tmp_path):
    for side in (10_000, 60_000):
        bomb = png_claiming(tmp_path / f"{side}.png", side, side)
        for decode in (True, False):
            with pytest.raises(ValueError, match="expected at most"):
                check_image(bomb, decode=decode)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
def test_a_cut_off_image_is_refused(tmp_path, suffix):
    whole = picture(tmp_path / f"a{suffix}")
    assert check_image(whole) == (64, 48)
    content = whole.read_bytes()
    for share in (0.05, 0.5, 0.95):
        (tmp_path / f"b{suffix}").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=f"b{suffix}"):
            check_image(tmp_path / f"b{suffix}")


def test_what_is_no_image_is_refused(tmp_path):
    for name, content in (
        ("text.jpg", b"not a picture"),
        ("empty.jpg", b""),
        ("page.png", b"<html></html>"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: expected an image"):
            check_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_image(tmp_path)


def test_a_turned_photo_has_the_size_that_is_shown(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert check_image(tmp_path / "a.jpg") == (48, 64)


# ----------------------------------------------------------------------------------------- splits and merging


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), inside(0, 0.99), st.integers(0, 5))
def test_no_group_is_torn(scenes, share, seed):
    coco = new_coco(
        [dict(id=i, file_name=f"{i}.jpg", width=9, height=9, scene=s) for i, s in enumerate(scenes)], []
    )
    out = assign_splits(coco, share, seed=seed)
    assert out == assign_splits(coco, share, seed=seed)
    sides = {s: {im["scene"] for im in split_coco(out, s)["images"]} for s in ("train", "val")}
    assert not sides["train"] & sides["val"] and sides["train"]
    assert bool(sides["val"]) == (share > 0 and len(set(scenes)) > 1)
    assert sum(check_splits(out).values()) == len(set(scenes))
    largest = max(scenes.count(s) for s in scenes)
    if sides["val"]:
        assert len(split_coco(out, "val")["images"]) <= share * len(scenes) + largest


@few
@given(st.lists(st.integers(0, 4), max_size=4))
def test_merging_loses_nothing(counts):
    sets = []
    for s, n in enumerate(counts):
        images = [dict(id=i, file_name=f"{s}/{i}.jpg", width=9, height=9) for i in range(n)]
        sets.append(
            new_coco(
                images, [dict(id=i, image_id=i, category_id=1, bbox=[0, 0, s + 1, i + 1]) for i in range(n)]
            )
        )
    out = merge_coco(sets)
    names = {im["id"]: im["file_name"] for im in out["images"]}
    assert len(names) == len(out["annotations"]) == sum(counts)
    for a in out["annotations"]:
        assert names[a["image_id"]] == f"{int(a['bbox'][2]) - 1}/{int(a['bbox'][3]) - 1}.jpg"


# ------------------------------------------------------------------------------------------------------ CVAT


@few
@given(st.data())
def test_tip_tracks_come_back(tmp_path_factory, data):
    rows = []
    for track in range(data.draw(st.integers(0, 3))):
        c = data.draw(st.sampled_from([1, 2]))
        for f in data.draw(st.sets(st.integers(0, 40), min_size=1, max_size=8)):
            rows.append(
                (
                    c,
                    f,
                    data.draw(inside(-5, 2000)),
                    data.draw(inside(-5, 2000)),
                    data.draw(st.booleans()),
                    track,
                )
            )
    rows = sorted(rows, key=lambda r: (r[5], r[1]))
    c, f, x, y, key, track = zip(*rows, strict=True) if rows else [()] * 6
    tips = TipTracks(c, f, np.stack([x, y], -1), key, 1920, 1080, 'a <task> & "more"', 41, track)
    back = read_cvat_tips(write_cvat_tips(tmp_path_factory.mktemp("cvat") / "tips.xml", tips))
    for name in ("category_id", "frame", "keyframe"):
        assert getattr(back, name).tolist() == getattr(tips, name).tolist()
    np.testing.assert_allclose(back.xy_px, tips.xy_px, atol=1e-4)
    assert (back.width, back.height, back.task, back.frames) == (1920, 1080, 'a <task> & "more"', 41)


def test_a_pause_is_written_for_cvat(tmp_path):
    """Without a point marked outside, CVAT would draw the tool on through the gap and to the end."""
    tips = TipTracks([1, 1, 1], [0, 1, 5], [[1, 2], [3, 4], [5, 6]], [True] * 3, 64, 48, frames=9)
    text = write_cvat_tips(tmp_path / "t.xml", tips).read_text()
    assert re.findall(r'frame="(\d+)" outside="1"', text) == ["2", "6"]


@needs_shared
def test_the_real_tracks_are_what_their_readme_says():
    tips = read_cvat_tips(shared_dir() / "real" / "video" / "surgery_test.xml")
    assert (len(tips), tips.frames, tips.width, tips.height, tips.skipped) == (
        166,
        83,
        1920,
        1080,
        ("scissors",),
    )
    assert [int(tips.keyframe[tips.category_id == c].sum()) for c in (1, 2)] == [15, 11]
    for c in (1, 2):
        assert tips.frame[tips.category_id == c].tolist() == list(range(83))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("<annotations>", "<annotations><broken>", "expected CVAT XML"),
        ("<version>1.1", "<version>1.0", "expected CVAT 1.1"),
        ('frame="0"', 'frame="first"', "track 0: expected frame"),
        ('frame="0"', 'frame="-1"', "below 0"),
        ('points="1.5000,2.5000"', 'points="1.5;2.5"', "one point x,y"),
        ('points="1.5000,2.5000"', 'points="1,2;3,4"', "one point x,y"),
        ('points="1.5000,2.5000"', 'points="1,inf"', "finite"),
        ('points="1.5000,2.5000"', "", "expected frame, keyframe"),
        ("<height>48", "<height>tall", "original_size"),
        ("<height>48", "<height>0", "size 64x0"),
    ],
)
def test_malformed_cvat_is_refused(tmp_path, old, new, says):
    path = write_cvat_tips(tmp_path / "t.xml", TipTracks([1], [0], [[1, 2]], [True], 64, 48))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=says) as e:
        read_cvat_tips(path)
    assert str(path) in str(e.value)


def test_entities_never_expand(tmp_path):
    levels = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "ha">{levels}]><annotations>&a11;</annotations>'
    leak = '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotations><version>&f;</version></annotations>'
    for text in (bomb, leak):
        (tmp_path / "b.xml").write_text(text)
        with pytest.raises(ValueError, match="refused"):
            read_cvat_tips(tmp_path / "b.xml")


def test_skeletons_hold_every_tool(tmp_path):
    import defusedxml.ElementTree

    root = defusedxml.ElementTree.parse(write_cvat_skeletons(tmp_path / "s.xml", dataset(tmp_path))).getroot()
    assert [im.get("name") for im in root.iter("image")] == ["images/0.jpg", "images/1.png"]
    (tool,) = root.iter("skeleton")
    assert tool.get("label") == "tweezers"
    assert [(p.get("outside"), p.get("occluded")) for p in tool] == [
        *[("0", "0")] * 2,
        ("0", "1"),
        ("0", "0"),
        ("1", "0"),
    ]
