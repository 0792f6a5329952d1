"""What is counted, drawn and reported of a dataset, against pandas, pycocotools and a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from surgpose.config import RenderConfig
from surgpose.data.coco import new_coco, read_coco, rle_of_mask, write_coco
from surgpose.data.counts import annotation_table, judge_mix, mix_verdict, summary_table
from surgpose.data.overlay import draw_labels
from surgpose.data.splits import in_two_splits, split_table
from surgpose.data.stats import all_figures
from surgpose.data.video import write_video
from surgpose.files import MANIFEST, read_json, write_json
from surgpose.report import run_report
from surgpose.schema import CLASSES, KEYPOINTS, order_jaws
from surgpose.synth.account import asked_counts, causes_table, losses_table, scene_notes, tool_notes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MAGENTA = (255, 0, 255)  # of the made-up footage; nothing else in a report looks like it


def draw_scene(folder: Path, index: int, rng: np.random.Generator, *, cameras: int = 1, **facts) -> tuple:
    "Draw a made-up scene: its record, and its COCO images and annotations without ids."
    tools, images, rows = [], [], []
    for c in range(cameras):
        name = f"images/{index:06d}{f'_c{c}' if c else ''}.jpg"
        picture, notes = rng.integers(60, 90, (90, 120, 3), dtype=np.uint8), []
        for t in range(2):
            x, y = int(rng.integers(10, 60)), 20 + 40 * t
            mask = np.zeros((90, 120), np.uint8)
            mask[y : y + 8, x : x + 50] = 1
            picture[mask > 0] = 200
            hidden = dict(
                zip(KEYPOINTS, rng.choice(["", "", "self", "hand", "drape"], 5).tolist(), strict=True)
            )
            points = np.array(
                [[x + 49, y + 4], [x + 49, y + 1], [x + 49, y + 7], [x + 20, y + 4], [x, y + 4]]
            )
            flags = [1 if hidden[k] else 2 for k in KEYPOINTS]
            notes.append(
                dict(
                    tool=t,
                    class_name=CLASSES[t],
                    visible_px=400,
                    annotated=True,
                    hidden_by=hidden,
                    inside_px=500,
                    visible_fraction=0.8,
                    against_renderer_px=1e-5,
                )
            )
            rows.append(
                dict(
                    image=name,
                    category_id=t + 1,
                    bbox=[x, y, 50, 8],
                    area=400,
                    segmentation=rle_of_mask(mask > 0),
                    bbox_amodal=[x, y, 62, 8],
                    keypoints=order_jaws(np.c_[points, flags]).ravel().tolist(),
                    visible_fraction=0.8,
                    opening_deg=float(rng.uniform(0, 20)),
                    asset=f"tool-{index}-{t}",
                    T_cam_tool=[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.4], [0, 0, 0, 1]],
                )
            )
        cv2.imwrite(str(folder / name), picture)
        split = facts.get("split", "train")
        family = {"family": facts["family"]} if facts.get("family") else {}
        sequence = {"sequence": facts["sequence"]} if "sequence" in facts else {}
        images.append(
            dict(
                file_name=name,
                width=120,
                height=90,
                scene=index,
                split=split,
                strategy=facts["strategy"],
                **family,
                **sequence,
            )
        )
        tools.append(dict(file_name=name, camera=c, tools=notes))
    props = [dict(kind=k) for k in facts.pop("props", ())]
    scene = dict(
        dict(
            index=index, split="train", family="", tools=[{}, {}], occluders=[dict(kind="hand")], props=props
        ),
        **facts,
    )
    return dict(scene=scene, shots=tools), images, rows


def make_rendered(folder: Path, scenes: list[dict], *, failed: dict | None = None, **config) -> Path:
    "Write a dataset folder as the renderer leaves it, without a renderer."
    (folder / "images").mkdir(parents=True)
    made = [draw_scene(folder, i, np.random.default_rng(i), **facts) for i, facts in enumerate(scenes)]
    images = [dict(id=n, **im) for n, im in enumerate((im for _, ims, _ in made for im in ims), 1)]
    ids = {im["file_name"]: im["id"] for im in images}
    rows = [dict(row) for _, _, some in made for row in some]
    rows = [dict(id=n, image_id=ids[row.pop("image")], **row) for n, row in enumerate(rows, 1)]
    write_coco(folder / "coco_annotations.json", new_coco(images, rows))
    (folder / "scenes.jsonl").write_text("".join(json.dumps(record) + "\n" for record, _, _ in made))
    cfg = RenderConfig(images=len(scenes), **config).model_dump(mode="json")
    write_json(
        folder / MANIFEST,
        dict(
            config=cfg,
            seed=0,
            failed=failed or {},
            files={},
            seconds={str(i): 2.0 for i in range(len(scenes))},
        ),
    )
    return folder


def some_scenes(n: int = 16) -> list[dict]:
    kinds = [
        dict(strategy="studio"),
        dict(strategy="hdri"),
        dict(strategy="theatre", family="trainer", props=["drape", "scissors"]),
        dict(strategy="theatre", family="operating_room", props=["drape", "tray"]),
    ]
    return [{**kinds[i % 4], "split": "train" if i // 4 % 4 else "val"} for i in range(n)]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    "A run folder whose synthetic images nobody had to render."
    run = tmp_path_factory.mktemp("run")
    make_rendered(run / "synthetic", some_scenes(), failed={"16": "no sign of life for 180 s"})
    return run


# Counts


def test_counts_are_those_of_pandas_and_pycocotools(rendered):
    path = rendered / "synthetic" / "coco_annotations.json"
    coco, oracle = read_coco(path), COCO(str(path))
    table, sums = annotation_table(coco), summary_table(coco)
    assert table.category.value_counts().to_dict() == {
        c["name"]: len(oracle.getAnnIds(catIds=[c["id"]])) for c in oracle.loadCats(oracle.getCatIds())
    }
    frame = pd.DataFrame(json.loads(path.read_text())["annotations"])
    flags = pd.DataFrame([k[2::3] for k in frame.keypoints], columns=list(KEYPOINTS))
    for v, name in ((2, "seen"), (1, "hidden"), (0, "outside")):
        assert sums.loc[f"keypoints {name}, %", "all"] == pytest.approx(
            100 * (flags == v).mean().mean(), abs=0.01
        )
        for k in KEYPOINTS:
            assert (table[k] == v).sum() == (flags[k] == v).sum()
    assert sums.loc["median opening, degrees", "all"] == pytest.approx(frame.opening_deg.median(), abs=0.01)
    np.testing.assert_allclose(
        table.width_px * table.height_px, [oracle.anns[i]["area"] for i in table.annotation_id]
    )


def test_what_hides_a_point_agrees_with_a_crosstab_and_with_the_labels(rendered):
    notes = tool_notes(rendered / "synthetic")
    causes = causes_table(notes, 99)
    long = notes.melt(value_vars=list(KEYPOINTS))
    oracle = 100 * pd.crosstab(long.variable, long.value, normalize="index")
    for cause in ("self", "hand", "drape"):
        np.testing.assert_allclose(causes[cause], oracle.loc[list(KEYPOINTS), cause])
    labels = annotation_table(read_coco(rendered / "synthetic" / "coco_annotations.json"))
    assert causes.seen["tip"] == pytest.approx(100 * (labels.tip == 2).mean())
    assert set(causes_table(notes, 1)) == {"seen", "self", "other things", "border", "outside"}
    np.testing.assert_allclose(causes_table(notes, 1)["other things"], causes["hand"] + causes["drape"])


def test_a_tray_is_no_distractor_and_scissors_are(rendered):
    scenes = scene_notes(rendered / "synthetic")
    assert scenes.groupby("kind").distractors.mean().to_dict() == {
        "hdri": 0,
        "studio": 0,
        "theatre: operating_room": 0,
        "theatre: trainer": 1,
    }
    assert losses_table(rendered / "synthetic").values.tolist() == [
        ["scenes not drawn", 1, "no sign of life for 180 s"]
    ]


# The mix


def test_the_judge_of_the_mix_is_rarely_wrong_and_sees_what_is_wrong():
    rng = np.random.default_rng(3)
    asked = {"studio": 0.06, "hdri": 0.21, "composite": 0.28, "theatre": 0.45}

    def wrong(shares: list[float], n: int) -> float:
        drawn = [dict(zip(asked, rng.multinomial(n, shares).tolist(), strict=True)) for _ in range(150)]
        return np.mean([judge_mix(counts, asked)["verdict"].startswith("not the mix") for counts in drawn])

    assert (
        wrong(list(asked.values()), 20) <= 0.04 and wrong(list(asked.values()), 200) <= 0.04
    )  # 1 in 100 by design
    assert wrong([0.25] * 4, 200) > 0.95
    assert (
        wrong([0.25] * 4, 20) < 0.9
    )  # a small dataset tells little: hence the range of chance beside each verdict


def test_frames_of_a_sequence_and_cameras_of_a_scene_are_one_draw(tmp_path):
    asked = {"hdri": 0.5, "theatre": 0.5}
    frames = make_rendered(tmp_path / "frames", [dict(strategy="hdri", sequence=0)] * 24, strategy_mix=asked)
    views = make_rendered(
        tmp_path / "views",
        [dict(strategy=s, cameras=4) for s in ("hdri", "theatre", "hdri")],
        strategy_mix=asked,
    )
    assert sum(asked_counts(frames)["Strategies"][0].values()) == 1
    said = mix_verdict(read_coco(frames / "coco_annotations.json"), asked)
    assert said.startswith("Of 1 sequences, hdri: 1") and "not the mix" not in said
    assert mix_verdict(read_coco(views / "coco_annotations.json"), asked).startswith(
        "Of 3 scenes, hdri: 2 (1.5 expected)"
    )
    assert scene_notes(views).seconds.tolist() == [0.5] * 12


# Splits


def test_a_scene_or_a_tool_in_two_splits_is_counted_said_and_drawn(rendered):
    coco = read_coco(rendered / "synthetic" / "coco_annotations.json")
    assert in_two_splits(coco) == {"scenes": set(), "tools": set()}
    images = [{**im, "scene": im["scene"] % 8} for im in coco["images"]]
    rows = [{**a, "asset": a["asset"] if a["image_id"] > 2 else "the same"} for a in coco["annotations"]]
    rows[-1]["asset"] = "the same"
    leaky = {**coco, "images": images, "annotations": rows}
    frame = pd.DataFrame(images).groupby("scene").split.nunique()
    assert len(in_two_splits(leaky)["scenes"]) == (frame > 1).sum() > 0
    assert in_two_splits(leaky)["tools"] == {"the same"}
    assert split_table(leaky).loc["val", "tools of other splits"] == 1
    hatched = [p for p in all_figures(leaky)["splits"].axes[1].patches if p.get_hatch() and p.get_width()]
    assert sum(p.get_width() for p in hatched) == split_table(leaky)["scenes of other splits"].sum()


# Drawing


def test_the_outline_is_the_masks_and_the_dashes_are_the_whole_tools(rendered):
    coco = read_coco(rendered / "synthetic" / "coco_annotations.json")
    row = {**coco["annotations"][0], "keypoints": [0] * 15}
    grey = np.full((90, 120, 3), 100, np.uint8)
    seen = (draw_labels(grey, [row], whole=False, side_px=90) != grey).any(-1)
    mask = coco_mask.decode(row["segmentation"]).astype(bool)
    assert seen[mask].all()
    assert not seen[~cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)].any()
    whole = (draw_labels(grey, [row], side_px=90) != grey).any(-1) & ~seen
    x, y, w, h = row["bbox_amodal"]
    far = whole[:, x + 53 :]
    assert far.any() and not whole[:, x + w + 2 :].any() and not whole[y + h + 2 :].any()


def test_seen_is_filled_and_hidden_is_not(rendered):
    coco = read_coco(rendered / "synthetic" / "coco_annotations.json")
    grey = np.full((90, 120, 3), 100, np.uint8)
    base = {k: v for k, v in coco["annotations"][0].items() if k in ("category_id", "bbox")}
    points = {
        v: draw_labels(grey, [{**base, "keypoints": [0] * 12 + [60, 45, v]}], side_px=90)[45, 60]
        for v in (1, 2)
    }
    assert (points[2] == (167, 121, 204)).all() and (
        points[1] == (25, 25, 25)
    ).all()  # the colour of handle_end; the ring's middle


# The folder of statistics


def surgpose(*args: object) -> subprocess.CompletedProcess:
    words = [
        sys.executable,
        "-c",
        "import sys; from surgpose.cli import main; sys.exit(main())",
        *map(str, args),
    ]
    return subprocess.run(words, capture_output=True, text=True)


def test_stats_leaves_numbers_figures_and_a_sheet(rendered, tmp_path):
    done = surgpose("stats", "--data", rendered / "synthetic", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    told = read_json(Path(done.stdout.strip().splitlines()[-1]))
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        *told["figures"],
        "contact_sheet.jpg",
        "stats.json",
    }
    for name in told["figures"]:
        assert cv2.imread(str(tmp_path / "o" / name)).std() > 3, f"{name} is empty"
    assert cv2.imread(str(tmp_path / "o" / "contact_sheet.jpg")).shape[1] == 6 * 320
    assert (
        told["rendered"]["kinds"]["theatre: trainer"]["images"]
        == 4
        == told["rendered"]["summary"]["asked"] / 4
    )
    assert {
        "asked_distractors_in_a_scene.png",
        "causes.png",
        "cost.png",
        "heatmap.png",
        "distance.png",
    } <= set(told["figures"])


def test_an_image_that_is_gone_leaves_its_name_and_a_broken_record_leaves_nothing(rendered, tmp_path):
    data = shutil.copytree(rendered / "synthetic", tmp_path / "data")
    (data / "images" / "000003.jpg").write_bytes(b"no picture")
    assert surgpose("stats", "--data", data, "--out", tmp_path / "o").returncode == 0
    lines = (data / "scenes.jsonl").read_text().splitlines()
    (data / "scenes.jsonl").write_text("\n".join([lines[0][:40], *lines[1:]]))
    done = surgpose("stats", "--data", data, "--out", tmp_path / "p")
    assert done.returncode != 0 and "line 1" in done.stderr and not (tmp_path / "p").exists()


# Reports


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', page)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR) for data in found]


def shows_magenta(page: str) -> bool:
    return any((np.abs(im.astype(int) - MAGENTA) < 40).all(-1).sum() > 500 for im in pictures(page))


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    "Footage whose frames are easily told from anything else."
    clip = tmp_path_factory.mktemp("footage") / "operation.mp4"
    with write_video(clip, fps=25, width=160, height=90) as video:
        for _ in range(12):
            video.write(np.full((90, 160, 3), MAGENTA, np.uint8))
    return clip


@pytest.fixture(scope="module")
def pages(rendered, footage, tmp_path_factory) -> dict[str, Path]:
    "Both reports of the run, and the first once more with leave to show the footage."
    out = tmp_path_factory.mktemp("pages")
    given = dict(run_dir=str(rendered), real_video=str(footage))
    return {
        "closed": run_report("10_render", out / "closed", given),
        "open": run_report("10_render", out / "open", {**given, "embed_real": True}),
        "stats": run_report("20_stats", out / "stats", dict(run_dir=str(rendered))),
    }


def test_real_frames_are_shown_on_demand_only(pages):
    closed, opened = pages["closed"].read_text(), pages["open"].read_text()
    assert not shows_magenta(closed) and shows_magenta(opened)
    for page in (closed, opened):  # the numbers are there either way
        assert "real frames apart" in page and "operation.mp4" in page


def test_the_first_screen_has_a_question_a_verdict_and_three_numbers(pages):
    for page in pages.values():
        stamp = read_json(page.with_suffix(".json"))
        assert stamp["status"] == "ok", stamp["error"]
        assert stamp["question"].endswith("?") and stamp["verdict"] and len(stamp["numbers"]) == 3
    said = read_json(pages["closed"].with_suffix(".json"))["verdict"]
    assert "1 of 16 scenes could not be drawn" in said and "mixes are" in said
    assert "No scene lies in two splits" in read_json(pages["stats"].with_suffix(".json"))["verdict"]


def test_every_figure_has_words_and_says_its_n(pages):
    for page in pages.values():
        text = page.read_text()
        alts, captions = (
            re.findall(r'<img alt="([^"]*)"', text),
            re.findall(r"<figcaption[^>]*>([^<]*)<", text),
        )
        assert len(alts) == len(captions) >= 5 and all(alts) and all(captions)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_a_browser_has_nothing_to_complain_about(pages):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        for path in pages.values():
            tab, said, asked = browser.new_page(viewport=dict(width=1280, height=800)), [], []
            tab.on("console", lambda m, said=said: said.append(m.text))
            tab.on("pageerror", lambda e, said=said: said.append(str(e)))
            tab.on("request", lambda r, asked=asked: asked.append(r.url))
            tab.goto(path.as_uri())
            wide, page = tab.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert said == [] and [u for u in asked if not u.startswith("data:")] == [path.as_uri()]
            assert wide <= page == 1280
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            tab.close()
        browser.close()
