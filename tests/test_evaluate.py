"""Scores against pycocotools and sums by hand; and what happens where there is nothing to score."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from surgpose.cli import main
from surgpose.config import EvaluateConfig, shared_dir
from surgpose.data.coco import new_coco, read_coco, write_coco
from surgpose.data.cvat import TipTracks, write_cvat_tips
from surgpose.data.video import read_image, write_video
from surgpose.data.yolo import write_yolo
from surgpose.files import read_json, sha256_file
from surgpose.pose.evaluate import across_sizes, evaluate, metrics, summary_row, tip_metrics
from surgpose.pose.judge import PCK_SHARES
from surgpose.pose.mistakes import calibration, confusion, confusion_by_image, pair_boxes, scored
from surgpose.pose.model import build_model, ultralytics, write_weights
from surgpose.pose.runs import runs_table
from surgpose.pose.tips import false_tips, tip_errors
from surgpose.pose.truth import load_truth, open_labelled

BASE = np.array([[50, 20], [46, 22], [54, 22], [50, 60], [50, 90.0]])
FEW = EvaluateConfig(bootstrap=40)
QUICK = EvaluateConfig(bootstrap=3, conf=0.0, max_det=3, imgsz=64)


def messy(seed: int, n: int = 14) -> tuple[dict, list[dict]]:
    "Tools drawn by hand, and predictions with misses, doubles, wrong classes and false alarms."
    rng = np.random.default_rng(seed)
    images = [dict(id=10 * i + 3, file_name=f"{i}.jpg", width=128, height=128) for i in range(n)]
    tools, found = [], []
    for i, im in enumerate(images):
        for k in range(i % 3):
            shift = np.array([24.0 * k, 5 * k])
            points = np.c_[BASE + shift, rng.integers(1, 3, 5)]
            box = [40 + shift[0], 15 + shift[1], 20, 80]
            area = float(rng.uniform(400, 1200))
            tools.append(
                dict(id=len(tools) + 1, image_id=im["id"], category_id=1 + (i + k) % 2, bbox=box, area=area)
                | dict(keypoints=points.ravel().tolist(), num_keypoints=5, iscrowd=0)
            )
            for _ in range(rng.integers(0, 3)):
                guess = np.c_[points[:, :2] + rng.normal(0, 3, (5, 2)), np.ones(5)]
                row = dict(image_id=im["id"], score=float(rng.uniform()), keypoints=guess.ravel().tolist())
                wrong = rng.uniform() < 0.2
                row["category_id"] = 3 - tools[-1]["category_id"] if wrong else tools[-1]["category_id"]
                row["bbox"] = (np.array(box) + rng.normal(0, 4, 4)).tolist()
                found.append(row)
    return new_coco(images, tools), found


def by_pycocotools(truth: dict, found: list[dict], kind: str, sigma: float) -> dict[str, float]:
    "COCO's own numbers, from end to end."
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        e = COCOeval(gt, gt.loadRes(found), kind)
        e.params.kpt_oks_sigmas, e.params.maxDets = np.full(5, sigma), [20]
        e.params.areaRng, e.params.areaRngLbl = [[0, 1e10]], ["all"]
        e.evaluate()
        e.accumulate()
    p, r = e.eval["precision"], e.eval["recall"]
    return dict(
        AP=p[p > -1].mean(), AP50=p[0][p[0] > -1].mean(), AP75=p[5][p[5] > -1].mean(), AR=r[r > -1].mean()
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_average_is_pycocotools_own(seed):
    truth, found = messy(seed)
    got = metrics(truth, found, FEW)
    for part, kind, sigma in (
        ("strict", "keypoints", 0.05),
        ("lenient", "keypoints", 0.2),
        ("box", "bbox", 0.05),
    ):
        for name, value in by_pycocotools(truth, found, kind, sigma).items():
            assert got[part][name] == pytest.approx(value, abs=1e-9), (part, name)
            assert got[part][f"{name}_low"] <= value <= got[part][f"{name}_high"]
    assert (got["strict"]["sigma"], got["lenient"]["sigma"]) == (0.05, 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_ultralytics_ruler_is_ultralytics_own(seed):
    "Its validator and its curve, on the same detections; its interpolation moves an average by a hundredth."
    ultralytics()
    import torch
    from ultralytics.models.yolo.pose import PoseValidator
    from ultralytics.utils.metrics import ap_per_class

    truth, found = messy(seed, 60)
    judge = PoseValidator(args=dict(task="pose", mode="val"))
    judge.sigma, stats = np.ones(5) / 5, []
    for im in truth["images"]:
        tools = [a for a in truth["annotations"] if a["image_id"] == im["id"]]
        rows = sorted((f for f in found if f["image_id"] == im["id"]), key=lambda f: -f["score"])
        batch, preds = (
            dict(
                cls=torch.tensor([r["category_id"] - 1.0 for r in part]),
                bboxes=torch.tensor([[x, y, x + w, y + h] for r in part for x, y, w, h in [r["bbox"]]]),
                keypoints=torch.tensor([r["keypoints"] for r in part]).reshape(-1, 5, 3).float(),
            )
            for part in (tools, rows)
        )
        tp = judge._process_batch(preds, batch)["tp_p"]
        stats.append((tp, [r["score"] for r in rows], preds["cls"], batch["cls"]))
    tp, scores, said, true = (
        np.concatenate([np.asarray(x) for x in part]) for part in zip(*stats, strict=True)
    )
    theirs = ap_per_class(tp, scores, said, true)[5]
    assert metrics(truth, found, FEW)["ultralytics"]["AP"] == pytest.approx(theirs.mean(), abs=0.015)


def test_pck_is_measured_at_2_5_and_10_percent_of_the_true_boxs_diagonal():
    assert PCK_SHARES == (0.02, 0.05, 0.10)
    images = [dict(id=i, file_name=f"{i}.jpg", width=128, height=128) for i in (1, 2)]
    points = np.c_[BASE, [2] * 5]
    tools = [
        dict(
            id=i,
            image_id=i,
            category_id=1,
            bbox=[40, 15, 30, 40],
            area=900.0,
            keypoints=points.ravel().tolist(),
        )
        for i in (1, 2)
    ]
    gaps = np.array([0.9, 1.1, 2.4, 2.6, 5.1])  # of a diagonal of 50 px: 1, 2.5 and 5 px are the limits
    guess = np.c_[BASE + np.c_[gaps, np.zeros(5)], np.ones(5)]
    found = [
        dict(image_id=1, category_id=1, score=0.9, bbox=[40, 15, 30, 40], keypoints=guess.ravel().tolist())
    ]
    got = metrics(new_coco(images, tools), found, FEW)
    assert [p["value"] for p in got["pck"]] == [0.1, 0.3, 0.4] and {p["n"] for p in got["pck"]} == {10}
    for name, gap in zip(("tip", "jaw_L", "jaw_R", "hinge_base", "handle_end"), gaps, strict=True):
        row = got["pixel"][name]
        assert (row["median_px"], row["mean_px"]) == pytest.approx((gap, gap)) and row["n"] == 1


def test_confusion_sums_to_all_tools_and_all_strong_detections():
    for seed in range(5):
        truth, found = messy(seed)
        table, false = confusion(truth, found, 0.3, 20)
        counts = np.array(table["counts"])
        assert counts[:-1].sum() == len(truth["annotations"]) and counts[-1, -1] == 0
        strong = [f for f in found if f["score"] >= 0.3]
        assert counts[:, :-1].sum() == len(strong)
        right = np.trace(counts[:-1, :-1])
        assert false["per_image"] * len(truth["images"]) == pytest.approx(len(strong) - right)
        assert sum(false["of"].values()) == len(strong) - right
        assert (confusion_by_image(truth, found, 0.3).sum(0) == counts).all()


def test_a_box_is_paired_once_and_only_from_half_an_overlap():
    true = np.array([[0, 0, 10, 10.0]])
    assert pair_boxes(true, np.array([[0, 0, 10, 20.0], [0, 0, 10, 10]])).tolist() == [0, -1]  # .5 is enough
    assert pair_boxes(true, np.array([[0, 0, 10, 20.1]])).tolist() == [-1]


def test_calibration_error_is_the_sum_by_hand():
    from surgpose.pose.judge import judge

    truth, found = messy(3, 40)
    judged = judge(truth, found, kind="bbox")
    s, got = scored(judged), calibration(judged, 20)
    bins = np.digitize(s.score, np.linspace(0, 1, 11)[1:-1])
    parts = [(bins == b) for b in range(10)]
    by_hand = sum(m.mean() * abs(s.right[m].mean() - s.score[m].mean()) for m in parts if m.any())
    assert got["ece"] == pytest.approx(by_hand) and got["n"] == len(s.score) == sum(
        b["n"] for b in got["bins"]
    )
    assert got["n"] == sum(f["score"] >= 0.1 for f in found)


def test_numbers_that_do_not_exist_are_null_and_say_why():
    truth, found = messy(0)
    no_tool = metrics(new_coco(truth["images"], []), found, FEW)
    assert no_tool["strict"]["AP"] is None and no_tool["reason"] == "there is no tool in 14 images"
    assert no_tool["false"]["per_image"] > 0 and no_tool["pck"][0]["value"] is None
    boxes = {**truth, "annotations": [{**a, "keypoints": [0] * 15} for a in truth["annotations"]]}
    bare = metrics(boxes, found, FEW)
    assert bare["strict"]["AP"] is None and "boxes alone" in bare["reason"] and bare["box"]["AP50"] > 0
    missed = metrics(truth, [], FEW)
    assert (missed["strict"]["AP"], missed["pck"][1]["value"], missed["pixel"]["tip"]["mean_px"]) == (
        0,
        0,
        None,
    )
    single = metrics(
        {**truth, "images": truth["images"][2:3], "annotations": truth["annotations"][1:3]}, [], FEW
    )
    assert single["strict"]["AP"] == 0 and single["strict"]["AP_low"] is None  # one image tells no interval
    nothing = metrics(new_coco([], []), [], FEW)
    for got in (no_tool, bare, missed, single, nothing):
        json.dumps(got, allow_nan=False)
        assert set(summary_row(got)) == set(summary_row(missed))


# Tips

TIPS = TipTracks(
    [1, 1, 2], [0, 1, 1], [[300, 400], [300, 400], [900, 100.0]], [True, False, True], 1600, 1200
)


def tool(frame: int, category_id: int, x: float, y: float, score: float = 0.9) -> dict:
    "A detection whose points all lie in one place."
    return dict(
        image_id=frame, category_id=category_id, score=score, bbox=[x, y, 9, 9], keypoints=[x, y, 1] * 5
    )


def test_tips_are_measured_above_the_threshold_in_shares_of_the_diagonal():
    found = [
        tool(0, 1, 300, 440),
        tool(1, 1, 300, 520),
        tool(1, 2, 900, 100, 0.1),
    ]  # 40, 120 and 0 of 2000 px
    got = tip_metrics(TIPS, found, EvaluateConfig(bootstrap=20))
    holder, tweezers = got["tips"]["needle_holder"], got["tips"]["tweezers"]
    assert [holder[f"within_{s}"] for s in (0.02, 0.05, 0.1)] == [0.5, 0.5, 1.0]
    assert holder["median_px"] == holder["mean_px"] == pytest.approx(80) and holder["keyframes"] == 1
    assert (tweezers["found"], tweezers["within"], tweezers["median_px"]) == (0, 0.0, None)
    assert "only tips" in got["reason"] and got["false"]["per_image"] == 0
    assert tip_errors(dict(images=[], annotations=[]), TIPS)["tweezers"]["within"] is None


def test_false_detections_are_far_doubled_or_of_a_tool_that_is_not_there():
    images = [dict(id=i, frame=i, width=1600, height=1200) for i in range(3)]
    near, far = tool(0, 1, 300, 599), tool(1, 1, 300, 601)  # a tenth of the diagonal is 200 px
    more = [tool(0, 1, 301, 400, 0.5), tool(0, 2, 900, 100), tool(1, 2, 900, 100), tool(2, 1, 0, 0)]
    got = false_tips(dict(images=images, annotations=[near, far, *more]), TIPS)
    assert (got["n"], got["per_image"]) == (2, 1.5)  # the third frame has no labels and does not count
    assert got["of"] == dict(needle_holder=2, tweezers=1)
    assert false_tips(dict(images=images, annotations=[near, far, *more]), TIPS, 0.95)["per_image"] == 0


# Whatever is labelled


def test_one_call_measures_folders_yaml_boxes_and_video(toy_dataset, trained_toy, tmp_path):
    def measured(data, **more):
        return evaluate(trained_toy, data, tmp_path / "out", QUICK, device="cpu", progress=False, **more)

    coco = measured(toy_dataset)
    assert coco["n_images"] == 4 and coco["strict"]["AP"] is not None and coco["provenance"]["imgsz"] == 64
    truth, root = load_truth(toy_dataset)
    yolo = measured(write_yolo(tmp_path / "yolo", dict(train=[(truth, root)], val=[(truth, root)])))
    assert yolo["n_images"] == 4 and yolo["n_tools"] == 4
    labels = tmp_path / "boxes" / "labels"
    labels.mkdir(parents=True)
    (tmp_path / "boxes" / "images").symlink_to(toy_dataset / "images")
    (labels / "000001.txt").write_text("0 .5 .5 .4 .4\n")
    boxes = measured(tmp_path / "boxes")
    assert (boxes["n_images"], boxes["n_tools"]) == (16, 1) and boxes["strict"]["AP"] is None
    assert boxes["box"]["AP"] is not None and "boxes alone" in boxes["reason"]
    elsewhere = tmp_path / "labels.json"
    write_coco(elsewhere, read_coco(toy_dataset / "coco_annotations.json"))
    assert measured(toy_dataset, truth=elsewhere, split=None)["n_images"] == 16


def clip_with_labels(folder):
    "Three grey frames; the second has a labelled tool."
    with write_video(folder / "clip.mp4", fps=25, width=128, height=96) as film:
        for v in (10, 90, 170):
            film.write(np.full((96, 128, 3), v, np.uint8))
    row = dict(id=1, image_id=7, category_id=1, bbox=[40, 5, 20, 80], area=800.0)
    row["keypoints"] = np.c_[BASE, [2] * 5].ravel().tolist()
    coco = new_coco([dict(id=7, file_name="clip/1.jpg", width=128, height=96, frame=1)], [row])
    write_coco(folder / "clip_coco.json", coco)
    write_cvat_tips(folder / "tips.xml", TipTracks([1, 2], [0, 2], [[9, 9], [30, 30]], [True, True], 128, 96))
    return folder / "clip.mp4"


def test_command_line_measures_a_video_by_frames_or_by_tips(trained_toy, tmp_path, capsys):
    clip = clip_with_labels(tmp_path)
    common = [
        "evaluate",
        "--weights",
        str(trained_toy),
        "--data",
        str(clip),
        "--device",
        "cpu",
        "--imgsz",
        "64",
    ]
    common += [
        "--bootstrap",
        "3",
        "--conf",
        "0.0",
        "--max-det",
        "3",
        "--sizes",
        "32",
        "64",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(common) == 0
    got = read_json(tmp_path / "out" / "metrics.json")
    assert (got["n_images"], got["n_tools"], [r["imgsz"] for r in got["sizes"]]) == (1, 1, [32, 64])
    assert {f["image_id"] for f in read_json(tmp_path / "out" / "found.json")} == {7}
    assert main([*common, "--truth", str(tmp_path / "tips.xml")]) == 0
    got = read_json(tmp_path / "out" / "metrics.json")
    assert (got["n_images"], set(got["tips"]), "strict" in got) == (2, {"needle_holder", "tweezers"}, False)
    assert [r["imgsz"] for r in got["sizes"]] == [32, 64]
    (tmp_path / "clip_coco.json").unlink()
    capsys.readouterr()
    assert main(common) != 0
    assert "--truth" in capsys.readouterr().err


def test_comparing_two_networks_leaves_tables_and_figures(toy_dataset, trained_toy, tmp_path, capfd):
    import torch

    for name in ("before", "after"):
        (tmp_path / name / "weights").mkdir(parents=True)
    shutil.copyfile(trained_toy, tmp_path / "before" / "weights" / "best.pt")
    with torch.random.fork_rng(devices=[]), pytest.warns(UserWarning, match="no initial weights"):
        torch.manual_seed(5)
        other = build_model()[0].model
    write_weights(tmp_path / "after" / "weights" / "best.pt", other, dict(imgsz=96))
    out = tmp_path / "out"
    given = dict(before=tmp_path / "before", after=tmp_path / "after", data=toy_dataset, out=out)
    given |= dict(device="cpu", imgsz=64, bootstrap=8, conf=0.0, max_det=3)
    flags = [text for k, v in given.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["compare", *flags]) == 0
    said, compared = capfd.readouterr().err, read_json(out / "compare.json")
    (one,) = compared["sets"]
    assert len(one["curves"]) == 2 and all(row["low"] <= row["delta"] <= row["high"] for row in one["paired"])
    rows = pd.read_csv(out / "synthetic_validation.csv")["metric"].tolist()
    assert rows == [row["metric"] for row in one["paired"]] and "box AP" in rows
    for end in ("deltas", "curves"):
        assert min(read_image(out / f"synthetic_validation_{end}.png").shape[:2]) > 100
    assert "synthetic validation, n = 4 images; low and high: 95 % interval of the difference" in said
    assert all(row in said for row in rows)


def test_sizes_make_rows(toy_dataset, trained_toy):
    table = across_sizes(trained_toy, toy_dataset, (32, 64), QUICK, device="cpu", progress=False)
    assert table["imgsz"].tolist() == [32, 64] and {"AP", "AP (.2)", "box AP50", "PCK 5 %"} <= set(table)


def test_runs_verb_prints_the_table_and_writes_it(tmp_path, capsys):
    from surgpose.config import project_root

    run = project_root() / "data" / "sample" / "run"
    assert main(["runs", str(run), "--out", str(tmp_path)]) == 0
    assert "yolov8n-pose" in capsys.readouterr().out and "best epoch" in (tmp_path / "runs.csv").read_text()
    assert len(runs_table([run, run])) == 2
    assert main(["runs", str(tmp_path / "none")]) != 0


def test_the_shipped_network_its_card_and_its_scores_belong_together():
    from surgpose.config import project_root

    data = project_root() / "data"
    shipped, run = data / "weights" / "surgpose-n.pt", data / "sample" / "run"
    assert shipped.stat().st_size < 8e6, "half precision"
    assert {p.suffix for p in (run / "evaluations").rglob("*") if p.is_file()} == {".json"}, "no pictures"
    told = [read_json(p) for p in (run / "metrics.json", *(run / "evaluations").glob("*.json"))]
    assert {m["provenance"]["weights_sha256"] for m in told} == {sha256_file(shipped)}
    assert all(m["n_images"] > 1 and m["false"]["per_image"] >= 0 for m in told)
    card = (shipped.parent / "README.md").read_text()
    assert sha256_file(shipped) in card and read_json(run / "provenance.json")["config_hash"] in card
    for part in ("strict", "lenient"):
        assert f"{told[0][part]['AP']:.3f}".removeprefix("0") in card


@pytest.mark.skipif(shared_dir() is None, reason="the shared footage is not here")
def test_real_stills_are_stretched_back_with_their_boxes():
    labelled = open_labelled(shared_dir() / "real" / "images", size=(554, 416))
    frame, image = next(labelled.frames())
    assert image.shape[:2] == (416, 554) and frame.width == 554 and len(labelled) == 150
    plain = open_labelled(shared_dir() / "real" / "images").truth["annotations"][0]["bbox"]
    stretched = labelled.truth["annotations"][0]["bbox"]
    assert np.divide(stretched, plain) == pytest.approx([554 / 416, 1, 554 / 416, 1])
