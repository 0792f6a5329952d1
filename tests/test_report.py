"""Reports: typed parameters, four ways to end, and pages that stand alone."""

from __future__ import annotations

import base64
import html
import re
import shlex
import shutil
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from surgpose.cli import parse_verb
from surgpose.config import config_yaml, override, profile, project_root
from surgpose.engine import Job, Phase, run_phases
from surgpose.files import atomic_write, read_json, write_json
from surgpose.report import open_run, parse_parameters, read_parameters, run_report, write_index

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PARAMETERS = """run_dir: str = ""  # folder of a run
limit: int = 3  # pictures
fast: bool = True  # skip the slow part"""


def make_report(folder: Path, *cells: str, name: str = "demo", parameters: str = PARAMETERS) -> Path:
    "Write a report notebook into a folder of reports."
    nb = new_notebook(
        cells=[
            new_markdown_cell("# Demo\n\n> Does it run?"),
            new_code_cell(parameters, metadata=dict(tags=["parameters"])),
            *map(new_code_cell, cells),
        ]
    )
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / f"{name}.ipynb")
    return folder


def report(
    tmp_path: Path, *cells: str, given: dict | None = None, timeout_s: float = 60, **kw
) -> tuple[str, dict]:
    "Make a report, run it, and return its page and its stamp."
    folder = make_report(tmp_path / "nbs", *cells, **kw)
    page = run_report("demo", tmp_path / "out", given, folder=folder, timeout_s=timeout_s)
    assert {p.name for p in page.parent.iterdir()} == {"demo.html", "demo.ipynb", "demo.json"}
    return page.read_text(), read_json(page.with_suffix(".json"))


def outside(page: str) -> list[str]:
    "What a page would load or lead to, other than itself and the index."
    return re.findall(r"""<[a-z][^<>]*?\s(?:src|href)\s*=\s*["']?(?!data:|#|index\.html)([^"'> ]+)""", page)


def test_values_become_what_the_report_declares(tmp_path):
    code = "print(type(limit).__name__, limit, type(fast).__name__, fast)"
    page, stamp = report(tmp_path, code, given=dict(limit="12", fast="false"))
    assert "int 12 bool False" in page and stamp["parameters"] == dict(limit=12, fast=False)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(limti=3), "did you mean 'limit'"),  # unknown
        (dict(limit="many"), "expected int, got 'many'"),  # of another type
        (dict(fast="perhaps"), "expected bool"),
        (dict(limit="["), "expected a YAML value"),
    ],
)
def test_bad_parameters_run_nothing_and_leave_a_page_that_says_why(tmp_path, given, told):
    folder = make_report(tmp_path / "nbs", "open('ran', 'w')", "print('hello')")
    with pytest.raises(ValueError, match=told):
        run_report("demo", tmp_path / "out", given, folder=folder)
    page, stamp = (tmp_path / "out" / f"demo.{kind}" for kind in ("html", "json"))
    text = html.unescape(page.read_text())
    assert "This report failed" in text and told in text and "<pre>hello" not in text
    stamp = read_json(stamp)
    assert stamp["status"] == "failed" and told in stamp["error"] and stamp["ended"]
    assert not (tmp_path / "out" / "demo.ipynb").exists(), "nothing was executed"


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ("limit = 3", "name: type = default"),
        ("limit: dict = {}", "limit: dict"),
        ("import os", "name: type = default"),
    ],
)
def test_a_parameters_cell_holds_typed_lines_only(tmp_path, parameters, told):
    folder = make_report(tmp_path, parameters=parameters)
    with pytest.raises(ValueError, match=told):
        read_parameters(folder / "demo.ipynb")


def test_the_working_folder_is_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "myrun").mkdir()
    code = "from pathlib import Path; print(Path('settings.ini').is_file(), Path(run_dir).is_dir())"
    page, _ = report(tmp_path, code, given=dict(run_dir="myrun"))
    assert "True True" in page, "run_dir is relative to where the caller stands"


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os._exit(3)", "DeadKernelError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "DeadKernelError"),
        ("import time; time.sleep(60)", "CellTimeoutError"),
        ("raise SystemExit(1)", "SystemExit"),
    ],
)
def test_a_report_that_breaks_leaves_a_page_that_says_so(tmp_path, cell, error):
    page, stamp = report(tmp_path, "print('so far so good')", cell, "print('never')", timeout_s=3)
    assert stamp["status"] == "failed" and error in stamp["error"] and stamp["ended"]
    assert "This report failed" in page and "so far so good" in page and error.split(":")[0] in page
    assert cell.split(";")[-1].strip()[:9] in re.sub("<[^>]+>", "", page), (
        "inputs are shown to whoever has to mend it"
    )
    assert outside(page) == []


