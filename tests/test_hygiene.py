"""Manners: notebooks and package in step, small functions, floors respected, nothing left over."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from statistics import median, quantiles

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
TOURS = sorted(p for p in (ROOT / "nbs" / "tour").glob("*.ipynb"))
REPORTS = sorted(p for p in (ROOT / "nbs" / "reports").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "surgpose").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
FLOORS = dict.fromkeys(("schema", "config", "render_settings", "files", "sources", "geometry"), 0)
FLOORS |= {"data": 1, "synth": 2, "pose": 3, "adapt": 4}
TOP_FLOOR = 5  # everything else: pipeline, report, cli and what they are made of


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def is_exported(cell: nbformat.NotebookNode) -> bool:
    return bool(re.match(r"\s*#\|\s*exports?\b", cell.source))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def length(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


# Notebooks


def test_there_is_something_to_check():
    assert len(LIBRARY) >= 20 and len(MODULES) >= 20


def test_package_is_what_the_notebooks_export(tmp_path):
    "Exporting and cleaning a copy changes nothing."
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "-co",
            "--exclude-standard",
            "nbs",
            "surgpose",
            "settings.ini",
            "setup.py",
            "pyproject.toml",
            "README.md",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = (
        tracked.stdout.splitlines()
        if tracked.returncode == 0
        else [name_of(p) for d in ("nbs", "surgpose") for p in (ROOT / d).rglob("*.*")] + ["settings.ini"]
    )
    for name in names:
        if "__pycache__" in name or not (ROOT / name).is_file():
            continue
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run(
            [Path(sys.executable).with_name(tool)], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    differ = [
        name
        for name in names
        if name.startswith(("nbs/", "surgpose/"))
        and (ROOT / name).is_file()
        and (ROOT / name).read_bytes() != (tmp_path / name).read_bytes()
    ]
    made = [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "surgpose").rglob("*.py")]
    assert not differ, f"notebooks and package differ: {differ}; run `make prep` and commit"
    assert set(made) <= set(names), f"exported, but not in the package: {set(made) - set(names)}"


@pytest.mark.parametrize("path", LIBRARY + REPORTS + TOURS, ids=name_of)
def test_notebook_is_clean_and_small(path):
    nb = nbformat.read(path, 4)
    outputs = sum(len(json.dumps(c.outputs)) for c in nb.cells if c.cell_type == "code")
    assert outputs < 20_000, f"{outputs} characters of outputs"
    assert all(set(c.metadata) <= {"tags"} for c in nb.cells) and set(nb.metadata) <= {"kernelspec"}
    assert all(c.get("execution_count") is None for c in nb.cells)
    assert path.stat().st_size <= 150_000
    assert len(nb.cells) <= 60


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_notebook_opens_by_the_ritual_and_says_before_it_defines(path):
    nb = nbformat.read(path, 4)
    assert re.match(r"# [\w.]+\n\n> \S.*", nb.cells[0].source), "title and one sentence"
    assert nb.cells[1].source.startswith("#| default_exp "), "where it goes"
    assert len([c for c in nb.cells if c.cell_type == "markdown"]) >= max(2, len(nb.cells) / 8), "prose"
    lines = sum(
        bool(line.strip()) for c in cells(path) if is_exported(c) for line in c.source.splitlines()[1:]
    )
    assert lines <= 250, f"{lines} exported lines"


def test_every_module_comes_from_a_notebook():
    made = set()
    for path in LIBRARY:
        target = next(m[1] for c in cells(path) if (m := re.match(r"#\| default_exp ([\w.]+)", c.source)))
        made.add(f"surgpose/{target.replace('.', '/')}.py")
    assert {name_of(p) for p in MODULES} == made


# Functions


def test_functions_are_short():
    sizes = {f"{name_of(p)}:{f.name}": length(f) for p in MODULES for f in functions(p)}
    too_long = {k: v for k, v in sizes.items() if v > 50}
    assert not too_long, f"longer than 50 lines: {too_long}"
    assert median(sizes.values()) <= 10
    assert quantiles(sizes.values(), n=10)[-1] <= 25


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_typed_and_say_what_they_do(path):
    public = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"
    ]
    for f in public:
        args = [
            *f.args.posonlyargs,
            *f.args.args,
            *f.args.kwonlyargs,
            *filter(None, (f.args.vararg, f.args.kwarg)),
        ]
        untyped = [a.arg for a in args if a.annotation is None]
        assert not untyped and f.returns is not None, f"{f.name}: {untyped or 'return'} without a type"
        assert ast.get_docstring(f), f"{f.name}: no docstring"


# Left over

FORBIDDEN = {
    "star import": re.compile(r"^\s*from\s+\S+\s+import\s+\*", re.M),
    "bare except": re.compile(r"^\s*except\s*:", re.M),
    "unfinished": re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|NotImplemented" r"Error"),
    "absolute path": re.compile(r"""["'(\s]/(?:home|work|root|Users|tmp|mnt|opt|usr/local)/"""),
    "eval or exec": re.compile(r"(?<![\w.])(?:eval|exec)\("),
    "shell": re.compile(r"shell\s*=\s*True|os\.system\("),
    "unsafe yaml": re.compile(r"yaml\.(?:load|unsafe_load|full_load)\("),
    "pickle": re.compile(r"^\s*(?:import pickle|from pickle)", re.M),
}


