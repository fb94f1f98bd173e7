# make reproduce   build the environment, quantize the shipped twin, print the comparison (about 5 minutes on 2 cores)
# make test        build the environment, run the linter and the tests (about 6 minutes on 2 cores; WORKERS=4 for more)
# make lint        linter only
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: reproduce test lint clean

reproduce: $(VENV)/.installed
	$(BIN)/python -m experiments.table name=reproduce

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs
