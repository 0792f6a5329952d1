"""A review in a real browser, by keyboard alone, through a dying kernel, and by two people."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import numpy as np
import psutil
import pytest
from conftest import film_scripted
from nbformat.v4 import new_code_cell, new_notebook

from surgpose.adapt.canvas import SCRIPT
from surgpose.adapt.decisions import merge_decisions, read_decisions, standing
from surgpose.adapt.pseudo import Candidates, candidates, write_candidates
from surgpose.adapt.review import ReviewState, apply_decisions, review_items
from surgpose.adapt.scripted import scripted_clip
from surgpose.adapt.track import follow
from surgpose.adapt.widget import ReviewView
from surgpose.config import PseudoConfig, TrackConfig
from surgpose.schema import HANDLE, HINGE, TIP

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found() -> Candidates:
    return follow(candidates(scripted_clip(), PseudoConfig()), TrackConfig())


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    "The scripted clip as a video of 80 frames, with the tools drawn in."
    return film_scripted(tmp_path_factory.mktemp("video") / "scripted.mp4")


# In a browser ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(holds, seconds: float = 90.0):
    "Wait until something holds, and give it."
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {holds}"
        time.sleep(0.1)
    return found


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on this machine alone, on a folder of its own, with a token."
    port, desk = free_port(), tmp_path / "desk"
    desk.mkdir()
    own = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR",
                                                           "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    env = {**os.environ, **own, "JUPYTER_TOKEN": "only-for-this-test", "PYTHONPATH": str(ROOT),
           "SURGPOSE_BATCH": ""}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={desk}",
               *(["--allow-root"] if os.geteuid() == 0 else [])]
    log = open(tmp_path / "lab.log", "w")
    server = subprocess.Popen(command, env=env, cwd=desk, stdout=log, stderr=log)
    try:
        until(lambda: server.poll() is not None or answers(port))
        assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
        yield server, f"http://127.0.0.1:{port}", desk
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True)] if server.poll() is None else []
        server.terminate()
        for process in family:
            if process.is_running():
                process.terminate()
        server.wait(30)
        log.close()


def answers(port: int) -> bool:
    try:
        return urlopen(f"http://127.0.0.1:{port}/api", timeout=2).status == 200
    except OSError:
        return False


def run_cell(page) -> None:
    "Run the only cell, once there is a kernel, and wait for the canvas."
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(timeout=120_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".surgpose-canvas[data-item]", timeout=120_000)


def shown(page, item: int) -> None:
    page.wait_for_selector(f'.surgpose-canvas[data-item="{item}"]', timeout=30_000)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium; Debian: apt-get install chromium")
def test_a_review_in_jupyterlab_survives_reload_and_a_killed_kernel(lab, found, clip):
    sync_api = pytest.importorskip("playwright.sync_api")
    server, url, desk = lab
    write_candidates(desk / "candidates.json", found)
    shutil.copy(clip, desk / "scripted.mp4")
    code = "from surgpose.adapt.widget import open_review\nopen_review('.', 'scripted.mp4', who='ana')"
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=kernel), desk / "review.ipynb")
    path, items = desk / "decisions.jsonl", review_items(found)
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        page, wrong, asked = browser.new_page(viewport=dict(width=1280, height=1000)), [], []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.on("dialog", lambda d: d.accept())
        page.goto(f"{url}/lab/tree/review.ipynb?token=only-for-this-test")
        run_cell(page)
        canvas = page.locator(".surgpose-canvas")
        canvas.focus()
        page.keyboard.press("a")  # accept the first; in the notebook's own hands this would add a cell
        shown(page, 1)
        box, points = canvas.bounding_box(), json.loads(canvas.get_attribute("data-points"))
        x, y = box["x"] + points[4][0], box["y"] + points[4][1]  # drag the handle's end of the second
        page.mouse.move(x, y)
        page.mouse.down()
        for step in range(1, 6):
            page.mouse.move(x + 6 * step, y - 4 * step)
        page.mouse.up()
        until(lambda: len(read_decisions(path)) == 2)
        page.keyboard.press("v")  # and hide it
        until(lambda: len(read_decisions(path)) == 3)
        page.keyboard.press("a")
        shown(page, 2)
        page.keyboard.press("r")  # reject the third
        shown(page, 3)
        assert page.locator(".jp-Notebook .jp-Cell").count() == 2  # Shift+Enter made the second
        if os.environ.get("SURGPOSE_SHOTS"):
            page.screenshot(path=str(Path(os.environ["SURGPOSE_SHOTS"]) / "review.png"))
        kernel = next(c for c in psutil.Process(server.pid).children() if "ipykernel" in str(c.cmdline()))
        os.kill(kernel.pid, signal.SIGKILL)
        page.reload()
        run_cell(page)
        shown(page, 3)
        page.locator(".surgpose-canvas").focus()
        for item, verdict in ((2, "REJECT"), (1, "FIX"), (0, "ACCEPT")):
            page.keyboard.press("b")
            shown(page, item)
            page.wait_for_selector(f"text={verdict}: frame {items[item].frame} ", timeout=30_000)
        browser.close()
    stands = standing(read_decisions(path))
    assert [stands[items[i].key]["verdict"] for i in range(3)] == ["accept", "fix", "reject"]
    moved = np.reshape(stands[items[1].key]["keypoints"], (5, 3)) - items[1].keypoints
    zoom = np.hypot(30, 20) / np.hypot(*moved[4, :2])
    assert moved[4, 0] > 0 > moved[4, 1] and moved[4, 0] / -moved[4, 1] == pytest.approx(1.5, rel=0.05)
    assert zoom > 0.5 and np.abs(moved[:4, :2]).max() < 0.01
    assert np.reshape(stands[items[1].key]["keypoints"], (5, 3))[4, 2] == 1
    assert wrong == [] and all(a.startswith((url, "data:", "blob:")) for a in asked), "nothing from outside"


# By keyboard alone ----------------------------------------------------------------------------------------

KEY_S, DECISION_S = 0.28, 1.35  # the keystroke-level model of Card, Moran and Newell, 1980

PAGE = """<div id="here"></div><script type="module">%s
const traits = window.traits = %s, hear = {}; window.said = [];
const bytes = text => new DataView(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
traits.image = traits.ghost = bytes("");
const model = { get: name => traits[name], on: (what, f) => { hear[what] = f; }, send: m => said.push(m) };
window.show = (scene, image, ghost) => {
  Object.assign(traits, { scene, image: bytes(image), ghost: bytes(ghost) });
  return hear["change:scene"](); };
module.render({ model, el: document.getElementById("here") });</script>"""


class Desk:
    "A view and its canvas in a browser, without a notebook between them; counts the keys that are pressed."

    def __init__(self, page, view: ReviewView) -> None:
        self.page, self.view, self.pressed = page, view, 0
        script = SCRIPT.replace("export default", "const module =")
        traits = {name: getattr(view.canvas, name) for name in ("width", "height", "scene", "fixed")}
        page.set_content(PAGE % (script, json.dumps(traits)))
        page.wait_for_function("!!window.show")
        page.locator("canvas").focus()
        self.answer()

    def press(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            self.page.keyboard.press(key)
        self.pressed += times + (times > 0 and key.startswith("Shift+"))  # Shift is held down meanwhile
        if key != "Shift" and "Arrow" not in key:
            self.answer()

    def answer(self) -> None:
        for message in self.page.evaluate("said.splice(0)"):
            self.view.heed(message)
        canvas = self.view.canvas
        pictures = [base64.b64encode(data).decode() for data in (canvas.image, canvas.ghost)]
        self.page.evaluate("([scene, image, ghost]) => show(scene, image, ghost)", [canvas.scene, *pictures])


def correct(desk: Desk, truth: np.ndarray, i: int) -> None:
    "Move the points of item `i` that are off, by arrows: tens with Shift, then ones."
    for k in (TIP, HINGE, HANDLE):
        kpts = desk.view.state.pose(i)[0]
        if kpts[k, 2] and np.abs(kpts[k, :2] - truth[k, :2]).max() <= 4:
            continue
        desk.press(str(k + 1))
        if not kpts[k, 2]:
            desk.press("v")  # it gets its label back, near where it should be
        for axis, (less, more) in enumerate((("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))):
            off = round(truth[k, axis] - desk.view.state.pose(i)[0][k, axis])
            tens = round(off / 10)
            desk.press("Shift+" + (more if tens > 0 else less), abs(tens))
            desk.press(more if off > 10 * tens else less, abs(off - 10 * tens))
        desk.press("1")  # choosing another point tells the move


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium; Debian: apt-get install chromium")
def test_sixty_labels_by_keyboard_alone(tmp_path, record_property):
    "Somebody who knows the truth accepts, corrects and rejects; every label ends within a few pixels of it."
    found = follow(candidates(scripted_clip(noise_px=2.5), PseudoConfig()), TrackConfig(), progress=False)
    sync_api = pytest.importorskip("playwright.sync_api")
    truth = [poses for _, poses in scripted_clip(faults=False, noise_px=0)]
    items = review_items(found, everything=True)[:60]
    state = ReviewState(items, tmp_path / "decisions.jsonl")
    view = ReviewView(state, lambda number: np.full((360, 640, 3), 200, np.uint8))
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        page, wrong = browser.new_page(), []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        desk = Desk(page, view)
        while state.open_items():
            i = view.position
            item, own = items[i], truth[items[i].frame // 2]
            assert page.locator(f'canvas[data-item="{i}"]').count() == 1
            seen = item.keypoints[:, 2] > 0
            off = np.linalg.norm(own.keypoints[:, seen, :2] - item.keypoints[seen, :2], axis=-1).mean(-1)
            tool = int(off.argmin())
            if off[tool] > 25:
                desk.press("r")
                continue
            correct(desk, own.keypoints[tool], i)
            if state.pose(i)[1] != own.category_id[tool]:
                desk.press("c")
            desk.press("a")
        browser.close()
    assert wrong == [] and len(state.items) == 60 and state.progress == 1
    seconds = KEY_S * desk.pressed + DECISION_S * 60
    record_property("keys per label", desk.pressed / 60)
    print(f"{desk.pressed} keys for 60 labels, {seconds:.0f} s by the keystroke-level model:", state.counts())
    assert seconds < 300
    tally = ReviewState(items, state.path).counts()
    assert min(tally["accept"], tally["fix"]) > 15 and tally["reject"] >= 2 and tally["open"] == 0
    for i, item in enumerate(items):
        if state.verdict(i) == "reject":
            continue
        own = truth[item.frame // 2].keypoints[:, (TIP, HINGE, HANDLE), :2]
        assert np.abs(own - state.pose(i)[0][(TIP, HINGE, HANDLE), :2]).max((1, 2)).min() < 5


# Two people -----------------------------------------------------------------------------------------------


def test_two_people_review_one_clip_and_nothing_of_either_is_lost(found, tmp_path):
    items, everything = review_items(found), review_items(found, everything=True)
    both = {}
    for who, verdicts in (("ana", "aarra"), ("bo", "ara")):
        state = both[who] = ReviewState(items, tmp_path / f"{who}.jsonl", who=who)
        for i, letter in enumerate(verdicts):
            (state.accept if letter == "a" else state.reject)(i)
    both["bo"].move_point(4, 0, (50, 60))
    apart = merge_decisions([s.path for s in both.values()], tmp_path / "decisions.jsonl")
    assert sorted(apart.frame) == sorted(items[i].frame for i in (1, 2, 4))
    lines = read_decisions(tmp_path / "decisions.jsonl")
    assert len(lines) == 9 and sorted(line["who"] for line in lines) == ["ana"] * 5 + ["bo"] * 4
    state = ReviewState(items, tmp_path / "decisions.jsonl", sure=everything, who="ana")
    assert state.counts()["open"] == len(items) - 5
    while state.undo():  # Ana takes all of hers back; Bo's words stay
        pass
    assert [state.verdict(i) for i in range(5)] == ["accept", "reject", "accept", "open", "fix"]
    assert apply_decisions(found, tmp_path / "decisions.jsonl").table.kept.sum() > found.table.kept.sum()


# A process that dies --------------------------------------------------------------------------------------

REVIEWER = """
import sys
from surgpose.adapt.pseudo import read_candidates
from surgpose.adapt.review import ReviewState, review_items
items = review_items(read_candidates(sys.argv[1]), everything=True)
state = ReviewState(items, sys.argv[2])
for i in range(10**9):
    state.move_point(i % len(items), 3, (i % 600, 30))
    print(i, flush=True)
"""


def test_a_reviewer_killed_at_any_moment_has_lost_nothing(found, tmp_path):
    write_candidates(tmp_path / "candidates.json", found)
    path, items, told = tmp_path / "decisions.jsonl", review_items(found, everything=True), 0
    for wait in (25, 60):
        process = subprocess.Popen([sys.executable, "-c", REVIEWER, tmp_path / "candidates.json", path],
                                   stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(wait):
            process.stdout.readline()
        process.kill()
        told += wait + len(process.stdout.readlines())
        process.wait()
        assert told <= len(ReviewState(items, path).lines) <= told + 1  # what was said is on the disk
        told = len(ReviewState(items, path).lines)
