"""From predictions on video to an adapted network: nothing doubtful is learned, nothing is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import film_scripted
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from surgpose.adapt import refine as refining
from surgpose.adapt.benchmark import loop_oks_nms
from surgpose.adapt.pseudo import (
    FILTERS,
    Candidates,
    agreement,
    body_area,
    candidates,
    clean_poses,
    counts,
    frame_states,
    poses_of,
    read_candidates,
)
from surgpose.adapt.review import ReviewState, apply_decisions, review_items
from surgpose.adapt.scripted import CLIP_FAULTS, join, place_tool, scripted_clip
from surgpose.adapt.suppress import oks_nms_frames
from surgpose.adapt.track import follow, link, smooth_track
from surgpose.adapt.widget import FrameStore, ReviewView
from surgpose.config import EvaluateConfig, PseudoConfig, RefineConfig, TrackConfig, TrainConfig
from surgpose.data.coco import new_coco, read_coco, write_coco
from surgpose.files import check_manifest, read_json
from surgpose.schema import FLIP_IDX, SIGMAS, Frame, Poses, order_jaws

SPOILT = sorted(i for name, at in CLIP_FAULTS.items() if name != "duplicate" for i in at)


def judge(clip: list[tuple[Frame, Poses]]) -> Candidates:
    return follow(candidates(clip, PseudoConfig()), TrackConfig())


@pytest.fixture(scope="module")
def found() -> Candidates:
    return judge(scripted_clip())


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    "The scripted clip as a video of 80 frames, with the tools drawn in."
    return film_scripted(tmp_path_factory.mktemp("video") / "scripted.mp4")


@pytest.fixture(scope="module")
def pseudo(found, video, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pseudo") / "set"
    return refining.pseudo_dataset(video, found, None, out, progress=False)


# Single frames ------------------------------------------------------------------------------------

tools = st.builds(
    lambda x, y, angle, kind, score, conf: replace(
        place_tool((x, y), 120, angle, kind, score), keypoints=np.dstack([
            place_tool((x, y), 120, angle).keypoints[..., :2], np.array(conf)[None]])),
    st.sampled_from([200, 201, 203, 210, 400]), st.sampled_from([200, 202, 300]),
    st.sampled_from([0, 1, 4, 90]), st.sampled_from([1, 2]), st.floats(0.1, 0.99),
    st.lists(st.sampled_from([0.9, 0.9, 0.2]), min_size=5, max_size=5))


def oks_nms(poses: Poses, threshold: float) -> np.ndarray:
    return oks_nms_frames(poses, np.zeros(len(poses)), threshold)


@settings(max_examples=80, deadline=None)
@given(st.lists(tools, max_size=9), st.sampled_from([0.3, 0.6, 0.85]))
def test_oks_nms_is_the_plain_loop(parts, threshold):
    poses = clean_poses(join(parts), 0.5)
    keep = oks_nms(poses, threshold)
    assert keep.tolist() == loop_oks_nms(poses, threshold).tolist()
    again = poses[keep]
    assert oks_nms(again, threshold).all()  # doing it twice changes nothing


def test_a_ghost_goes_whatever_class_it_wears_and_whatever_point_it_lacks():
    tool = place_tool((200, 200), 150, 20, 1, 0.9)
    for kind in (1, 2):
        for missing in (None, 0, 4):
            ghost = replace(tool, category_id=[kind], score=[0.7], keypoints=tool.keypoints + [0.5, 0.5, 0])
            if missing is not None:
                ghost.keypoints[0, missing] = 0
            assert oks_nms(join([tool, ghost]), 0.85).tolist() == [True, False]


def test_agreement_has_cocos_factor_two():
    tool = place_tool((200, 200), 150, 0)
    area, shift = body_area(tool.xywh_px)[0], 8.0
    expected = math.exp(-(shift**2) / (2 * area * (2 * SIGMAS[0]) ** 2))
    got = agreement(tool.keypoints[0], tool.keypoints + [shift, 0, 0], np.array([area]))
    assert got[0] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(tools, max_size=6))
def test_no_guess_survives_cleaning(parts):
    poses = join(parts)
    clean = clean_poses(poses, 0.5, frame=Frame("v", 300, 260))
    sure = clean.keypoints[..., 2] > 0
    assert (clean.keypoints[~sure] == 0).all()
    assert (clean.keypoints[sure][:, :2] <= [299.5, 259.5]).all()
    whole = sure[:, :4].all(1)
    assert (order_jaws(clean.keypoints[whole]) == clean.keypoints[whole]).all()


# Tracks -------------------------------------------------------------------------------------------

frames = st.lists(st.lists(tools, max_size=4).map(join), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(frames, st.sampled_from([0.5, 3.0]))
def test_tracks_are_one_to_one_and_do_not_know_the_resolution(parts, factor):
    assume(all(len({k.tobytes() for k in p.keypoints}) == len(p) for p in parts))  # twins change places
    clip = [(Frame("v", 640, 480, i), p) for i, p in enumerate(parts)]
    larger = [(f, replace(p, xywh_px=p.xywh_px * factor, keypoints=p.keypoints * [factor, factor, 1]))
              for f, p in clip]
    ids = link(clip, TrackConfig())
    assert [len(i) for i in ids] == [len(p) for p in parts]
    assert all(len(set(i.tolist())) == len(i) for i in ids)
    assert [i.tolist() for i in link(larger, TrackConfig())] == [i.tolist() for i in ids]


def test_a_known_line_comes_back_within_the_stated_deviation():
    at = np.arange(50)
    line = np.stack([10 + 4.0 * at, 300 - 2.5 * at], 1)
    seen = np.delete(at, range(20, 25))
    off = []
    for seed in range(6):
        measured = line[seen] + np.random.default_rng(seed).normal(0, 2, (len(seen), 2))
        mean, std = smooth_track(seen, measured, at)
        assert np.abs(mean - line)[20:25].max() < 3 * 2
        off.append(np.abs(mean - line) / std)
    assert (np.array(off) < 2).mean() > 0.9
    assert (np.array(off)[:, 20:25] < 2).mean() > 0.9


def test_every_scripted_fault_is_found_where_it_is(found):
    for name, at in CLIP_FAULTS.items():
        hit = found.table.frame[[name in names for names in found.table.reasons]] // 2
        assert set(hit) == set(at), name
    assert [f // 2 for f, state in frame_states(found).items() if state == "doubtful"] == SPOILT
    clean = counts(judge(scripted_clip(faults=False, seed=4)))
    assert (clean["frames_kept"], clean["reasons"]) == (40, {})


# A person's word ----------------------------------------------------------------------------------


def test_a_review_survives_its_window_and_its_process(found, video, tmp_path):
    path, items = tmp_path / "decisions.jsonl", review_items(found)
    view = ReviewView(ReviewState(items, path), FrameStore(video, {i.frame for i in items}))
    view.accept.click()
    view.reject.click()
    view.undo.click()
    view = ReviewView(ReviewState(items, path), view.images)  # another session
    assert view.state.counts() == dict(accept=1, reject=0, fix=0, absent=0, open=len(items) - 1)
    assert view.position == 1 and view.bar.value == 1
    view.undo.click()
    assert view.state.progress == 0 and path.read_text().count("\n") == 4  # nothing is ever erased
    assert view.sheet(4).shape[1] == 3 * 360


def test_a_model_never_overrules_a_person(found, tmp_path):
    path, items = tmp_path / "decisions.jsonl", review_items(found)
    state = ReviewState(items, path)
    state.reject(0)
    machine = {**state.lines[0], "by": "model", "verdict": "accept"}
    for i, line in enumerate((machine, {**machine, "track": items[1].track, "frame": items[1].frame,
                                        "bbox": items[1].xywh_px.tolist()})):
        state._append(line)
        assert ReviewState(items, path).counts()["accept"] == i
    decided = apply_decisions(found, path).table
    row = decided[(decided.frame == items[0].frame) & (decided.track == items[0].track)].iloc[0]
    assert not row.kept and "rejected" in row.reasons


LINE = '{"video": "v", "frame": 1, "track": 0, "by": "person", "verdict": '


@pytest.mark.parametrize(("text", "says"), [
    ('{"video": 1}\n', "line 1: expected 'by'"),
    (LINE + '"yes"}\n', "line 1: expected a verdict"),
    (LINE + '"fix"}\n', "line 1: expected 15 numbers"),
    ("{}\nnot json\n", "line 2: expected JSON"),
])
def test_a_broken_decisions_file_names_the_line(found, tmp_path, text, says):
    path = tmp_path / "decisions.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        apply_decisions(found, path)
    assert path.read_text() == text


# Learning from it ---------------------------------------------------------------------------------


def test_a_frame_with_a_doubtful_tool_is_left_out_and_never_background(found, pseudo, video, tmp_path):
    coco = read_coco(pseudo / "coco_annotations.json", check_images=True)
    used = [im["frame"] // 2 for im in coco["images"]]
    assert used == [i for i in range(40) if i not in SPOILT] and check_manifest(pseudo) == []
    tools = [sum(a["image_id"] == im["id"] for a in coco["annotations"]) for im in coco["images"]]
    assert set(tools) == {2}
    assert all(a["area"] == pytest.approx(0.53 * a["bbox"][2] * a["bbox"][3]) for a in coco["annotations"])
    empty = judge([(Frame("v", 640, 360), Poses.empty())])
    nothing = refining.pseudo_dataset(video, empty, None, tmp_path / "none")
    assert read_coco(nothing / "coco_annotations.json")["images"] == []


def test_an_interrupted_dataset_leaves_the_earlier_one_alone(found, video, tmp_path, monkeypatch):
    few = Candidates(found.frames[:4], found.table[found.table.frame < 8])
    out = refining.pseudo_dataset(video, few, None, tmp_path / "set", progress=False)
    write, seen = refining._write_frame, []

    def fail(*args):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(refining, "_write_frame", fail)
    with pytest.raises(KeyboardInterrupt):
        refining.pseudo_dataset(video, found, None, out, progress=False)
    assert check_manifest(out) == [] and len(read_coco(out / "coco_annotations.json")["images"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_candidates_of_another_video_are_refused(found, video, tmp_path):
    other = Candidates(tuple(replace(f, width=1920, height=1080) for f in found.frames), found.table)
    with pytest.raises(ValueError, match="is it another video"):
        refining.pseudo_dataset(video, other, None, tmp_path / "set", progress=False)
    assert not any(tmp_path.iterdir())


def test_the_mix_keeps_the_mirror_and_the_sigmas(pseudo, toy_dataset, tmp_path):
    data = refining.mix(toy_dataset, pseudo, tmp_path / "mix", RefineConfig(synthetic_per_pseudo=0.2))
    facts = yaml.safe_load(data.read_text())
    assert (facts["flip_idx"], facts["kpt_oks_sigmas"]) == (list(FLIP_IDX), list(SIGMAS))
    assert refining.refine_recipe("t.pt", TrainConfig(), RefineConfig()).fliplr == 0.5
    labels = [p.read_text() for p in (data.parent / "labels" / "train").glob("*.txt")]
    assert len(labels) == 31 + round(0.2 * 31) and all(text.strip() for text in labels)  # none without a tool
    assert len(list((data.parent / "labels" / "val").glob("*.txt"))) == 4


def test_what_is_called_by_the_pipeline_really_filters(video, tmp_path, monkeypatch):
    "The duplicate and the temporal faults of the script are counted in what the run writes."
    from surgpose.pipeline import propose_labels
    from surgpose.pose.predict import write_predictions

    asked = []

    def predict(source, out, cfg, **kwargs):
        asked.append(cfg.stride)
        more = [(replace(f, index=f.index + 1), p) for f, p in scripted_clip()]  # nobody asked for these
        rows = sorted([*scripted_clip(), *more], key=lambda row: row[0].index)
        write_predictions(Path(out) / "predictions.json", rows)
        return Path(out)

    monkeypatch.setattr("surgpose.pose.predict.predict", predict)
    propose_labels(video, "none.pt", tmp_path, PseudoConfig(fps=12.5), TrackConfig())  # of 25 a second
    assert asked == [2]
    counted = read_json(tmp_path / "counts.json")
    assert counted["reasons"] == {name: len(at) for name, at in CLIP_FAULTS.items()}
    assert [counted[name] for name in FILTERS] == [80, 79, 78, 77, 77, 77, 73]
    written = read_coco(tmp_path / "dataset" / "coco_annotations.json")
    assert counted["frames_kept"] == len(written["images"]) == 31
    assert len(read_candidates(tmp_path / "candidates.json").table) == 83


def test_a_network_is_refined_and_judged(toy_dataset, tmp_path):
    "The real line at 64 px: one epoch from random weights, gate included."
    from surgpose.pose.model import build_model, write_weights

    pictures = read_coco(toy_dataset / "coco_annotations.json")
    train = [im for im in pictures["images"] if im["split"] == "train"][:4]
    rows = [a for a in pictures["annotations"] if a["image_id"] in {im["id"] for im in train}]
    labels = tmp_path / "pseudo"
    (labels / "images").mkdir(parents=True)
    for im in train:
        cv2.imwrite(str(labels / im["file_name"]), cv2.imread(str(toy_dataset / im["file_name"])))
    write_coco(labels / "coco_annotations.json", new_coco(train, rows))
    yolo, _ = build_model("yolov8n-pose", None)
    write_weights(tmp_path / "teacher.pt", yolo.model, dict(imgsz=64))
    out = refining.refine(
        tmp_path / "teacher.pt", toy_dataset, labels, tmp_path / "refined",
        TrainConfig(imgsz=64, batch=4, workers=0), RefineConfig(epochs=1, synthetic_per_pseudo=1),
        evaluate_cfg=EvaluateConfig(bootstrap=0), device="cpu", progress=False)
    facts = read_json(out / "refine.json")
    assert facts["mix"] == dict(
        pseudo_frames=4, pseudo_labels=4, person_frames=0,
        synthetic_available=12, synthetic_used=4, validation=4)
    assert facts["kept"] == "teacher" and "to judge by" in facts["reason"]  # from 0 to 0 proves nothing
    assert refining.kept_weights(out) == tmp_path / "teacher.pt"
    assert (out / "weights" / "best.pt").is_file() and (out / "metrics.json").is_file()


def test_poses_survive_the_table(found):
    pose = poses_of(found.table.head(2))
    assert np.allclose(pose.keypoints, scripted_clip()[0][1].keypoints, atol=1e-3)
