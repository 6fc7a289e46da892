# vitbook: `make book` runs the book, `make test` proves it, `make lab` opens it. All of it lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
MADE   := $(BIN)/python nbs/_site/contents.py

.PHONY: help book test lab docs bench export chapter clean
help:
	@echo 'make book   run every chapter; pages and a table of results in _book/   (ARGS="attention --device cuda" for a part of it)'
	@echo 'make test   all checks                                                  (ARGS="-m \"not book and not lab\"" for a part of them)'
	@echo 'make lab    the book in JupyterLab'
	@echo 'make docs   the site in _docs/ (needs Quarto)'
	@echo 'make bench  the fast paths against their naive forms'
	@echo 'make export nbs/ -> vitbook/, lists of chapters, outputs cleaned'
	@echo 'make chapter SLUG=…  the files of a new chapter'
	@echo 'make clean  remove what was made'

# Versions that must agree are pinned in settings.ini (`constraints`), the only place for dependencies.
$(VENV)/constraints.txt: settings.ini
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "from configparser import ConfigParser as C; c = C(delimiters=['=']); c.read('settings.ini'); print(*c['DEFAULT']['constraints'].split(), sep='\n')" > $@

$(VENV)/.%: $(VENV)/constraints.txt setup.py pyproject.toml
	@echo 'Installing vitbook[$*] into $(VENV) (a few minutes the first time) …'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$*]'
	@touch $@

book: $(VENV)/.book
	@$(BIN)/vitbook run $(or $(ARGS),all)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -c tests/pytest.ini --rootdir=. -n 2 --dist loadfile --no-loadscope-reorder tests $(ARGS)

lab: $(VENV)/.book
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

docs: $(VENV)/.dev
	@command -v quarto >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check quarto-cli 2>/dev/null || true
	@PATH="$$PATH:$(CURDIR)/$(BIN)"; command -v quarto >/dev/null && quarto --version >/dev/null 2>&1 \
	  || { echo 'The site is rendered by Quarto (quarto.org), which is neither on PATH nor could be installed from PyPI: install it and run make docs again.' >&2; exit 2; }; \
	  rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/quarto/filtered-notebooks"; quarto render $(ARGS)

bench: $(VENV)/.book
	@$(BIN)/vitbook bench $(ARGS)

# Lists first, so that a list git could not merge is whole again before nbdev reads it; then again, from what was exported.
export: $(VENV)/.dev
	@$(MADE) && $(BIN)/nbdev_export && $(BIN)/python -c 'from vitbook.registry import write_index; write_index()' && $(MADE) && $(BIN)/nbdev_clean

chapter: $(VENV)/.dev
	@$(MADE) chapter $(SLUG)

clean:
	rm -rf _book _docs _proc build dist *.egg-info .pytest_cache .hypothesis .quarto
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
