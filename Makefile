# Every target sets itself up: only make and Python 3.11 or newer are needed before the first one.
#   make book      execute what is stale, build the site, say where it is
#   make test      style, types, unit tests, every notebook re-run, the built site in a headless browser
#   make execute   re-run every notebook          make serve    the site on http://127.0.0.1:8000
#   make lab       JupyterLab on the notebooks    make bench    the benchmarks (minutes)
#   make bench-attacks   our attacks against six other libraries, in an environment of their own (minutes)
#   make clean     remove what was built (not .venv)

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made
PAGE   := _build/html/index.html
PORT   ?= 8000

# Two threads on a busy two-core machine cost ten times the time, and one thread makes runs repeatable.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1

.PHONY: book site test execute serve lab bench bench-attacks clean
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

serve: book
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

bench: $(STAMP)
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# The other libraries live in their own environment, which sees that of the course.
bench-attacks: $(STAMP)
	test -x .venv-bench/bin/python || $(BIN)/python -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/course.pth"
	.venv-bench/bin/python benchmarks/attacks.py

clean:
	rm -rf _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
