# Two commands matter: `make demo` and `make test`. Each makes .venv itself when it is missing.
#   PYTHON    the interpreter (default: python3.11, else a python3 of 3.11 or later); python3.9 or 3.10: fairseq 0.12.2
#   VENV      where the environment goes
#   PIP_ARGS  handed to pip, for example --extra-index-url https://download.pytorch.org/whl/cpu
#   ARGS      handed to pytest or the demo
#   DATA      for `make results`: a fairseq manifest folder with train, valid, test and letter labels
#   SECOND    and another one, of speech that is harder to learn: models of DATA are trained on, on it
#   SMOKE     1: `make results` with hardly any training, to outputs/smoke: whether all of it runs

PYTHON ?=
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
export PIP_ARGS

.PHONY: help venv demo test results results-data lint format clean

help:
	@echo "make demo    synthesise speech, train a compressed wav2vec 2.0 on it, decode it (10 minutes after set-up)"
	@echo "make test    the test suite"
	@echo "make results DATA=FOLDER [SECOND=FOLDER]  what RESULTS.md says, made again (a day on two CPU cores)"
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

# each of these prints its tables and the commands below it; what was trained before is not trained again
EXAMPLE = "$(VENV)/bin/python" examples
PLAIN = $(OUTPUTS)/compare/plain/seed1/finetuned/checkpoint_last.pt
ON_SECOND = --start $(OUTPUTS)/compare --scale 0.2333 \
    --set "optimization.update_freq=[4]" model.mask_prob=0.1 model.mask_channel_prob=0.05
MODELS = base large sew_tiny digits pruned stochastic_tiny stochastic_base
ifdef SMOKE
OUTPUTS = outputs/smoke
SEEDS = 1
BENCHMARK = "$(VENV)/bin/python" benchmarks
SMALL = --smoke
COMPARE_LESS = --scale 0.0004 --seeds 1 --points s2q1k2
DIGITS_LESS = --pretrain-updates 2 --plain-updates 2 --light-updates 2 --specific-updates 2
DISTILL_LESS = --updates 2 --seeds 1
STREAMING_LESS = --updates 2 2
PRUNING_LESS = --updates 2 2
else
OUTPUTS = outputs
SEEDS = 1 2 3
# a missed limit is printed, and the next one runs
BENCHMARK = -"$(VENV)/bin/python" benchmarks
endif

results: results-data venv
	$(EXAMPLE)/compare/run.py "$(DATA)" --out $(OUTPUTS)/compare $(COMPARE_LESS)
	test -z "$(SECOND)" || \
	    $(EXAMPLE)/compare/run.py "$(SECOND)" --out $(OUTPUTS)/compare_second $(ON_SECOND) $(COMPARE_LESS)
	for seed in $(SEEDS); do "$(VENV)/bin/w2v2-light" stability --names shared,unshared --audio "$(DATA)" \
	    --split test $(OUTPUTS)/compare/shared/seed$$seed/finetuned/checkpoint_last.pt \
	    $(OUTPUTS)/compare/plain/seed$$seed/finetuned/checkpoint_last.pt || exit; done
	$(EXAMPLE)/digits/run.py "$(DATA)" --out $(OUTPUTS)/digits $(DIGITS_LESS)
	$(EXAMPLE)/distill/run.py "$(DATA)" --teacher $(PLAIN) --out $(OUTPUTS)/distill $(DISTILL_LESS)
	$(EXAMPLE)/streaming/run.py "$(DATA)" --teacher $(PLAIN) --out $(OUTPUTS)/streaming $(STREAMING_LESS)
	$(EXAMPLE)/pruning/run.py "$(DATA)" --checkpoint $(PLAIN) --out $(OUTPUTS)/pruning $(PRUNING_LESS)
	$(BENCHMARK)/claims.py $(SMALL)
	$(BENCHMARK)/inference.py $(or $(SMALL),--models $(MODELS))
	$(BENCHMARK)/training.py $(SMALL)
	$(BENCHMARK)/quantized.py $(SMALL)
	$(BENCHMARK)/huggingface.py $(or $(SMALL),base large sew)
	$(BENCHMARK)/streaming.py $(or $(SMALL),--minutes 60)
	$(BENCHMARK)/transcription.py $(or $(SMALL),--model $(PLAIN) --data $(OUTPUTS)/compare/data)
	$(BENCHMARK)/budget.py $(SMALL)
	$(BENCHMARK)/lfmmi.py $(or $(SMALL),--threads 2 --repeats 9 --orders 2)
	$(BENCHMARK)/distillation_epoch.py $(or $(SMALL),"$(DATA)" $(PLAIN) --threads 1 --repeats 2 --utterances 200)

results-data:
	@test -f "$(DATA)/train.tsv" || { echo "make results DATA=FOLDER: found no '$(DATA)/train.tsv'; FOLDER is a fairseq" \
	    "manifest folder, as w2v2-light prepare makes it"; exit 2; }

lint: venv
	"$(VENV)/bin/python" -m ruff check .
	"$(VENV)/bin/python" -m ruff format --check .

format: venv
	"$(VENV)/bin/python" -m ruff check --fix .
	"$(VENV)/bin/python" -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
