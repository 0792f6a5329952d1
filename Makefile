# Two commands do everything on a fresh Linux machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup.stamp
JOBS ?= 2

export JUPYTER_PLATFORM_DIRS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Kernels listen on sockets of their own, off the network; a socket's path must stay under 108 characters.
RUNTIME = $(or $(JUPYTER_RUNTIME_DIR),$(or $(XDG_DATA_HOME),$(HOME)/.local/share)/jupyter/runtime)
SOCKETS = $(shell test $$(printf %s "$(RUNTIME)" | wc -c) -lt 57 && echo --KernelManager.transport=ipc)

.PHONY: help setup demo test lab docs prep bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install everything into it

$(STAMP): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is not there; install Python 3.11 (Debian: apt-get install python3.11-venv) or pass PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("setup: Python 3.11 is needed (bpy 4.2 exists for no other), this is %d.%d; pass PYTHON=/path/to/python3.11" % v)'
	@test -d $(VENV) || test $$(df -Pk . | awk 'NR == 2 {print $$4}') -gt 10000000 || { echo "setup: about 10 GB of free disk are needed here, $$(df -Ph . | awk 'NR == 2 {print $$4}') are left; free some, or move the checkout"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "setup: $(PYTHON) lacks venv; Debian: apt-get install python3.11-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,fast]'
	@out=$$($(BIN)/python -c 'import bpy' 2>&1) || { lib=$$(echo "$$out" | grep -oE '[a-zA-Z0-9_-]+\.so[.0-9]*' | head -1); echo "setup: Blender cannot load $${lib:-: $$out}; Debian: apt-get install libgl1 libsm6 libxfixes3 libxi6 libxkbcommon0 libxrender1 libxxf86vm1"; exit 1; }
	@touch $@

demo: $(STAMP)  ## run the whole job on embedded data; ends with the path of the report
	$(BIN)/surgpose run --profile demo --out reports/demo

test: $(STAMP)  ## run every test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope tests

lab: $(STAMP)  ## JupyterLab on this machine only, with a token; opens on a tour of fifteen minutes
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(SOCKETS) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/tour/00_start.ipynb

docs: $(STAMP)  ## every notebook as a plain page, to be read offline; _docs/index.html leads on
	$(BIN)/surgpose docs --out _docs

prep: $(STAMP)  ## export the notebooks, clean them, test
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/ruff check surgpose tests setup.py
	$(MAKE) test

bench: $(STAMP)  ## measure against the named baselines; writes reports/bench, with a JSON of all numbers
	$(BIN)/surgpose report 80_benchmark --out reports/bench -p rounds=2 -p render_images=4 \
		-p render_width=640 -p render_workers=2 -p render_defaults=true -p truth_samples=200 -p race_clip=data/sample/clip.mp4 \
		-p sizes='[10, 1000, 10000, 100000]' -p long_minutes='[1, 10]' -p json_path=reports/bench/benchmark.json

clean:  ## remove what was built, not what was learned: reports stay
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .hypothesis
