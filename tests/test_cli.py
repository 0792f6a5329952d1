"""The command line from end to end: a real render, a tiny training, a clip, an adaptation, reports."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_notebooks import looked_at

from surgpose import doctor
from surgpose.cli import main, parse_verb
from surgpose.config import project_root
from surgpose.data.coco import new_coco, read_coco, write_coco
from surgpose.data.video import read_image, video_info, write_video
from surgpose.files import append_jsonl, check_manifest, read_json, write_json
from surgpose.verbs import VERBS

TINY = [
    "--images",
    "6",
    "--width",
    "160",
    "--height",
    "120",
    "--samples",
    "2",
    "--val-share",
    "0.34",
    "--no-denoise",
]
# Small enough for seconds, and so lenient that even a network that has learned nothing proposes labels.
TINY_RUN = [
    "render.images=6",
    "render.width=160",
    "render.height=120",
    "render.samples=2",
    "render.val_share=0.34",
    "render.denoise=false",
    "train.epochs=1",
    "train.imgsz=96",
    "train.batch=4",
    "train.workers=0",
    "also_train=[{model: yolov8n-pose, epochs: 1, imgsz: 64, batch: 4, workers: 0}]",
    "refine.epochs=1",
    "refine.min_frames=1",
    "refine.gate_tolerance=1",
    "evaluate.bootstrap=10",
    "predict.conf=0.0001",
    "predict.max_det=2",
    "pseudo.doubt_conf=0",
    "pseudo.det_conf=0",
    "pseudo.kp_conf=0",
    "pseudo.min_kps=1",
    "pseudo.max_misfit=1000",
    "track.min_length=1",
    "track.max_jump=1000",
    "track.class_share=0",
    "track.max_gap=0",
]


def command(*args: object) -> SimpleNamespace:
    "Run a verb in this process."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(a) for a in args])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(*args: object) -> Path:
    "Run a verb that must succeed; the one line on stdout is the path of its result."
    done = command(*args)
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    assert Path(line).exists()
    return Path(line)


def make_clip(folder: Path, data: Path, repeats: int = 3) -> Path:
    "Play a dataset's images as a video, each for a few frames, with its labels beside it."
    coco = read_coco(data / "coco_annotations.json")
    clip, images, rows = folder / "clip.mp4", [], []
    first = coco["images"][0]
    with write_video(clip, fps=10, width=first["width"], height=first["height"]) as film:
        for im in coco["images"]:
            for _ in range(repeats):
                film.write(read_image(data / im["file_name"]))
                images.append(
                    {**im, "id": len(images) + 1, "frame": len(images), "file_name": f"f/{len(images)}.jpg"}
                )
                mine = [a for a in coco["annotations"] if a["image_id"] == im["id"]]
                rows += [{**a, "id": len(rows) + n, "image_id": len(images)} for n, a in enumerate(mine, 1)]
    write_coco(folder / "clip_coco.json", new_coco(images, rows))
    return clip


def weights_init() -> str:
    starter = project_root() / "data" / "weights" / "surgpose-n.pt"
    return str(starter) if starter.is_file() else "scratch"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    "Six real renders of 160x120 px."
    return succeed("render", "--out", tmp_path_factory.mktemp("cli") / "synthetic", "--seed", 3, *TINY)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, rendered) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"), rendered)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, rendered, clip) -> list[str]:
    "A whole run, as it is typed."
    out = tmp_path_factory.mktemp("run") / "tiny"
    return [
        "run",
        "--out",
        str(out),
        "--video",
        str(clip),
        "--weights-init",
        weights_init(),
        "--seed",
        "3",
        "--device",
        "cpu",
        *(part for text in TINY_RUN for part in ("-p", text)),
    ]


@pytest.fixture(scope="module")
def finished(arguments) -> SimpleNamespace:
    "The run, made by a process of its own."
    out = Path(arguments[2])
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    program = Path(sys.executable).with_name("surgpose")
    done = subprocess.run([program, *arguments], env=env, capture_output=True, text=True, timeout=500)
    return SimpleNamespace(out=out, done=done, record=read_json(out / "run.json"))


# Light


def imported_by(code: str) -> set[str]:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "torch",
    "torchvision",
    "ultralytics",
    "bpy",
    "blenderproc",
    "matplotlib",
    "pandas",
    "av",
    "papermill",
}


@pytest.mark.parametrize(
    "code", ["import surgpose", "import surgpose.cli", "from surgpose.cli import main; main(['--help'])"]
)
def test_nothing_heavy_is_imported(code):
    assert not imported_by(code) & HEAVY


def test_importing_any_module_imports_neither_torch_nor_blender():
    root = Path(__file__).resolve().parents[1]
    names = [
        ".".join(p.relative_to(root).with_suffix("").parts) for p in sorted((root / "surgpose").rglob("*.py"))
    ]
    code = "\n".join(f"import {n.removesuffix('.__init__')}" for n in names)
    assert not imported_by(code) & {"torch", "ultralytics", "bpy", "blenderproc", "matplotlib"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_every_flag_and_gives_an_example(verb):
    done = command(verb, "--help")
    assert done.code == 0 and f"Example: surgpose {verb}" in done.out
    text = re.sub(r"[│\s]+", " ", done.out)
    idle = ("stats", "report", "runs", "merge", "doctor", "docs")
    assert ("--device" in text) == (verb not in idle)
    assert ("--profile" in text) == (verb not in (*idle, "export")), "only settings come from a profile"
    for phase in PHASES:
        assert verb != "run" or phase in text


def test_config_fields_are_flags_with_the_defaults_of_the_profile():
    demo, paper = command("train", "--help").out, command("train", "--help", "--profile", "paper").out
    assert "--epochs INT" in demo and "(default: 8)" in demo and "(default: 200)" in paper


def test_files_of_two_people_become_one_and_tell_where_they_differ(tmp_path):
    said = dict(
        video="clip.mp4", frame=3, track=0, by="person", bbox=[1, 2, 30, 40], at="2026-01-01T00:00:00+00:00"
    )
    for who, verdict in (("ann", "accept"), ("bob", "reject")):
        append_jsonl(tmp_path / who / "decisions.jsonl", dict(said, verdict=verdict, who=who))
    files = [str(tmp_path / who / "decisions.jsonl") for who in ("ann", "bob")]
    done = command("merge", *files, "--out", str(tmp_path / "both.jsonl"))
    assert done.code == 0 and done.out.strip() == str(tmp_path / "both.jsonl")
    assert "differ on 1 poses" in done.err and "accept" in done.err and "reject" in done.err
    assert len((tmp_path / "both.jsonl").read_text().splitlines()) == 2
    absent = command("merge", files[0], str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "more.jsonl"))
    assert absent.code == 1 and "none.jsonl" in absent.err and not (tmp_path / "more.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["predcit"], "expected one of"),  # an unknown verb
        (["render", "--imagse", "4"], "--images"),  # an unknown flag; the nearest is named
        (["render", "--images", "zero"], "--images"),  # no number
        (["render", "--images", "0"], "greater than or equal to 1"),  # out of range
        (["render", "--fov-deg", "50", "20"], "low must not exceed high"),
        (["render", "--profile", "dmeo"], "--profile"),
        (["train"], "--data"),  # something is missing
        (["run", "-p", "train.epcohs=3"], "did you mean 'epochs'"),
        (["run", "-p", "trian.epochs=3"], "no section 'trian'"),
        (["run", "-p", "train.epochs=["], "train.epochs: expected a YAML value"),
        (["run", "-p", "train.epochs"], "expected phase.key=value"),
        (["run", "-p", "render.strategy_mix={studoi: 1}"], "studoi"),
        (["run", "--only", "trian"], "did you mean 'train'"),
        (["run", "--from", "trian"], "did you mean 'train'"),
        (["run", "--only", "compare", "--from", "10_render"], "none of compare comes at or after 10_render"),
        (["merge", "a.jsonl", "--out", "b.jsonl"], "two files or more"),
        (["report", "21_stats"], "did you mean '20_stats'"),
        (["report", "20_stats", "-p", "run_dri=x"], "did you mean 'run_dir'"),
        (["report", "20_stats", "-p", "limit=["], "parameter limit: expected a YAML value"),
        (["report", "20_stats", "-p", "run_dir"], "expected name=value"),
    ],
)
def test_bad_usage_is_2(args, told, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJ_OUT", str(tmp_path))
    done = command(*args)
    assert (done.code, done.out) == (2, "") and told in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["predict", "no/such.mp4", "--weights", "no/w.pt"], "no/w.pt"),
        (["train", "--data", "no/such/folder"], "no/such/folder"),
        (["evaluate", "--data", "no/such/folder", "--weights", "w.pt"], "no/such/folder"),
        (["run", "--video", "no/such.mp4"], "there is no such file"),
    ],
)
def test_a_failed_run_is_1_and_one_line(args, told, tmp_path):
    done = command(*args, "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, "") and told in done.err
    assert len(done.err.strip().splitlines()) == 1 and done.err.startswith(f"surgpose {args[0]}: ")
    assert not any((tmp_path / "out").glob("*")), "nothing half-written"


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    args = ["train", "--data", "no/such/folder", "--out", tmp_path]
    assert "Traceback" in command(*args, "--debug").err
    monkeypatch.setenv("SURGPOSE_DEBUG", "1")
    assert "Traceback" in command(*args).err


def test_the_environment_of_the_reference_pipeline_works(tmp_path, monkeypatch):
    (tmp_path / "surgical_tools_models").mkdir()
    (tmp_path / "vids_test").mkdir()
    (tmp_path / "vids_test" / "a.mp4").write_text("no video")
    monkeypatch.setenv("PROJ_DATA", str(tmp_path))
    monkeypatch.setenv("PROJ_OUT", str(tmp_path / "out"))
    verb = parse_verb("render", ["--profile", "paper"])
    assert verb.render.models_dir == tmp_path / "surgical_tools_models"
    assert verb.place(verb.out, "synthetic") == tmp_path / "out" / "synthetic"
    done = command("run")
    assert done.code == 1 and "vids_test/a.mp4: expected a video" in done.err


STUB = """
import os, sys, time
from dataclasses import dataclass
from surgpose import cli
@dataclass(frozen=True, kw_only=True)
class Slow(cli.Verb):
    "Wait."
    def run(self):
        print("noise"); os.system("echo noise from below")
        try:
            print("ready", file=sys.stderr, flush=True)
            time.sleep(float(os.environ["WAIT"]))
        except KeyboardInterrupt:
            print("tidying up", file=sys.stderr, flush=True)
            time.sleep(float(os.environ["TIDY"]))
            raise
        return "result"