def test_a_report_that_succeeds_again_forgets_its_failure(tmp_path):
    assert report(tmp_path, "1 / 0")[1]["status"] == "failed"
    page, stamp = report(tmp_path, "print('well')")
    assert stamp["status"] == "ok" and not stamp["error"] and "This report failed" not in page


def test_pages_stand_alone(tmp_path):
    dot = base64.b64encode(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1]).decode()
    page, _ = report(
        tmp_path,
        "from IPython.display import HTML, Image, Javascript, display; display(Javascript('steal()'))",
        f"import base64; display(Image(base64.b64decode('{dot}'), alt='a dot'))",
        "display(HTML('<b>bold</b><script src=\"https://evil.example/x.js\"></script>'))",
        "import ipywidgets; display(ipywidgets.Button(description='press'))",
        "from surgpose.browse import ToolView; ToolView('tweezers', width=240, height=120)",
        "from surgpose.report import headline",
        "headline({'<img src=x>': '<script>'}, question='Q & A?', verdict='<i>yes</i>')",
        "secret = 'hidden input'",
    )
    assert 'alt="a dot"' in page and "data:image/png;base64" in page
    assert (
        outside(page) == []
        and page.count("<script") == 1
        and "steal" not in page
        and "hidden input" not in page
    )
    assert "&lt;script&gt;" in page and "Q &amp; A?" in page and "<i>yes" not in page, "texts are escaped"
    assert "Content-Security-Policy" in page and "default-src 'none'" in html.unescape(page)
    assert "widget-view" not in page and "widget-state" not in page
    assert re.search(r'<img\b[^>]*alt="A pair of tweezers opened by', page), "a sheet in a widget's place"
    assert (tmp_path / "out" / "demo.ipynb").read_text().count("widget-view") == 1  # the button has no sheet


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium; Debian: apt-get install chromium")
def test_a_click_sorts_a_table_and_no_other_script_runs(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    report(
        tmp_path,
        "import pandas as pd; from surgpose.data.show import show_html, show_table",
        "show_table(pd.DataFrame(dict(tool=['b', 'c', 'a', 'd'], AP=[9.5, 1000.25, None, -3.0])), 'Tools')",
        "show_html('<p onclick=\"document.title = 1\" id=trap>press</p>', 'a trap')",
    )
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto((tmp_path / "out" / "demo.html").as_uri())

        def column() -> str:
            return "".join(tab.locator("table.dataframe tbody tr td:first-child").all_inner_texts())

        seen = [column()]
        for _ in range(3):
            tab.get_by_text("AP", exact=True).click()
            seen.append(column())
        assert seen == ["bcad", "dbca", "cbda", "bcad"]  # as it was, up, down, as it was; n/a stays last
        tab.get_by_text("tool", exact=True).press("Enter")
        assert column() == "abcd"
        tab.locator("#trap").click()
        assert tab.title() == "Demo"
        seconds = dict(render=31.0, train=120.0, predict=5.0)
        phases = {n: dict(status="ok", seconds=s, numbers={}) for n, s in seconds.items()}
        write_json(tmp_path / "run.json", dict(phases=phases))
        tab.goto(write_index(tmp_path).as_uri())
        tab.get_by_text("time", exact=True).click()
        assert "".join(tab.locator("tbody tr td:first-child").all_inner_texts()) == "predictrendertrain"
        browser.close()


def test_frames_of_patients_stay_out_unless_asked_for(tmp_path):
    "What the run was told rules, whoever makes a page of it later."
    parameters = PARAMETERS + "\nembed_frames: bool = True  # show frames of the video"
    folder = make_report(
        tmp_path / "nbs", "print('frames' if embed_frames else 'no frames')", parameters=parameters
    )
    for told, given, said in (
        (False, {}, "<pre>no frames"),
        (False, dict(embed_frames="true"), "<pre>frames"),
        (True, {}, "<pre>frames"),
    ):
        write_json(tmp_path / "run" / "run.json", dict(embed_frames=told))
        given = dict(run_dir=str(tmp_path / "run"), **given)
        assert said in run_report("demo", tmp_path / "out", given, folder=folder).read_text()


def test_every_report_with_real_pictures_can_do_without(tmp_path):
    "What 30_train shows of real footage stays out, and its advice can be typed as it stands."
    for name in ("30_train", "40_review", "50_refine"):
        declared = read_parameters(project_root() / "nbs" / "reports" / f"{name}.ipynb")
        assert parse_parameters(declared, dict(embed_frames="false")) == dict(embed_frames=False)
    sample, run = project_root() / "data" / "sample", tmp_path / "a run"
    shutil.copytree(sample / "render", run / "synthetic")
    shutil.copytree(sample / "run", run / "teacher")
    for path in (run / "teacher" / "metrics.json", *(run / "teacher" / "evaluations").glob("*.json")):
        write_json(path, {k: v for k, v in read_json(path).items() if k != "sizes"})
    measured = read_json(run / "teacher/evaluations/real_suture.json")["provenance"]
    write_json(run / "teacher/evaluations/found/real_suture.json", dict(provenance=measured, found=[]))
    atomic_write(run / "config.yaml", config_yaml(override(profile("demo"), ["report.embed_frames=false"])))
    page = run_report("30_train", tmp_path, dict(run_dir=str(run), worst=1))
    assert read_json(page.with_suffix(".json"))["status"] == "ok"
    text = html.unescape(page.read_text())
    assert "real suture: the" not in text and "proxy clip: the" in text
    (advice,) = re.findall(r"surgpose (evaluate .*) --sizes 416 640 960", text)
    verb = parse_verb("evaluate", shlex.split(advice)[1:])
    assert (verb.data, verb.out) == (run / "synthetic", run / "teacher")


def test_the_stamp_tells_what_made_the_page(tmp_path):
    _, stamp = report(
        tmp_path, "from surgpose.report import headline; headline({'b': 1, 'a': 0.25}, verdict='Fine.')"
    )
    assert stamp["status"] == "ok" and stamp["verdict"] == "Fine." and stamp["title"] == "Demo"
    assert list(stamp["numbers"].items()) == [("b", "1"), ("a", "0.25")], "in the order they were given"
    assert len(stamp["notebook_sha256"]) == 64 and stamp["versions"]["numpy"] and stamp["seconds"] > 0
    assert (
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", stamp["started"])
        and stamp["started"] <= stamp["ended"]
    )


def test_the_index_escapes_and_links(tmp_path):
    out = tmp_path / "a & <b>"
    phases = dict(
        render=dict(status="ok", seconds=3.0, numbers={"images": 4}),
        train=dict(status="running"),
        predict=dict(status="blocked", error="<script>train</script> did not finish"),
    )
    write_json(out / "run.json", dict(profile="demo", video="/secret/place/<v>.mp4", phases=phases))
    page = write_index(out).read_text()
    assert "a &amp; &lt;b&gt;" in page and page.count("<script") == 1 and "/secret/place" not in page
    assert "1 of 3 phases finished" in page and "did not finish" in page
    assert outside(page) == ["run.json"]


def test_the_index_of_a_run_without_frames_shows_no_film(tmp_path):
    (tmp_path / "side_by_side.mp4").write_bytes(b"film")
    for shown in (True, False):
        write_json(tmp_path / "run.json", dict(embed_frames=shown, phases={}))
        index = write_index(tmp_path).read_text()
        for text in ("<video", "<figcaption>", 'aria-label="The tools found'):
            assert (text in index) == shown
    cfg = override(profile("demo"), ["report.embed_frames=false"])
    assert run_phases([Phase("look", lambda job: {})], Job(cfg, tmp_path / "run"))
    assert read_json(tmp_path / "run" / "run.json")["embed_frames"] is False


def test_open_run_finds_the_pieces(tmp_path):
    (tmp_path / "synthetic").mkdir()
    write_json(tmp_path / "run.json", dict(video=str(tmp_path / "v.mp4"), truth=None))
    run = open_run(tmp_path)
    assert (
        run.has("synthetic") and not run.has("pseudo") and not run.has("truth") and run.video.name == "v.mp4"
    )
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        open_run(tmp_path / "none")
