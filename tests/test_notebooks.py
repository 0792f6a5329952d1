"""Every notebook runs: library notebooks as their own tests, reports by papermill on their defaults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from surgpose.files import read_json
from surgpose.report import report_names, run_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "nbs").glob("*.ipynb"))
TOURS = sorted((ROOT / "nbs" / "tour").glob("*.ipynb"))

# Cells flagged notest, slow or gpu are left out; those flagged blender run, for bpy is always installed. Each
# notebook gets a process of its own: bpy and torch leave traces, and bpy may crash when a process ends.
RUN = """
import os, sys
from pathlib import Path
from nbdev.test import test_nb
flags = ["notest", "slow", "gpu"]
ok, seconds = test_nb(Path(sys.argv[1]), skip_flags=flags, basepath=Path(sys.argv[2]), do_print=False)
sys.stdout.flush(); sys.stderr.flush()
os._exit(0 if ok else 1)
"""


def run_notebook(path: Path, tmp_path: Path, **env: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "2", "TMPDIR": str(tmp_path), **env}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(ROOT)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_notebook(path, tmp_path):
    run_notebook(path, tmp_path)


@pytest.mark.parametrize("path", TOURS, ids=lambda p: p.stem)
def test_tour(path, tmp_path):
    "From top to bottom as a newcomer runs it; what it makes goes elsewhere."
    run_notebook(path, tmp_path, PROJ_OUT=str(tmp_path / "out"))
    assert (tmp_path / "out" / "tour" / "20_stats.html").is_file()


@pytest.mark.parametrize("name", report_names())
def test_report_on_its_defaults(name, tmp_path):
    page = run_report(name, tmp_path, timeout_s=240)
    stamp, html = read_json(page.with_suffix(".json")), page.read_text()
    assert stamp["status"] == "ok", stamp["error"]
    assert stamp["verdict"] and stamp["question"] and stamp["numbers"], (
        "the first screen: question, verdict, numbers"
    )
    assert "What this run says" in html and "<img" in html
    loads = re.findall(r"""<[a-z][^<>]*?\s(?:src|href)\s*=\s*["']?(?!data:|#|index\.html)([^"'> ]+)""", html)
    assert loads == [], "nothing from outside"
    assert html.count("<script") == 1 and page.stat().st_size < 8_000_000
    pictures = re.findall(r"<img\b[^>]*>", html)
    unnamed = [p[-80:] for p in pictures if not re.search(r'alt="[^"]{8,}"', p)]
    assert not unnamed, f"{len(unnamed)} pictures without a text for those who cannot see them"
    assert looked_at(page) == []


def looked_at(page: Path, *films: Path) -> list[str]:
    "The complaints of a browser, if there is one."
    if CHROMIUM and find_spec("playwright"):
        return complaints(page, *films)
    warnings.warn(f"{page.name}: no browser looked at it; apt-get install -y chromium", stacklevel=2)
    return []


def complaints(page: Path, *films: Path) -> list[str]:
    "What a browser of 1280 px has to say about a page: errors, requests, width, pictures that do not show."
    from playwright import sync_api

    own, said = ("data:", page.as_uri(), *(film.as_uri() for film in films)), []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1280, height=800))
        tab.on("console", lambda m: said.append(m.text))
        tab.on("pageerror", lambda e: said.append(str(e)))
        tab.on("request", lambda r: None if r.url.startswith(own) else said.append(r.url))
        tab.goto(page.as_uri())
        wide = tab.evaluate("document.documentElement.scrollWidth")
        dark = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        browser.close()
    return said + [f"{wide} px wide"] * (wide > 1280) + [f"{dark} pictures do not show"] * (dark > 0)