@pytest.mark.parametrize("path", MODULES + LIBRARY + REPORTS, ids=name_of)
def test_nothing_is_left_that_should_not_be(path):
    if path.suffix == ".py":
        text = path.read_text()
    else:  # a hidden cell may try hostile input
        code = [c.source for c in cells(path) if is_exported(c) or path in REPORTS]
        text = "\n".join(code + [c.source for c in cells(path, "markdown")])
    for what, pattern in FORBIDDEN.items():
        found = pattern.search(text)
        assert not found, f"{what}: {found[0].strip()!r}"


def test_exported_cells_use_no_test_library():
    for path in MODULES:
        imported = {root for root, _ in imports(path.read_text(), ())}
        assert not imported & {"fastcore", "nbdev", "execnb", "pytest", "IPython.core"}, path


# Floors


def floor(module: tuple[str, ...]) -> int:
    "Floor of a module of the package, named without `surgpose`."
    return FLOORS.get(module[0], TOP_FLOOR)


def imports(source: str, package: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    "All imports of a source, also those inside functions: (first name, parts inside surgpose)."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[0], tuple(a.name.split(".")[1:])) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = ["surgpose", *package[: len(package) - node.level + 1], *parts]
            names = [tuple(parts[1:]) or (a.name,) for a in node.names]
            found += [(parts[0] if parts else "", n) for n in names]
    return found


def climbs(source: str, module: tuple[str, ...]) -> list[str]:
    "Imports of floors above the module's own."
    inner = {inside for first, inside in imports(source, module[:-1]) if first == "surgpose" and inside}
    return sorted(
        ".".join(i) for i in inner if i[0] not in ("__version__", "_modidx") and floor(i) > floor(module)
    )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_its_own_floor_and_lower_ones_only(path):
    module = path.relative_to(ROOT / "surgpose").with_suffix("").parts
    assert climbs(path.read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        (("data", "coco"), "from surgpose.synth.tools import Tool", ["synth.tools"]),  # said in full
        (("data", "coco"), "from ..pose.model import load_model", ["pose.model"]),  # relative
        (("schema",), "from .data import coco", ["data"]),  # from the top folder
        (
            ("pose", "train"),
            "def f():\n    import surgpose.adapt.track",
            ["adapt.track"],
        ),  # inside a function
        (("adapt", "refine"), "from ..report import run_report", ["report"]),
        (
            ("pose", "train"),
            "from ..data.coco import read_coco\nfrom .model import x\nimport torch",
            [],
        ),  # downstairs is fine
        (("pipeline",), "from surgpose.adapt.refine import refine\nfrom .report import run_report", []),
    ],
)
def test_the_floor_check_finds_a_module_that_climbs(module, source, found):
    assert climbs(source, module) == found


# Reports and settings


@pytest.mark.parametrize("path", REPORTS, ids=name_of)
def test_report_defines_nothing_and_has_one_parameters_cell(path):
    code = cells(path)
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].source.splitlines()[0].startswith('run_dir: str = ""')
    for line in tagged[0].source.splitlines():
        assert re.match(r"\w+: [\w\[\], |]+ = [^#]+(#[^=]*)?$", line), f"parameters: {line!r}"
    for cell in code:
        assert not re.search(r"^\s*(?:def|class|async def)\s", cell.source, re.M), "a report defines nothing"
        assert not is_exported(cell) and "default_exp" not in cell.source, "a report exports nothing"
        assert len(cell.source.splitlines()) <= 12, cell.source
    assert "What this run says" in "".join(c.source for c in cells(path, "markdown"))


def test_settings_keep_what_papermill_and_nbdev_need():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    cfg = ini["DEFAULT"]
    assert cfg["allowed_cell_metadata_keys"] == "tags"
    assert cfg["tst_flags"].split() == ["notest", "slow", "gpu", "blender"]
    assert cfg["console_scripts"] == "surgpose=surgpose.cli:main"
    assert (cfg["update_pyproject"], cfg["jupyter_hooks"]) == ("False", "False")


def test_every_config_field_says_what_it_is():
    from surgpose import config

    sections = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, config.Section)]
    for section in sections:
        assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]
        for name, field in section.model_fields.items():
            is_section = isinstance(field.default, config.Section)
            assert is_section or field.description, f"{section.__name__}.{name} has no description"
