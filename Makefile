# Every target sets itself up: only make and Python 3.11 or newer are needed before the first one.
#   make book            execute what is stale, build the site, say where it is
#   make test            style, types, unit tests, every notebook re-run, the built site in a headless browser
#   make execute         re-run every notebook
#   make serve           the site on http://127.0.0.1:8000 (another port: make serve PORT=9000)
#   make lab             JupyterLab on the notebooks (its options: make lab ARGS="--no-browser")
#   make bench           exact verification, and our attacks against exact distances (two minutes)
#   make bench-attacks   our attacks against six other libraries, in an environment of their own (15 minutes;
#                        a trial run: make bench-attacks ARGS="--images 5 --store trial.json")
#   make clean           remove what was built (not .venv)
#   make help            these lines

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made
PAGE   := _build/html/index.html
BENCH  := .venv-bench
PORT   ?= 8000
ARGS   ?=

# Two threads on a busy two-core machine cost ten times the time, and one thread makes runs repeatable.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1

.PHONY: book site test execute serve lab bench bench-attacks clean help
.DELETE_ON_ERROR:

book: $(STAMP)
	$(BIN)/python book/execute.py
	@$(MAKE) --no-print-directory site
	@echo "The course: file://$(CURDIR)/$(PAGE)"

# Build what is stored in the notebooks. Warnings are errors; --all, because an incremental build forgets old warnings.
site: $(STAMP)
	$(BIN)/jupyter-book build . -q -W --keep-going -n --all

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python book/execute.py --check
	@$(MAKE) --no-print-directory site
	$(BIN)/pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout=300 -n 2 --dist loadfile -rs
	@$(BIN)/python tests/browser.py

execute: $(STAMP)
	$(BIN)/python book/execute.py --all

# What is built is served; `make book` builds it anew.
serve: $(STAMP)
	@test -f $(PAGE) || $(MAKE) --no-print-directory book
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks $(ARGS)

bench: $(STAMP)
	@echo "== 1/2  Exact verification of 50 digits (a minute or two)"
	$(BIN)/python benchmarks/verification.py
	@echo "== 2/2  Our nearest adversarial examples over the exact distances, which are stored (a minute)"
	$(BIN)/python benchmarks/gap_to_exact.py --seconds 0
	@echo "Other libraries: make bench-attacks, or their stored results: $(BIN)/python benchmarks/attacks.py --summary"

bench-attacks: $(BENCH)/.made
	$(BENCH)/bin/python benchmarks/attacks.py $(ARGS)

clean:
	rm -rf _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# The other libraries live in their own environment, which sees that of the course.
$(BENCH)/.made: benchmarks/requirements.txt $(STAMP)
	test -x $(BENCH)/bin/python || $(BIN)/python -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(BENCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/course.pth"
	@touch $@

help:
	@sed -n 's/^#   //p' Makefile