cli.VERBS["slow"] = Slow
sys.argv = ["surgpose", "slow"]
sys.exit(cli.main())
"""


@contextlib.contextmanager
def slow_verb(seconds: float, tidy: float = 0, first: str = "") -> Iterator[subprocess.Popen]:
    "A verb that takes its time; `first` is what the process does before anything else."
    env = {**os.environ, "WAIT": str(seconds), "TIDY": str(tidy)}
    words = [sys.executable, "-c", first + STUB]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_only_the_result_goes_to_stdout():
    with slow_verb(0) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "result\n") and err.count("noise") == 2


def heard(process: subprocess.Popen, word: str) -> None:
    "Wait for a word."
    while word not in process.stderr.readline():
        assert process.poll() is None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_it_with_its_code(number, code):
    with slow_verb(60) as process:
        heard(process, "ready")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "") and "Traceback" not in err


def test_a_second_ctrl_c_does_not_wait():
    with slow_verb(60, tidy=600) as process:
        heard(process, "ready")
        process.send_signal(signal.SIGINT)
        heard(process, "tidying up")
        process.send_signal(signal.SIGTERM)  # the first one is being heeded
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_a_signal_that_nohup_ignores_stays_ignored():
    first = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with slow_verb(1, first=first) as process:
        heard(process, "ready")
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=60)[0] == "result\n" and process.returncode == 0


def test_doctor_fails_only_for_what_is_essential(monkeypatch):
    gone = doctor.Finding(False, "gone", "get it back")
    monkeypatch.setattr(
        doctor, "CHECKS", (("python", True, doctor.check_python), ("gpu", False, lambda: gone))
    )
    done = command("doctor")
    assert done.code == 0 and "Python 3.11" in done.out and "fix: get it back" in done.out
    monkeypatch.setattr(doctor, "CHECKS", (("blender", True, lambda: gone),))
    done = command("doctor")
    assert (done.code, done.out) == (1, "") and "MISSING" in done.err and "fix: get it back" in done.err


# One verb after another


def test_render_is_labelled_and_resumes(rendered):
    coco = read_coco(rendered / "coco_annotations.json", check_images=True)
    assert len(coco["images"]) == 6 and {im["split"] for im in coco["images"]} == {"train", "val"}
    assert {(im["width"], im["height"]) for im in coco["images"]} == {(160, 120)}
    assert check_manifest(rendered) == []
    before = {p: p.stat().st_mtime_ns for p in (rendered / "images").iterdir()}
    assert succeed("render", "--out", rendered, "--seed", 3, *TINY) == rendered
    assert {p: p.stat().st_mtime_ns for p in (rendered / "images").iterdir()} == before, (
        "nothing is drawn twice"
    )


def test_the_verbs_pass_their_results_on(rendered, clip, tmp_path):
    stats = read_json(succeed("stats", "--data", rendered, "--out", tmp_path / "stats"))
    assert stats["images"] == 6 and stats["verdict"]
    tiny = ["--epochs", 1, "--imgsz", 96, "--batch", 4, "--workers", 0]
    teacher = succeed(
        "train", "--data", rendered, "--weights-init", weights_init(), "--out", tmp_path / "teacher", *tiny
    )
    weights = teacher / "weights" / "best.pt"
    metrics = succeed(
        "evaluate", "--weights", weights, "--data", rendered, "--out", teacher, "--bootstrap", 10
    )
    assert read_json(metrics)["n_images"] == 2
    found = succeed(
        "predict",
        clip,
        "--weights",
        weights,
        "--out",
        tmp_path / "found",
        "--imgsz",
        128,
        "--stride",
        6,
        "--conf",
        0.0001,
        "--max-det",
        2,
    )
    assert len(read_json(found / "predictions.json")["images"]) == 3
    assert video_info(found / "overlay.mp4").frames == 3
    pseudo = succeed("pseudo", clip, "--weights", weights, "--out", tmp_path / "pseudo", "--stride", 6)
    assert read_json(pseudo / "counts.json")["frames"] == 3
    # Renders stand in for accepted frames: this network has learned too little to propose any.
    refined = succeed(
        "refine",
        "--teacher",
        weights,
        "--data",
        rendered,
        "--pseudo",
        rendered,
        "--out",
        tmp_path / "refined",
        "--epochs",
        1,
        "--min-frames",
        1,
        "--train.imgsz",
        96,
        "--train.batch",
        4,
        "--train.workers",
        0,
    )
    assert read_json(refined / "refine.json")["kept"] in ("teacher", "refined")
    compared = read_json(
        succeed(
            "compare",
            "--before",
            teacher,
            "--after",
            refined,
            "--data",
            rendered,
            "--video",
            clip,
            "--out",
            tmp_path / "compare",
            "--bootstrap",
            0,
        )
    )
    assert [s["name"] for s in compared["sets"]] == ["synthetic validation", "labelled clip"]
    assert all(s["rows"][0]["metric"] == "AP" and s["n"] for s in compared["sets"])
    names = [s["name"].replace(" ", "_") for s in compared["sets"]]
    assert all((tmp_path / "compare" / f"{name}.csv").is_file() for name in names)


# The whole run

PHASES = "render stats train evaluate predict pseudo refine compare".split()
PHASES += "10_render 20_stats 30_train 40_review 50_refine".split()


def test_run_makes_everything(finished):
    assert finished.done.returncode == 0, finished.done.stderr[-3000:]
    assert finished.done.stdout == f"{finished.out / 'index.html'}\n"
    phases = finished.record["phases"]
    assert list(phases) == PHASES and {p["status"] for p in phases.values()} == {"ok"}
    made = (
        "config.yaml synthetic/coco_annotations.json teacher/weights/best.pt teacher/metrics.json "
        "predictions/overlay.mp4 pseudo/candidates.json refined/refine.json refined/weights/best.pt "
        "predictions_refined/predictions.json side_by_side.mp4 compare.json also/yolov8n-pose/metrics.json"
    )
    assert [f for f in made.split() if not (finished.out / f).is_file()] == []
    for line in ("render: started", "[13/13] 50_refine: done in"):
        assert line in finished.done.stderr


def test_run_compares_before_and_after_on_both_kinds_of_data(finished):
    compared = read_json(finished.out / "compare.json")
    assert [(s["name"], s["n"]) for s in compared["sets"]] == [
        ("synthetic validation", 2),
        ("labelled clip", 13),  # of 18 frames; the first five were the gate's
    ]
    for s in compared["sets"]:
        assert all(row["before"] is not None and row["after"] is not None for row in s["rows"][:3])
    assert compared["verdict"] and compared["kept"] in ("teacher", "refined")


def test_run_leaves_an_index_that_needs_no_network(finished):
    index = (finished.out / "index.html").read_text()
    assert index.count('<img src="data:image/jpeg') == 5, "a picture for every report"
    links = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', index)
    assert links and all((finished.out / link).is_file() for link in links)
    assert index.count("<script") == 1 and "Not everything finished" not in index
    assert looked_at(finished.out / "index.html", *finished.out.glob("*.mp4")) == []


def test_a_second_run_skips_what_is_finished(finished, arguments):
    before = {
        p: p.stat().st_mtime_ns
        for p in finished.out.rglob("*")
        if p.is_file() and p.suffix in (".pt", ".jpg", ".mp4")
    }
    done = command(*arguments)
    assert done.code == 0 and done.err.count("up to date") == len(PHASES) and "started" not in done.err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def states(arguments: list[str], *more: str) -> dict[str, str]:
    "Run some phases again, and tell their states."
    done = command(*arguments, *more)
    return dict(re.findall(r"\] (\w+): (up to date|done|failed|not run)", done.err))


def test_a_changed_setting_runs_its_dependants_only(finished, arguments):
    some = ["--only", "render", "stats", "train", "evaluate", "predict", "-p", "evaluate.bootstrap=5"]
    fresh = dict.fromkeys(("render", "stats", "train", "predict"), "up to date")
    assert states(arguments, *some) == {**fresh, "evaluate": "done"}
    assert states(arguments, "--only", "stats", "--force") == {"stats": "done"}


def test_a_lost_result_stops_only_what_needs_it(finished, arguments):
    weights = finished.out / "teacher" / "weights" / "best.pt"
    weights.rename(weights.with_suffix(".away"))
    try:
        got = states(arguments, "--only", "render", "evaluate", "predict")
        assert got == {"render": "up to date", "evaluate": "not run", "predict": "not run"}
        record = read_json(finished.out / "run.json")
        assert (
            "teacher/weights/best.pt is missing" in record["phases"]["predict"]["error"]
            and record["ok"] is False
        )
        assert "Not everything finished" in (finished.out / "index.html").read_text()
    finally:
        weights.with_suffix(".away").rename(weights)
    assert states(arguments, "--only", "evaluate", "predict") == {"evaluate": "done", "predict": "done"}


def test_a_persons_decision_is_heard(finished, arguments):
    rows = read_json(finished.out / "pseudo" / "candidates.json")["rows"]
    row = next(r for r in rows if r["kept"])
    assert states(arguments, "--only", "pseudo") == {"pseudo": "up to date"}
    append_jsonl(
        finished.out / "pseudo" / "decisions.jsonl",
        dict(
            video="clip.mp4",
            frame=row["frame"],
            track=row["track"],
            verdict="reject",
            keypoints=None,
            by="person",
        ),
    )
    before = read_json(finished.out / "pseudo" / "counts.json")["frames_kept"]
    assert states(arguments, "--only", "pseudo") == {"pseudo": "done"}
    assert read_json(finished.out / "pseudo" / "counts.json")["frames_kept"] == before - 1
    assert (finished.out / "pseudo" / "decisions.jsonl").is_file(), "a person's words are never cleared"


def test_labels_of_another_video_are_refused(finished, arguments, clip, tmp_path):
    coco = read_json(clip.with_name("clip_coco.json"))
    wider = [{**im, "width": 999} for im in coco["images"]]
    truth = write_json(tmp_path / "truth.json", {**coco, "images": wider, "annotations": []})
    done = command(*arguments, "--truth", truth)
    assert done.code == 1 and "are they of another video" in done.err
