"""A run as a whole: killed at any moment, stopped by a signal, under odd names, on a machine that says no."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import av
import numpy as np
import psutil
import pytest
from conftest import film_scripted

from surgpose import engine, measure, sources
from surgpose.adapt.pseudo import candidates, read_candidates, write_candidates
from surgpose.adapt.review import ReviewState, review_items
from surgpose.adapt.scripted import scripted_clip
from surgpose.adapt.track import follow
from surgpose.cli import main
from surgpose.config import EvaluateConfig, PredictConfig, PseudoConfig, TrackConfig, profile
from surgpose.data.coco import new_coco
from surgpose.data.video import read_video, video_info, write_video
from surgpose.docs import write_docs
from surgpose.engine import Job, Phase, fingerprint, run_phases
from surgpose.files import atomic_write, read_json, read_jsonl, utc_now, write_json
from surgpose.pipeline import PHASES, compare_phase, propose_labels
from surgpose.pose.evaluate import evaluate
from surgpose.pose.predict import predict, write_predictions
from surgpose.report import run_report
from surgpose.schema import Poses
from surgpose.sweep import read_matrix, sweep
from surgpose.synth.cluster import CODE, check_place
from surgpose.synth.workers import RECORDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).resolve().parents[1]

# Five phases that count in small steps, each of which is taken up again where it was; a ledger hears of every
# begin, step and end. The verb `toy` runs them as `surgpose run` runs its own.
TOY = """
import os, sys, time
from pathlib import Path
from surgpose import cli
from surgpose.config import profile
from surgpose.docs import write_docs
from surgpose.engine import Job, Phase, Unfinished, run_phases
from surgpose.files import append_jsonl, read_json, read_jsonl, write_json

out, steps = Path(os.environ["TOY_OUT"]), int(os.environ["TOY_STEPS"])

def say(kind, what):
    if os.environ["TOY_LEDGER"]: append_jsonl(os.environ["TOY_LEDGER"], {kind: what})
    print(kind, what, file=sys.stderr, flush=True)
    sys.stdin.readline()  # the test says go on; it has gone when it lets all run

def phase(name, *needs, base):
    def work(job):
        say("begin", name)
        rows = job.out / f"{name}.jsonl"
        total = sum(read_json(job.out / f"{n}.json")["total"] for n in needs)
        for k in range(len(read_jsonl(rows)) if rows.is_file() else 0, steps):
            time.sleep(0.003)
            append_jsonl(rows, dict(step=k, value=(base + 31 * k * k) % 97))
            say("step", f"{name} {k}")
        write_json(job.out / f"{name}.json", dict(total=total + sum(r["value"] for r in read_jsonl(rows))))
        say("end", name)
        return read_json(job.out / f"{name}.json")
    return Phase(name, work, needs=needs, makes=(f"{name}.json",), clears=(f"{name}.jsonl",))

PHASES = (phase("draw", base=1), phase("learn", "draw", base=2), phase("look", "learn", base=3),
          phase("adapt", "learn", "look", base=4), phase("tell", "draw", "adapt", base=5))

class Toy(cli.Verb):
    "Count."
    def run(self):
        if not run_phases(PHASES, Job(profile("demo"), out)): raise Unfinished(out)
        return out / "index.html"

