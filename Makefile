# make run: the whole course, without a screen, into build/
# make test: style, helpers, notebooks
# make lab: the course to follow, in JupyterLab
# make outputs: for authors; runs the notebooks and stores their outputs

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready

export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup lab run test outputs clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)
	@$(PY) -m tools.course fetch

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or \
	sys.exit("Python %d.%d: 3.11 to 3.13 is needed; try: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --requirement requirements.txt
	touch $(READY)

lab: setup
	$(PY) -m tools.course learner
	$(PY) -m jupyterlab --notebook-dir=. my_course/00_start_here.ipynb

run: setup
	$(PY) -m tools.course run

test: setup
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests --ignore=tests/test_twice.py
	$(PY) -m pytest tests/test_twice.py notebooks

outputs: setup
	$(PY) -m tools.course outputs $(NOTEBOOKS)

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
