"""The render job: killed, interrupted, short of disk, spread over machines: the same dataset, to the bit."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from surgpose.cli import main
from surgpose.config import RenderConfig
from surgpose.files import check_manifest, read_json
from surgpose.synth import workers
from surgpose.synth.render import render
from surgpose.synth.workers import POOL, RECORDS

N, SEED = 8, 5
CFG = RenderConfig(images=N, width=96, height=72, samples=2, val_share=0.25, workers=1)
FLAGS = ["--images", N, "--width", 96, "--height", 72, "--samples", 2, "--val-share", 0.25, "--seed", SEED,
         "--device", "cpu"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    "What one worker makes of it without interruption."
    return render(tmp_path_factory.mktemp("job") / "set", CFG, seed=SEED, device="cpu", progress=False)


def same(out: Path, reference: Path) -> None:
    "The manifests name the same files with the same hashes, labels and images, and tell the truth."
    assert check_manifest(out) == []
    got, expected = (read_json(folder / "manifest.json") for folder in (out, reference))
    assert got["files"] == expected["files"] and len(got["files"]) == N + 2
    assert all(got[k] == expected[k] for k in ("seed", "failed", "devices"))
    assert not (out / RECORDS).exists() and not [p for p in out.rglob("*.tmp*")]


@contextlib.contextmanager
def command(*args: object):
    "A `surgpose render` in a session of its own, as a shell starts it."
    code = "import sys; from surgpose.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, "render", *map(str, args)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def drawn(out: Path) -> list[Path]:
    return sorted((out / RECORDS).glob("[0-9]*.json"))


def wait_until(ready, process: subprocess.Popen | None = None, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def offspring(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


# Killed


def test_killed_three_times_and_gone_on(tmp_path, reference):
    "SIGKILL at random moments: what was drawn stays, what is missing is drawn, and no process survives."
    out, rng, kept = tmp_path / "killed", random.Random(0), {}
    for _ in range(3):
        with command("--out", out, *FLAGS, "--workers", 2) as process:
            goal = min(N - 1, len(drawn(out)) + rng.randint(1, 2))
            wait_until(lambda goal=goal: len(drawn(out)) >= goal, process)
            time.sleep(rng.random() * 0.3)
            blenders = offspring(process)
            assert 1 <= len(blenders) <= 2
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            wait_until(lambda gone=blenders: all_gone(gone), seconds=60)
        assert not (out / "manifest.json").exists() and (out / ".lock.owner").exists()
        now = {p: p.stat().st_mtime_ns for p in (out / "images" / f"{r.stem}.jpg" for r in drawn(out))}
        assert kept.items() <= now.items(), "finished work was repeated"
        kept = now
    render(out, CFG, seed=SEED, device="cpu", progress=False)
    same(out, reference)
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items()) and len(kept) >= 3


def test_a_blender_that_is_killed_is_replaced(tmp_path, reference):
    with command("--out", tmp_path / "out", *FLAGS, "--workers", 1) as process:
        for count in (1, 3):  # no scene is hit twice
            wait_until(lambda n=count: len(drawn(tmp_path / "out")) >= n and offspring(process), process)
            for blender in offspring(process):
                blender.send_signal(signal.SIGSEGV)
        assert process.wait(600) == 0
    same(tmp_path / "out", reference)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_job_says_so_and_leaves_no_process(tmp_path, reference, number, code):
    "Ctrl-C goes to the whole group, as from a terminal; SIGTERM to one process, as from a batch system."
    out = tmp_path / "out"
    with command("--out", out, *FLAGS, "--workers", 2) as process:
        wait_until(lambda: len(drawn(out)) >= 2, process)
        blenders = offspring(process)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said, told = process.communicate(timeout=600)
    assert process.returncode == code and said == "" and "Traceback" not in told
    assert all_gone(blenders) and not (out / ".lock.owner").exists() and not [p for p in out.rglob("*.tmp*")]
    before = {p: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    render(out, CFG, seed=SEED, device="cpu", progress=False)
    same(out, reference)
    assert sum(p.stat().st_mtime_ns == then for p, then in before.items()) >= 2


# Many machines


@contextlib.contextmanager
def cluster(folder: Path, count: int):
    "A Dask scheduler and workers, each a process of its own."
    note, log = folder / "scheduler.json", open(folder / "dask.log", "wb")
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = ["worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(folder)]
    common = ["--scheduler-file", str(note), "--no-dashboard"]
    processes = [subprocess.Popen([sys.executable, "-m", "dask", *line, *common], stdout=log, stderr=log)
                 for line in (scheduler, *[worker] * count)]
    try:
        wait_until(note.exists)
        yield SimpleNamespace(address=read_json(note)["address"], workers=processes[1:])
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
        log.close()


def test_two_machines_one_of_which_dies(tmp_path, reference):
    "The shard of a worker that is killed goes to the other one; the dataset is the same."
    out = tmp_path / "out"
    with cluster(tmp_path, 2) as dask, command("--out", out, *FLAGS, "--scheduler", dask.address) as process:
        wait_until(lambda: len(drawn(out)) >= 2 and all(offspring(w) for w in dask.workers), process)
        blenders = offspring(dask.workers[0])
        dask.workers[0].kill()
        said, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
        assert said.strip() == str(out) and "render: Cycles on CPU, " in told and f"{N}/{N}" in told
        assert all_gone(blenders)
        wait_until(lambda: not offspring(dask.workers[1]), seconds=60)  # dismissed when the job is over
    same(out, reference)


@pytest.mark.parametrize(("address", "told"), [
    ("tcp://127.0.0.1:9", "expected a Dask scheduler at tcp://127.0.0.1:9"),
    ("localhost", "expected a Dask scheduler at localhost"),
])
def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch, address, told):
    monkeypatch.setattr("surgpose.synth.cluster.CONNECT_S", 1)
    with pytest.raises(RuntimeError, match=told):
        render(tmp_path / "out", CFG.model_copy(update=dict(scheduler=address)), device="cpu", progress=False)
    assert not drawn(tmp_path / "out") and not (tmp_path / "out" / RECORDS).exists()


# A stand-in for Blender that draws nothing: everything but the pictures is real

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
from surgpose.config import RenderConfig
from surgpose.files import atomic_write, sha256_file, write_json
from surgpose.synth.scene import sample_scene
job = json.loads(sys.stdin.readline())
out, cfg = Path(job["out"]), RenderConfig(**job["config"])
print(json.dumps(dict(ready=True, device="CPU")), flush=True)
for line in sys.stdin:
    index = json.loads(line)
    if index in {bad!r}: os.kill(os.getpid(), signal.SIGKILL)
    name, scene = f"images/{{index:06d}}.jpg", sample_scene(index, job["seed"], cfg).to_dict()
    atomic_write(out / name, bytes(1000))
    shot = dict(file_name=name, camera=0, sha256=sha256_file(out / name), tools=[], annotations=[])
    record = dict(scene=scene, shots=[shot], device="CPU", seconds=0.0)
    write_json(out / ".records" / f"{{index:06d}}.json", record)
    print(json.dumps(dict(index=index, seconds=0.0)), flush=True)
"""