cli.VERBS["toy"] = Toy
sys.argv = ["surgpose", "toy"]
sys.exit(cli.main())
"""


class ToyRun:
    "A run folder, and what the processes that worked on it have said."

    def __init__(self, root: Path, steps: int = 6) -> None:
        self.out, self.ledger = root / "run", root / "ledger.jsonl"
        self.env = {
            **os.environ,
            "TOY_OUT": str(self.out),
            "TOY_LEDGER": str(self.ledger),
            "TOY_STEPS": str(steps),
        }

    def start(self) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-c", TOY], env=self.env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def stop(self, number: int, line: int, wait_s: float = 0.0) -> tuple[int, str]:
        "Start it, send a signal some lines after it began to work; its exit code and the rest of its words."
        process = self.start()
        try:
            while line:
                told = process.stderr.readline()
                assert told, process.communicate()
                if told.startswith(("begin", "step", "end")):
                    line -= 1
                    process.stdin.write("\n")
                    process.stdin.flush()
            time.sleep(wait_s)
            process.send_signal(number)
            return process.wait(60), process.communicate(timeout=60)[1]
        finally:
            process.kill()
            process.communicate()

    def finish(self) -> SimpleNamespace:
        "Run what is left."
        out, err = self.start().communicate(timeout=120)
        return SimpleNamespace(out=out, err=err, record=read_json(self.out / "run.json"))

    def numbers(self) -> dict:
        return {n: p["numbers"] for n, p in read_json(self.out / "run.json")["phases"].items()}

    def heard(self) -> list[tuple[str, str]]:
        return [pair for row in read_jsonl(self.ledger) for pair in row.items()]


def test_a_run_killed_five_times_ends_in_the_same_numbers_and_repeats_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, torn = ToyRun(tmp_path / "a"), ToyRun(tmp_path / "b")
    assert whole.finish().out == f"{whole.out / 'index.html'}\n"
    chance = random.Random(5)
    for _ in range(5):  # a phase has eight lines, so five kills leave something for the end
        assert torn.stop(signal.SIGKILL, chance.randint(1, 7), chance.uniform(0, 0.02))[0] == -signal.SIGKILL
        assert read_json(torn.out / "run.json")["phases"], "the record is whole at any moment"
    done = torn.finish()
    assert done.record["ok"] and torn.numbers() == whole.numbers()
    heard = torn.heard()
    for name in ("draw", "learn", "look", "adapt", "tell"):
        assert (torn.out / f"{name}.json").read_bytes() == (whole.out / f"{name}.json").read_bytes()
        after = heard[heard.index(("end", name)) + 1 :]
        assert ("begin", name) not in after or heard.count(("end", name)) == 2, f"{name} had finished"
    steps = [what for kind, what in heard if kind == "step"]
    assert len(steps) == len(set(steps)) > 20, "no step is done twice; the ledger may miss the last"
    assert sum(kind == "begin" for kind, _ in heard) <= 5 + 5
    assert "Not everything finished" not in (torn.out / "index.html").read_text()
    assert not list(torn.out.rglob("*.tmp*"))


def answers(out: Path) -> dict:
    "What a run has found, without how long anything took."
    phases = read_json(out / "run.json")["phases"]
    numbers = {n: p["numbers"] for n, p in phases.items() if not n[0].isdigit()}
    return dict(numbers=numbers, compared=read_json(out / "compare.json")["sets"])


@pytest.mark.skipif(not os.environ.get("SURGPOSE_SLOW"), reason="seven minutes long; SURGPOSE_SLOW=1 runs it")
def test_the_demo_killed_five_times_ends_in_the_same_numbers(tmp_path):
    program = [Path(sys.executable).with_name("surgpose"), "run", "--device", "cpu", "--out"]
    begun = time.monotonic()
    subprocess.run([*program, tmp_path / "whole"], stderr=subprocess.DEVNULL, check=True)
    took, chance, torn = time.monotonic() - begun, random.Random(5), tmp_path / "torn"
    for _ in range(5):
        process = subprocess.Popen([*program, torn], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.05, 0.25) * took)
        process.kill()
        process.wait()
    phases = read_json(torn / "run.json")["phases"]
    had = [n for n, p in phases.items() if p["status"] in ("ok", "fresh")]
    done = subprocess.run([*program, torn], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [n for n in had if f"\n{n}: started" in f"\n{done.stderr}"], "what had finished is left alone"
    assert answers(torn) == answers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_run_that_is_told_to_stop_writes_record_and_index(tmp_path, number, code):
    run = ToyRun(tmp_path, steps=2000)
    got, said = run.stop(number, 12)
    assert got == code and "Traceback" not in said
    record = read_json(run.out / "run.json")
    assert record["ok"] is False and record["phases"]["draw"]["status"] == "running" and record["ended"]
    assert "did not finish" in (run.out / "index.html").read_text()
    assert not (run.out / ".lock.owner").exists() and not list(run.out.rglob("*.tmp*"))


# What a person says


def test_what_a_person_corrects_reaches_what_learns_from_it(tmp_path, monkeypatch):
    "A moved point changes no candidate and no count; it refines again all the same."

    def look(source, out, *args, **kwargs):
        write_predictions(Path(out) / "predictions.json", scripted_clip(20))

    monkeypatch.setattr("surgpose.pose.predict.predict", look)
    job = Job(profile("demo"), tmp_path / "run", film_scripted(tmp_path / "scripted.mp4", samples=20))
    for name in ("best.pt", "../provenance.json"):
        atomic_write((job.out / "teacher" / "weights" / name).resolve(), "{}")

    def readers() -> dict[str, str]:
        "What the readers of the labels depend on, after the phase that writes them."
        assert run_phases(PHASES, job, only=["pseudo"])
        phases = [p for p in PHASES if p.name in ("refine", "30_train", "40_review")]
        return {p.name: fingerprint(p, job, PHASES) for p in phases}

    files = [job.out / "pseudo" / name for name in ("candidates.json", "counts.json")]
    before, told = readers(), [p.read_bytes() for p in files]
    assert readers() == before
    kept = atomic_write(job.out / "pseudo" / "all" / "found.txt", "half an hour of looking")
    items = review_items(read_candidates(files[0]), everything=True)
    review = ReviewState(items, job.out / "pseudo" / "decisions.jsonl")
    sure = next(i for i in range(len(items)) if not items[i].reasons)
    review.move_point(sure, 0, (321.0, 123.0))
    after = readers()
    assert [p.read_bytes() for p in files] == told and kept.is_file()
    assert {name for name in before if before[name] != after[name]} == {"refine", "40_review"}


# What depends on what


def test_the_files_behind_a_render_decide_whether_it_is_up_to_date(tmp_path):
    render, job = PHASES[0], Job(profile("demo"), tmp_path / "run")
    assert render.inputs(job) == (), "without any, nothing but the config counts"
    files = {
        "models_dir": "tweezers/a_kps.json",
        "kps_dir": "a_kps.json",
        "distractors_dir": "hook.obj",
        "hdri_dir": "hall/hall_2k.hdr",
        "backgrounds_dir": "photo.jpg",
    }
    given = {name: tmp_path / name for name in files} | {"camera_json": tmp_path / "camera.json"}
    paths = [atomic_write(tmp_path / name / file, "12") for name, file in files.items()]
    paths.append(atomic_write(given["camera_json"], "12"))
    cfg = job.cfg.model_copy(update=dict(render=job.cfg.render.model_copy(update=given)))

    def now() -> str:
        return fingerprint(render, Job(cfg, job.out), PHASES)

    for path in paths:
        before = now()
        assert now() == before
        exact = path.suffix == ".json"
        atomic_write(path, "34" if exact else "345")
        changed = now()
        assert changed != before, path
        if not exact:
            path.rename(path.with_stem("other"))
            assert now() != changed, "another name"
    atomic_write(tmp_path / "hdri_dir" / ".DS_Store", "")
    before = now()
    (tmp_path / "hdri_dir" / ".DS_Store").unlink()
    assert now() == before


def called(*functions) -> set[str]:
    "The modules of surgpose that functions import themselves."
    parts = [
        found
        for f in functions
        for node in ast.walk(ast.parse(inspect.getsource(f)))
        for found in sources._imported(node, [])
    ]
    return {n for n in ("/".join(p[1:]) for p in parts) if (sources.ROOT / f"{n}.py").is_file()}


def test_the_code_of_a_phase_is_all_that_it_calls():
    for phase in PHASES:
        if phase.group == "reports":
            continue
        more = [propose_labels] if phase.name in ("pseudo", "refine") else []
        more += [measure.compare_runs] if phase.name == "compare" else []
        missing = called(phase.function, *more) - set(sources.behind(*phase.code)) - sources.IDLE
        assert not missing, f"{phase.name}: {missing}"


def test_a_comparison_leaves_nothing_of_the_one_before(tmp_path):
    stale = [tmp_path / name for name in ("side_by_side.mp4", "compare/refined/metrics.json")]
    for path in stale:
        atomic_write(path, "old")
    compare = next(p for p in PHASES if p.name == "compare")
    alone = replace(compare, needs=(), function=lambda job: write_json(job.out / "compare.json", {}) and {})
    assert run_phases([alone], Job(profile("demo"), tmp_path))
    assert not any(p.exists() for p in stale) and "<video" not in (tmp_path / "index.html").read_text()


def test_numbers_of_other_settings_are_not_compared(trained_toy, toy_dataset, tmp_path):
    run, out, cfg = tmp_path / "run", tmp_path / "out", EvaluateConfig(bootstrap=0)
    (run / "weights").mkdir(parents=True)
    shutil.copyfile(trained_toy, run / "weights" / "best.pt")
    evaluate(run / "weights" / "best.pt", toy_dataset, run, cfg, device="cpu", progress=False)

    def measured_in(**changed) -> Path:
        return measure._evaluated(run, toy_dataset, out, cfg.model_copy(update=changed), "cpu")

    assert measured_in() == run == measured_in(imgsz=96)  # the training size, by name
    assert measured_in(imgsz=64) == out == measured_in(threshold=0.5)
    assert read_json(out / "metrics.json")["provenance"]["threshold"] == 0.5


def test_a_comparison_sees_the_film_as_it_is_told(tmp_path, monkeypatch):
    asked = []

    def compared(*args, predict, **more):
        asked.append(predict)
        return dict(verdict="", sets=[])

    monkeypatch.setattr(measure, "compare_runs", compared)
    words = ["--before", "a", "--after", "b", "--video", "v.mp4", "--out", str(tmp_path)]
    assert main(["compare", *words, "--imgsz", "640", "--iou", "0.7", "--max-det", "3"]) == 0
    assert (asked[0].imgsz, asked[0].iou, asked[0].max_det) == (640, 0.7, 3)


def test_labels_that_all_went_to_the_gate_leave_a_comparison_without_them(tmp_path, monkeypatch):
    facts = dict(kept="teacher", gate_frames=[0, 2], reason="Kept.")
    job = Job(profile("demo"), tmp_path, tmp_path / "v.mp4", tmp_path / "v_coco.json")
    write_json(job.out / "refined" / "refine.json", facts)
    atomic_write(job.out / "teacher" / "weights" / "best.pt", "")
    images = [dict(id=i, file_name=f"{i}.jpg", width=64, height=48, frame=i) for i in facts["gate_frames"]]
    write_json(job.truth, new_coco(images, []))
    seen = write_predictions(job.out / "predictions" / "predictions.json", scripted_clip(4))
    monkeypatch.setattr(measure, "_predicted", lambda *args: read_json(seen))
    monkeypatch.setattr(measure, "_evaluated", lambda *args: job.out / "teacher")
    write_json(job.out / "teacher" / "metrics.json", dict(n_images=0, reason="no image", curve=[]))
    assert compare_phase(job) == {} and read_json(job.out / "compare.json")["verdict"] == "Kept."


# Machines that say no


def unprivileged(command: list) -> list:
    "The same command; root does without its right to write anywhere."
    if os.geteuid():
        return command
    drop = [
        "setpriv",
        "--bounding-set=-dac_override,-dac_read_search",
        "--inh-caps=-dac_override,-dac_read_search",
    ]
    if not shutil.which("setpriv") or subprocess.run([*drop, "true"], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and setpriv is not here to change that")
    return [*drop, *command]


def test_a_folder_that_may_not_be_written_is_named_and_left_alone(tmp_path):
    place = tmp_path / "only to read"
    place.mkdir(mode=0o500)
    run = ToyRun(place)
    run.ledger = tmp_path / "ledger.jsonl"
    command = unprivileged([sys.executable, "-c", TOY])
    done = subprocess.run(
        command, env=run.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("surgpose toy: ") and "Permission denied" in line and str(run.out) in line
    assert not list(place.iterdir()) and not run.ledger.exists()


def test_a_disk_that_fills_up_leaves_a_record_that_can_be_read(tmp_path):
    run = ToyRun(tmp_path, steps=400)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # an error, as on a full disk
    command = [sys.executable, "-c", limit + TOY]
    run.env["TOY_LEDGER"] = ""
    done = subprocess.run(
        command, env=run.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 74 and "not every phase finished" in done.stderr
    record = read_json(run.out / "run.json")["phases"]
    assert record["draw"]["status"] == "failed" and "File too large" in record["draw"]["error"]
    assert {p["status"] for n, p in record.items() if n != "draw"} == {"blocked"}
    assert not list(run.out.rglob("*.tmp*"))


def test_the_index_is_written_when_the_record_cannot_be(tmp_path, monkeypatch):
    def full(path, data):
        if "ended" in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_json(path, data)

    monkeypatch.setattr(engine, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        run_phases([Phase("look", lambda job: {})], Job(profile("demo"), tmp_path))
    assert "1 of 1 phases finished" in (tmp_path / "index.html").read_text()


# Odd names, nothing found, whose clip it is, what time it is

ODD = "手術 & <img src=x> 'é' " + "n" * 120


def test_nothing_found_in_a_folder_with_an_odd_name_makes_a_report(tmp_path):
    out = tmp_path / ODD
    clip = out / "<b>clip.mp4"
    out.mkdir()
    with write_video(clip, fps=5, width=64, height=48) as film:
        for _ in range(3):
            film.write(np.zeros((48, 64, 3), np.uint8))
    rows = [(frame, Poses.empty()) for frame, _ in read_video(clip)]
    write_candidates(
        out / "pseudo" / "candidates.json", follow(candidates(rows, PseudoConfig()), TrackConfig())
    )
    write_json(out / "run.json", dict(video=str(clip), phases={}))
    page = run_report("40_review", out, dict(run_dir=str(out)))
    stamp = read_json(page.with_suffix(".json"))
    assert stamp["status"] == "ok", stamp["error"]
    assert stamp["numbers"]["labels"] == "0" and stamp["verdict"]
    assert "<img src=x>" not in page.read_text() and "<b>clip" not in page.read_text()


def test_what_a_clip_says_about_a_patient_stays_in_it(trained_toy, tmp_path):
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as film:
        film.metadata["title"] = film.metadata["comment"] = "Miller, born 1950"
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.metadata["handler_name"] = "Miller, born 1950"
        for i in range(4):
            film.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), 50 * i, np.uint8), "bgr24"))
            )
        film.mux(stream.encode(None))
    assert b"Miller" in clip.read_bytes()
    out = predict(
        clip,
        tmp_path / "out",
        PredictConfig(conf=0.001, backend="torch"),
        weights=trained_toy,
        device="cpu",
        progress=False,
    )
    assert video_info(out / "overlay.mp4").frames == 4
    made = [p for p in out.rglob("*") if p.is_file()]
    assert len(made) >= 3 and not [p.name for p in made if b"Miller" in p.read_bytes()]


def test_neither_the_clock_nor_the_language_of_the_machine_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    time.tzset()
    try:
        here, there = utc_now(), time.strftime("%Y-%m-%dT%H:%M", time.gmtime())
        assert here.endswith("+00:00") and abs(int(here[14:16]) - int(there[14:16])) in (0, 1, 59)
        assert here[:10] in (there[:10], time.strftime("%Y-%m-%d", time.gmtime()))
        code = "import locale, io, sys\nfrom pathlib import Path\n"
        code += "try: locale.setlocale(locale.LC_ALL, '')\nexcept locale.Error: pass\n"
        code += "from surgpose.page import format_number\nimport pandas as pd\n"
        code += "print(format_number(0.25), pd.DataFrame(dict(a=[0.25])).to_csv(index=False).split()[1])"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.split() == ["0.25", "0.25"]
    finally:
        monkeypatch.undo()
        time.tzset()


# A sweep


def one_phase(cell, out: Path, given: dict, place: dict | None = None) -> str:
    "A run of one phase, as `run_cell` does a whole one."
    check_place(place or new_place(out))
    if cell.cfg.seed == 2:
        raise RuntimeError("expected luck, got none")
    evaluate = Phase("evaluate", lambda job: dict(AP=job.cfg.seed / 4), makes=("run.json",))
    return "" if run_phases([evaluate], Job(cell.cfg, out / cell.name)) else "failed"


def new_place(out: Path) -> dict:
    job = dict(out=str(out), token="t", code=CODE)
    write_json(out / RECORDS / "job.json", job)
    return job


def test_a_sweep_goes_to_the_workers_of_a_dask_scheduler(tmp_path):
    from distributed import LocalCluster

    cells = read_matrix(atomic_write(tmp_path / "m.yaml", "seed: [0, 1, 2]"), profile("demo"))
    options = dict(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with LocalCluster(**options, silence_logs=50, protocol="tcp", host="127.0.0.1") as cluster:
        ok = sweep(cells, tmp_path / "sweep", scheduler=cluster.scheduler_address, go=one_phase)
    rows = read_json(tmp_path / "sweep" / "sweep.json")["rows"]
    assert [(r["state"], r.get("AP")) for r in rows[:2]] == [("done", 0.0), ("done", 0.25)] and not ok
    assert rows[2]["state"] == "failed" and rows[2]["error"] == "expected luck, got none"
    assert not (tmp_path / "sweep" / RECORDS).exists()


def test_a_run_that_lacks_something_is_not_done(tmp_path, capsys):
    matrix = atomic_write(tmp_path / "m.yaml", "seed: [0, 1]")
    words = ["--matrix", str(matrix), "--out", str(tmp_path / "sweep"), "--only", "stats", "--device", "cpu"]
    assert main(["run", *words]) == 1
    assert "0 of 2 runs finished" in (tmp_path / "sweep" / "index.html").read_text()
    rows = read_json(tmp_path / "sweep" / "sweep.json")["rows"]
    assert [r["state"] for r in rows] == ["failed"] * 2
    assert all(r["error"] == "stats: synthetic/manifest.json is missing; run render first" for r in rows)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train.epcohs: [1]", "did you mean 'epochs'"),
        ("seed: 3", "list of values"),
        ("seed: [1, 1]", "differ"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_bad_usage(tmp_path, capsys, text, told):
    matrix = atomic_write(tmp_path / "m.yaml", text)
    assert main(["run", "--matrix", str(matrix), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert told in said.err and "m.yaml" in said.err and not said.out and not (tmp_path / "out").exists()


# Pages in a browser


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install -y chromium")
def test_a_browser_has_nothing_to_complain_about_in_index_sweep_and_docs(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    cells = read_matrix(
        atomic_write(tmp_path / "m.yaml", "seed: [0, 1]\ntrain.imgsz: [96, 128]"), profile("demo")
    )
    assert sweep(
        cells, tmp_path / "sweep", go=lambda cell, out, given: one_phase(cell, out, given, new_place(out))
    )
    nbs = tmp_path / "nbs"
    for name in ("00_schema.ipynb", "02_files.ipynb", "tour/00_start.ipynb", "reports/20_stats.ipynb"):
        (nbs / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "nbs" / name, nbs / name)
    docs = write_docs(tmp_path / "docs", nbs)
    pages = [tmp_path / "sweep" / "index.html", tmp_path / "sweep" / cells[0].name / "index.html"]
    pages += [docs, docs.with_name("00_schema.html"), docs.with_name("tour-00_start.html")]
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        tab, said, asked = browser.new_page(viewport=dict(width=1280, height=800)), [], []
        tab.on("console", lambda m: said.append(m.text))
        tab.on("pageerror", lambda e: said.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        for path in pages:
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= 1280, path.name
            links = [u for u in tab.evaluate("[...document.links].map(a => a.href)") if u.startswith("file:")]
            links = [u for u in links if not u.endswith(".ipynb")]  # of notebooks that were not copied
            assert links and all(Path(unquote(urlparse(u).path)).is_file() for u in links), path.name
        assert said == [] and [u for u in asked if not u.startswith("data:")] == [p.as_uri() for p in pages]
        browser.close()


# Jupyter


def lab_words(runtime: str) -> list[str]:
    "What `make lab` would start."
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": runtime}
    said = subprocess.check_output(["make", "-n", "lab"], cwd=ROOT, env=env, text=True)
    return shlex.split(next(text for text in said.splitlines() if "jupyter lab" in text))


def test_jupyter_listens_to_this_machine_only_and_asks_for_a_token(tmp_path):
    "Start what `make lab` starts, on a free port, without a browser, and a kernel in it."
    runtime = Path(tempfile.mkdtemp())  # short, as a socket's path has to be
    words = lab_words(str(runtime))
    assert not [
        w for w in words if "allow_origin" in w or "allow-root" in w or "token=" in w or "password" in w
    ]
    assert "--KernelManager.transport=ipc" in words
    assert "--KernelManager.transport=ipc" not in lab_words("/" + "long" * 20), "no kernel would start there"
    words = [Path(sys.executable).with_name("jupyter"), *words[1:], "--no-browser", "--ServerApp.port=0"]
    words += ["--allow-root"] * (os.geteuid() == 0)  # tests may run as root; `make lab` refuses to
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (found := list(runtime.glob("jpserver-*.json"))):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        facts = read_json(found[0])
        assert len(facts["token"]) > 20

        def asked(token: str, path: str = "api/contents", method: str = "GET") -> int:
            headers = dict(Authorization=token)
            request = urllib.request.Request(facts["url"] + path, headers=headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return reply.status
            except urllib.error.HTTPError as e:
                return e.code

        assert asked("token guessed") == 403 and asked(f"token {facts['token']}") == 200
        assert asked(f"token {facts['token']}", "api/kernels", "POST") == 201
        (kernel,) = runtime.glob("kernel-*.json")
        assert read_json(kernel)["transport"] == "ipc" and kernel.stat().st_mode & 0o077 == 0
        while not [s for s in runtime.iterdir() if s.is_socket()]:
            assert process.poll() is None
            time.sleep(0.1)
        family = [process.pid, *(c.pid for c in psutil.Process(process.pid).children(recursive=True))]
        inet = [(pid, c) for pid in family for c in psutil.Process(pid).net_connections("inet")]
        listens = [(pid, c.laddr) for pid, c in inet if c.status == "LISTEN"]
        assert listens and {at.ip for _, at in listens} <= {"127.0.0.1", "::1"}
        # a kernel keeps one port, on which it hears what its own subprocesses print
        assert {at.port for pid, at in listens if pid == process.pid} == {facts["port"]}
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(runtime, ignore_errors=True)


# The table


def test_every_fault_of_the_table_has_tests_that_exist():
    rows = re.findall(
        r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    assert [int(number) for number, *_ in rows] == list(range(1, 36)), "a row for each fault, in order"
    known = {p.stem: p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
    known |= {p.stem: p.read_text() for p in (ROOT / "nbs").glob("*.ipynb")}
    for number, _, _, tests in rows:
        names = re.findall(r"`([^`]+)`", tests)
        assert names, number
        for name in names:
            place, _, test = name.partition("::")
            assert place in known and (not test or f"def {test}(" in known[place]), f"row {number}: no {name}"
