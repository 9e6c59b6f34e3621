# Two commands matter: `make demo` and `make test`. Each makes .venv itself when it is missing.
#   PYTHON    the interpreter (default: python3.11, else a python3 of 3.11 or later); python3.9 or 3.10: fairseq 0.12.2
#   VENV      where the environment goes
#   PIP_ARGS  handed to pip, for example --extra-index-url https://download.pytorch.org/whl/cpu
#   ARGS      handed to pytest or the demo

PYTHON ?=
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
export PIP_ARGS

.PHONY: help venv demo test lint format clean

help:
	@echo "make demo    synthesise speech, train a compressed wav2vec 2.0 on it, decode it (10 minutes after set-up)"
	@echo "make test    the test suite"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make format  let ruff mend what it can"
	@echo "make venv    only the environment"
	@echo "make clean   remove caches and build products; environments stay"

venv:
	@bash requirements/make_venv.sh "$(VENV)" $(PYTHON)

demo: venv
	"$(VENV)/bin/python" examples/demo/run.py $(ARGS)

test: venv
	"$(VENV)/bin/python" -m pytest $(or $(ARGS),tests)

lint: venv
	"$(VENV)/bin/python" -m ruff check .
	"$(VENV)/bin/python" -m ruff format --check .

format: venv
	"$(VENV)/bin/python" -m ruff check --fix .
	"$(VENV)/bin/python" -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