@pytest.fixture
def fake(monkeypatch):
    def use(bad: tuple[int, ...] = ()):
        monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", FAKE.format(bad=bad)])
    use()
    return use


def quick(out: Path, **changes) -> Path:
    return render(out, CFG.model_copy(update=changes), seed=SEED, device="cpu", progress=False)


def test_a_scene_that_always_kills_blender_is_reported_and_the_others_are_drawn(tmp_path, fake):
    fake(bad=(3,))
    told = r"left out, could not be drawn: scene 3 \(Blender ended with code -9\)"
    with pytest.warns(UserWarning, match=told):
        out = quick(tmp_path / "out")
    manifest = read_json(out / "manifest.json")
    assert manifest["failed"] == {"3": "Blender ended with code -9"} and check_manifest(out) == []
    assert sorted(manifest["seconds"], key=int) == [str(i) for i in range(N) if i != 3]
    fake()
    assert quick(out) and read_json(out / "manifest.json")["failed"] == {}  # the next call tries again


def test_too_many_scenes_that_fail_end_the_job(tmp_path, fake, capsys):
    fake(bad=(1, 3, 4, 6))
    assert main(["render", "--out", str(tmp_path / "out"), *map(str, FLAGS)]) == 1
    assert "3 scenes failed 2 times, given up" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists() and (POOL.idle, POOL.lent) == ([], [])
    fake()
    assert len(read_json(quick(tmp_path / "out") / "manifest.json")["files"]) == N + 2  # mended, it goes on


def test_a_finished_folder_is_left_alone(tmp_path, fake, monkeypatch, capsys):
    out = quick(tmp_path / "out", images=30, workers=2)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    monkeypatch.setattr(workers, "COMMAND", ["a Blender that must not be started"])
    monkeypatch.setattr("surgpose.synth.render.draw_all", None)
    assert quick(out, images=30) == out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_other_settings_are_refused_with_the_difference_and_the_way_out(tmp_path, fake, capsys):
    out = quick(tmp_path / "out", images=2)
    flags = [str(2 if f == N else f) for f in FLAGS]
    assert main(["render", "--out", str(out), *flags, "--workers", "2"]) == 0  # how fast is no difference
    assert main(["render", "--out", str(out), *flags, "--samples", "9"]) == 1
    told = capsys.readouterr().err
    assert "samples 2 -> 9" in told and "use another folder, or delete this one" in told
    assert check_manifest(out) == []


@pytest.mark.parametrize(("device", "told"), [
    ("gup", "expected auto, cpu, gpu, or GPU numbers like 0,1, got 'gup'"),
    ("97", "expected a GPU for '97'"),
])
def test_a_device_that_is_not_there_is_refused_and_leaves_nothing(tmp_path, device, told, capsys):
    out = tmp_path / "out"
    assert main(["render", "--out", str(out), "--images", "2", "--device", device]) == 1
    assert told in capsys.readouterr().err
    assert not [p for p in out.rglob("*") if p.name != ".lock"]


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 3 MB in memory; needs root."
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as f:
        while True:
            f.write(bytes(1024))


def test_a_disk_that_fills_up_ends_the_job_and_is_gone_on_with(small_disk, reference):
    out = small_disk / "set"
    with command("--out", out, *["3" if f == N else f for f in FLAGS]) as process:
        assert process.wait(600) == 0
    with command("--out", out, *FLAGS, "--samples", 2) as process:
        wait_until(lambda: drawn(out), process)
        fill(small_disk / "ballast")
        said, told = process.communicate(timeout=600)
    last = told.strip().splitlines()[-1]
    assert process.returncode == 74 and said == "" and "Traceback" not in told
    assert f"{out}: no space is left; 0.0 MB are free, the scenes still missing need about " in last, told
    assert "make room, then the same command goes on from here" in last
    assert check_manifest(out) == []
    assert len(read_json(out / "manifest.json")["files"]) == 3 + 2, "what was there before"
    with command("--out", out, *FLAGS) as process:
        assert process.wait(600) == 74  # still full: told at once
    (small_disk / "ballast").unlink()
    render(out, CFG, seed=SEED, device="cpu", progress=False)
    same(out, reference)


def test_a_disk_that_is_too_small_from_the_start(small_disk, capsys):
    fill(small_disk / "ballast")
    assert main(["render", "--out", str(small_disk / "set"), *map(str, FLAGS)]) == 74
    told = capsys.readouterr().err
    assert "8 scenes need about 1 MB, 0 MB are free; make room, or choose another folder" in told
    assert not (small_disk / "set").exists()


def test_labels_that_do_not_fit_on_the_disk_leave_the_old_ones(tmp_path, fake):
    "Without root: a limit on the size of files that labels of many scenes exceed and single records do not."
    out = quick(tmp_path / "out", images=4)
    labels = {n: (out / n).read_bytes() for n in ("coco_annotations.json", "scenes.jsonl", "manifest.json")}
    size = max(map(len, labels.values())) + 1000
    flags = [str(16 if f == N else f) for f in FLAGS]
    code = f"import sys; from surgpose.synth import workers; workers.COMMAND = {workers.COMMAND!r}; " \
           "from surgpose.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "render", "--out", str(out), *flags], text=True,
                          capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert done.returncode == 74 and "no space is left" in done.stderr, done.stderr
    assert {n: (out / n).read_bytes() for n in labels} == labels and check_manifest(out) == []
    assert len(read_json(quick(out, images=16) / "manifest.json")["files"]) == 16 + 2


# Memory


def test_a_blender_does_not_grow_from_scene_to_scene(tmp_path):
    cfg = CFG.model_copy(update=dict(images=30))
    job = dict(out=str(tmp_path), cwd=str(tmp_path), token="memory", seed=SEED, device="cpu", threads=1,
               config=cfg.model_dump(mode="json"))
    sizes = []
    for index in [0, 1, 2, 3] * 5:
        shutil.rmtree(tmp_path / RECORDS, ignore_errors=True)  # or it would not be drawn again
        assert "error" not in workers.draw_one(job, index)
        sizes.append(POOL.idle[0][1].memory_gb())
    workers.dismiss("memory")
    print(sizes)
    assert (sum(sizes[-4:]) - sum(sizes[4:8])) / 4 / 12 < 0.01  # GB a scene
