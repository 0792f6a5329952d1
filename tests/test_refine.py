"""Rounds, the gate and the ablation; and what is known to go wrong in pipelines of this kind.

Each of those has a check that ours passes and the wrong way does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import film_scripted

from surgpose import measure
from surgpose.adapt import refine as refining
from surgpose.adapt.ablation import ablation_rows, run_ablation
from surgpose.adapt.change import change_rows, timeline
from surgpose.adapt.gate import gate_rows, gate_verdict, held_out_scores
from surgpose.adapt.pseudo import (
    REASONS,
    Candidates,
    body_area,
    candidates,
    frame_states,
    make_table,
    write_candidates,
)
from surgpose.adapt.review import ReviewState, review_items
from surgpose.adapt.rounds import refine_rounds
from surgpose.adapt.scripted import CLIP_FAULTS, join, place_tool, scripted_clip
from surgpose.adapt.track import affinity, follow
from surgpose.config import (
    EvaluateConfig,
    PredictConfig,
    PseudoConfig,
    RefineConfig,
    TrackConfig,
    TrainConfig,
)
from surgpose.data.coco import new_coco, read_coco, write_coco
from surgpose.files import atomic_write, read_json, write_json
from surgpose.geometry import oks
from surgpose.pose.recipe import ultralytics_settings
from surgpose.schema import FLIP_IDX, HINGE, SIGMAS, Frame, order_jaws

TINY = TrainConfig(imgsz=64, batch=4, workers=0, warmup_epochs=0)
ONE = RefineConfig(epochs=1, synthetic_per_pseudo=0.2, min_frames=1)


def fails(check: Callable, *args: object) -> None:
    "The check must refuse the wrong way."
    with pytest.raises(AssertionError):
        check(*args)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    "The scripted clip: 20 samples as a video of 40 frames."
    return film_scripted(tmp_path_factory.mktemp("clip") / "scripted.mp4", samples=20)


@pytest.fixture(scope="module")
def found() -> Candidates:
    return follow(candidates(scripted_clip(20), PseudoConfig()), TrackConfig())


def seen_points(keypoints: list[float]) -> list[float]:
    return np.where(np.arange(15) % 3 == 2, 2, keypoints).tolist()


def tools_per_frame(coco: dict) -> dict[int, int]:
    return {im["frame"]: sum(a["image_id"] == im["id"] for a in coco["annotations"]) for im in coco["images"]}


@pytest.fixture(scope="module")
def truth() -> dict:
    rows = scripted_clip(20, faults=False, noise_px=0)
    images = [
        dict(id=i, file_name=f"v/{i}.jpg", width=640, height=360, frame=f.index)
        for i, (f, _) in enumerate(rows)
    ]
    tools = [
        dict(r, id=10 * i + n, image_id=i, keypoints=seen_points(r["keypoints"]))
        for i, (_, p) in enumerate(rows)
        for n, r in enumerate(p.to_rows())
    ]
    return new_coco(images, tools)


@pytest.fixture(scope="module")
def teacher(trained_toy) -> Path:
    return trained_toy


# What is known to go wrong ------------------------------------------------------------------------


def test_the_run_itself_filters_duplicates_and_tracks(clip, tmp_path, monkeypatch):
    from surgpose.pipeline import propose_labels
    from surgpose.pose.predict import write_predictions

    def predict(source, out, *args, **kwargs):
        write_predictions(Path(out) / "predictions.json", scripted_clip(20))
        return Path(out)

    monkeypatch.setattr("surgpose.pose.predict.predict", predict)

    def check(out: Path) -> None:
        counted = propose_labels(clip, "none.pt", out, PseudoConfig(), TrackConfig())["reasons"]
        assert counted.get("duplicate") == len(CLIP_FAULTS["duplicate"]) and counted.get("gap") == 2

    check(tmp_path / "ours")
    # there, the functions exist, and nobody calls them
    idle = {
        "suppress.oks_nms_frames": lambda poses, *a, **k: np.ones(len(poses), bool),
        "track.follow": lambda found, cfg, **more: found,
    }
    for name, nothing in idle.items():
        with monkeypatch.context() as one:
            one.setattr(f"surgpose.adapt.{name}", nothing)
            fails(check, tmp_path / name)


def test_a_frame_with_a_missed_tool_is_never_background(found, clip, truth, tmp_path, monkeypatch):
    def check(name: str) -> None:
        data = refining.pseudo_dataset(clip, found, None, tmp_path / name, progress=False)
        coco = read_coco(data / "coco_annotations.json")
        there, told = tools_per_frame(truth), tools_per_frame(coco)
        assert told and all(there[f] == n for f, n in told.items())

    check("ours")
    monkeypatch.setattr(refining, "frame_states", lambda f: dict.fromkeys(frame_states(f), "kept"))
    fails(check, "theirs")


def test_a_picture_mirrored_in_training_keeps_its_names(found, clip, toy_dataset, tmp_path):
    pseudo = refining.pseudo_dataset(clip, found, None, tmp_path / "pseudo", progress=False)
    facts = yaml.safe_load(refining.mix(toy_dataset, pseudo, tmp_path / "mix", ONE).read_text())

    def check(facts: dict) -> None:
        "Mirror a label as the training does, and ask the image rule whether its names are still right."
        points = place_tool((50, 80), 120, 30).keypoints[0]
        mirrored = (points * [-1, 1, 1] + [639, 0, 0])[facts.get("flip_idx", range(5))]
        assert (order_jaws(mirrored) == mirrored).all()

    assert refining.refine_recipe("t.pt", TrainConfig(), RefineConfig()).fliplr == 0.5  # so it does happen
    check(facts)
    fails(check, {k: v for k, v in facts.items() if k != "flip_idx"})


def test_the_optimiser_is_the_one_that_is_stated():
    from surgpose.pose.model import ultralytics

    ultralytics()
    from ultralytics.cfg import get_cfg

    def check(settings: dict) -> None:
        "With `auto`, Ultralytics chooses the optimiser itself and ignores lr0."
        assert get_cfg(overrides=settings).optimizer == "AdamW" and settings["lr0"] == RefineConfig().lr0

    recipe = refining.refine_recipe("t.pt", TrainConfig(), RefineConfig())
    check(ultralytics_settings(recipe))
    fails(check, ultralytics_settings(recipe) | dict(optimizer="auto"))


def test_what_is_gained_on_renders_does_not_make_up_for_the_target(monkeypatch):
    "A network that is better on renders and worse on the target is thrown away."
    better = {"renders": 0.80, "clip": 0.10}
    worse = {"renders": 0.60, "clip": 0.30}

    def evaluate(weights, data, out, cfg=None, **more):
        return dict(strict=dict(AP=(better if weights == "after" else worse)[data]))

    monkeypatch.setattr("surgpose.pose.evaluate.evaluate", evaluate)

    def check(target: str | None) -> None:
        before, after = (held_out_scores(w, "out", "renders", target=target) for w in ("before", "after"))
        assert gate_verdict(gate_rows(before, after, 0.02), 0.02)[0] == "teacher"

    check("clip")
    fails(check, None)


def test_oks_is_cocos_with_the_factor_two():
    def half(truth, found, area):
        d2 = ((truth[:, None, :, :2] - found[None, :, :, :2]) ** 2).sum(-1)
        return np.exp(-d2 / (2 * area[:, None, None] * np.array(SIGMAS) ** 2)).mean(-1)

    def check(similarity: Callable) -> None:
        from surgpose.adapt.benchmark import coco_oks

        tool = place_tool((200, 200), 150, 20)
        truth = tool.keypoints * [1, 1, 0] + [0, 0, 2]
        moved = truth + [6, 2, 0]
        area = body_area(tool.xywh_px)
        assert np.allclose(similarity(truth, moved, area), coco_oks(truth, moved, area))

    check(oks)
    fails(check, half)


def test_a_pixel_across_counts_like_a_pixel_down():
    "Two tools to go on with, 18 px to the right and 12 px down, in a wide picture: down is nearer."
    frame, tool = Frame("v", 1920, 1080), place_tool((400, 400), 150, 45)
    right, down = (
        replace(tool, keypoints=tool.keypoints + [*d, 0], xywh_px=tool.xywh_px + [*d, 0, 0])
        for d in ((18, 0), (0, 12))
    )
    others = join([right, down])

    def shares(pose, others, cfg):
        gaps = (others.keypoints - pose.keypoints)[..., :2] / [frame.width, frame.height]
        return -np.linalg.norm(gaps, axis=-1).mean(1)

    def check(closeness: Callable) -> None:
        assert closeness(tool, others, TrackConfig()).argmax() == 1

    check(affinity)
    fails(check, shares)


def test_near_its_own_mask_is_not_seen():
    "A finger of 3 mm over the hinge: the tool's own pixels are all round it, and the hinge is hidden."
    import trimesh

    from surgpose.synth.labels import what_hides
    from surgpose.synth.parts import Camera
    from surgpose.synth.tools import build_tool, parametric_asset

    camera = Camera(np.array([[600.0, 0, 320], [0, 600, 240], [0, 0, 1]]), 640, 480, np.eye(4))
    tool, T_world_tool = build_tool(parametric_asset("needle_holder"), 5.0), np.eye(4)
    T_world_tool[:3, 3] = 0, 0, 0.4
    finger = trimesh.creation.icosphere(radius=0.003)
    finger.apply_translation([*(T_world_tool[:3, 3] + tool.keypoints_m[HINGE])[:2], 0.37])
    parts = {name: mesh.copy().apply_transform(T_world_tool) for name, mesh in tool.parts.items()}
    solids = [("hand", 0, finger), *((name, 1, mesh) for name, mesh in parts.items())]

    def cast(eye, way):
        met = [
            (np.linalg.norm(p - eye), name, n, p)
            for name, n, m in solids
            for p in m.ray.intersects_location([eye], [way])[0]
        ]
        return min(met, key=lambda h: h[0])[1:] if met else None

    def by_ray() -> bool:
        return not what_hides(cast, camera, tool, T_world_tool, 1, HINGE)

    def by_mask(reach_px: int = 6) -> bool:
        x, y = (camera.K @ (T_world_tool[:3, 3] + tool.keypoints_m[HINGE]) / 0.4)[:2]
        grid = [(x + i, y + j) for i in (-reach_px, 0, reach_px) for j in (-reach_px, 0, reach_px)]
        ways = [np.linalg.solve(camera.K, [u, v, 1]) for u, v in grid]
        return any((cast(np.zeros(3), w / np.linalg.norm(w)) or ("", 0))[1] == 1 for w in ways)

    def check(seen: Callable[[], bool]) -> None:
        assert not seen()

    check(by_ray)
    fails(check, by_mask)


def test_the_names_of_the_jaws_can_be_learned():
    "A tool turned by half a turn about its axis looks the same, so its label must be the same."

    def check(name: Callable[[np.ndarray], np.ndarray]) -> None:
        for angle in range(0, 360, 30):
            points = place_tool((200, 200), 100, angle).keypoints[0]
            turned = points[list(FLIP_IDX)]  # the drawing's jaws have changed places, the picture has not
            assert (name(points) == name(turned)).all()

    check(order_jaws)
    fails(check, lambda points: points)


# A person's word ----------------------------------------------------------------------------------


def test_a_persons_frames_count_more_and_survive_later_rounds(found, clip, toy_dataset, tmp_path):
    items = review_items(found)
    state = ReviewState(items, tmp_path / "decisions.jsonl")
    gap = next(i for i, item in enumerate(items) if item.reasons == ("gap",))
    state.fix(gap, items[gap].keypoints * [1, 1, 0] + [0, 0, 1])
    first = refining.pseudo_dataset(clip, found, state.path, tmp_path / "first", progress=False)
    later = refining.pseudo_dataset(clip, found, None, tmp_path / "later", progress=False)  # nobody is asked
    frame, cfg = items[gap].frame, ONE.model_copy(update=dict(person_weight=3))
    for pseudo in (first, later):
        data = refining.mix(toy_dataset, pseudo, tmp_path / "mix", cfg, reviewed=first)
        labels = list((data.parent / "labels" / "train").glob(f"*{frame:06d}.txt"))
        labels = [p.read_text() for p in labels if not p.stem.startswith("0_")]  # those are renders
        assert len(labels) == 3 and all(len(text.splitlines()) == 2 for text in labels)
    (person,) = [a for a in read_coco(first / "coco_annotations.json")["annotations"] if a["by"] == "person"]
    assert person["keypoints"][2::3] == [1] * 5  # hidden, as the person said


def test_a_persons_word_reaches_a_frame_that_is_clear_in_a_later_round(found, clip, toy_dataset, tmp_path):
    items = review_items(found)
    state = ReviewState(items, tmp_path / "decisions.jsonl")
    gap = next(i for i, item in enumerate(items) if item.reasons == ("gap",))
    state.fix(gap, items[gap].keypoints * [1, 1, 0] + [0, 0, 1])
    frame, rows = items[gap].frame, found.table.to_dict("records")
    for row in rows:
        if row["frame"] == frame and row["track"] != items[gap].track:
            row |= dict(kept=False, reasons=("jump",))
    doubted = replace(found, table=make_table(rows))  # the other tool of the frame, in the first round
    first = refining.pseudo_dataset(clip, doubted, state.path, tmp_path / "first", progress=False)
    second = refining.pseudo_dataset(clip, found, state.path, tmp_path / "second", progress=False)
    assert frame not in tools_per_frame(read_coco(first / "coco_annotations.json"))
    cfg = ONE.model_copy(update=dict(person_weight=3))
    data = refining.mix(toy_dataset, second, tmp_path / "mix", cfg, reviewed=first)
    assert (
        len(
            [
                p
                for p in (data.parent / "labels" / "train").glob(f"*{frame:06d}.txt")
                if not p.stem.startswith("0_")
            ]
        )
        == 3
    )
    assert refining.mix_counts(toy_dataset, second, cfg, reviewed=first)["person_frames"] == 1


def test_a_persons_frames_neither_judge_nor_measure(found, clip, truth, toy_dataset, tmp_path, monkeypatch):
    items = review_items(found)
    state = ReviewState(items, tmp_path / "decisions.jsonl")
    state.accept(next(i for i, item in enumerate(items) if item.frame == min(i.frame for i in items)))
    (spoken,) = {key[1] for key in state.decisions}
    pseudo = refining.pseudo_dataset(clip, found, state.path, tmp_path / "pseudo", progress=False)
    write_coco(tmp_path / "truth.json", truth)

    def train(data, out, *args, **more):
        atomic_write(Path(out) / "weights" / "best.pt", "")

    monkeypatch.setattr("surgpose.pose.train.train", train)
    out = refine_rounds(
        atomic_write(tmp_path / "teacher" / "weights" / "best.pt", ""),
        toy_dataset,
        pseudo,
        tmp_path / "refined",
        cfg=ONE.model_copy(update=dict(gate_share=0.9)),
        video=clip,
        truth=tmp_path / "truth.json",
        judge=lambda weights, folder: dict(AP=0.5),
        progress=False,
    )
    facts = read_json(out / "refine.json")
    labelled = {im["frame"] for im in truth["images"]}
    assert spoken in labelled and spoken < max(facts["gate_frames"]) and facts["person_seen"] == [spoken]
    assert len(facts["gate_frames"]) == 17 and spoken not in facts["gate_frames"]
    asked = []
    monkeypatch.setattr(measure, "_compared_sets", lambda *args: asked.append(args[-1]) or [])
    monkeypatch.setattr(measure, "_change", lambda folders, truth, used, cfg: asked.append(used) or [])
    monkeypatch.setattr(measure, "_predicted", lambda *args: {})
    earlier = {name: value for name, value in facts.items() if name != "person_seen"}
    for written, used in ((facts, {spoken, *facts["gate_frames"]}), (earlier, {*facts["gate_frames"]})):
        write_json(out / "refine.json", written)
        paths = dict(video=clip, truth=tmp_path / "truth.json")
        measure.compare_runs(
            tmp_path / "teacher",
            out,
            tmp_path,
            EvaluateConfig(),
            predict=PredictConfig(overlay=False),
            **paths,
        )
        assert [set(frames) for frames in (asked.pop(), asked.pop())] == [used, used]


def test_a_long_clip_does_not_drown_the_renders(found, clip, toy_dataset, tmp_path):
    pseudo = refining.pseudo_dataset(clip, found, None, tmp_path / "pseudo", progress=False)
    all_of = refining.mix_counts(toy_dataset, pseudo, ONE)["pseudo_frames"]
    few = refining.mix_counts(toy_dataset, pseudo, ONE.model_copy(update=dict(pseudo_per_synthetic=0.5)))
    assert all_of > 6 and few["pseudo_frames"] == 6  # half of the 12 renders


# Rounds, for real ---------------------------------------------------------------------------------


def test_two_rounds_with_a_slow_teacher(found, clip, toy_dataset, teacher, tmp_path):
    from surgpose.pose.model import read_weights

    few = Candidates(found.frames[:4], found.table[found.table.frame < 8])
    pseudo = refining.pseudo_dataset(clip, few, None, tmp_path / "pseudo", progress=False)
    rising, asked = iter((0.3, 0.5, 0.4)), []

    def propose(weights: Path, out: Path) -> Path:
        asked.append(weights)
        return pseudo

    out = refine_rounds(
        teacher,
        toy_dataset,
        pseudo,
        tmp_path / "out",
        TINY,
        ONE.model_copy(update=dict(rounds=3, teacher_ema=0.5)),
        propose=propose,
        device="cpu",
        judge=lambda weights, folder: dict(AP=next(rising)),
        progress=False,
    )
    facts = read_json(out / "refine.json")
    assert [r["kept"] for r in facts["rounds"]] == ["refined", "teacher"] and facts["kept"] == "refined"
    assert asked == [out / "round_1" / "weights" / "averaged.pt"]
    a, b, student = (
        read_weights(p)["model"].state_dict()
        for p in (teacher, refining.kept_weights(out), out / "round_1" / "weights" / "best.pt")
    )
    moved = {k: float((student[k] - a[k]).abs().max()) for k in a if a[k].is_floating_point()}
    name = max(moved, key=moved.get)
    half_precision = 2e-3 * (1 + float(a[name].abs().max()))
    assert moved[name] > 0 and np.allclose(b[name], (a[name] + student[name]) / 2, atol=half_precision)


def test_the_ablation_runs_for_real(found, clip, truth, toy_dataset, teacher, tmp_path):
    few = Candidates(found.frames[:14], found.table[found.table.frame < 28])
    write_candidates(tmp_path / "pseudo" / "candidates.json", few)
    write_coco(tmp_path / "truth.json", truth)
    made = run_ablation(
        teacher,
        toy_dataset,
        clip,
        tmp_path / "pseudo",
        tmp_path / "truth.json",
        tmp_path / "out",
        TINY,
        ONE,
        rungs={"all doubts": REASONS},
        seeds=(0,),
        review=2,
        evaluate_cfg=EvaluateConfig(bootstrap=0),
        device="cpu",
        progress=False,
    )
    ablation = read_json(made)
    assert list(ablation["teacher"]) == ["AP on synthetic validation", "AP on labelled target frames"]
    assert [r["rung"] for r in ablation["rows"]] == ["all doubts", "+ review of the 2 worst"]
    assert all(set(r["scores"]) == set(ablation["teacher"]) for r in ablation["rows"])
    assert ablation_rows(ablation).seeds.tolist() == [0, 1, 1]
    assert len(ablation["reviewed_frames"]) in (1, 2)
    assert not {*ablation["reviewed_frames"]} & {*ablation["measured_frames"]}
    judged = read_json(tmp_path / "out" / "teacher" / "target" / "metrics.json")["n_images"]
    assert judged == ablation["frames"] == len(ablation["measured_frames"])
    assert judged == 20 - len(ablation["reviewed_frames"])
    assert all(r["gain"]["metric"] == "AP" and r["gain"]["delta"] is not None for r in ablation["rows"])


def test_the_verb_does_one_round_and_says_so(tmp_path, capsys):
    from surgpose.cli import main

    words = f"refine --teacher t.pt --data d --pseudo p --rounds 3 --out {tmp_path / 'o'}"
    with pytest.warns(UserWarning, match="one round, not 3"):
        assert main(words.split()) == 1
    assert "expected a JSON file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# Before and after ---------------------------------------------------------------------------------


def test_a_better_network_is_seen_to_be_better_in_every_measure(truth):
    worse, better = (
        timeline(scripted_clip(20, faults=faults, noise_px=noise), truth)
        for faults, noise in ((True, 4), (False, 1))
    )
    rows, back = (
        {r["metric"]: r for r in change_rows(*pair) if r["tool"] == "all"}
        for pair in ((worse, better), (better, worse))
    )
    assert all(r["delta"] < 0 for r in rows.values())
    assert all(back[name]["delta"] == -rows[name]["delta"] for name in rows)
    for name in ("median tip error / px", "tip jitter / px"):
        assert rows[name]["low"] <= rows[name]["delta"] <= rows[name]["high"] < 0
