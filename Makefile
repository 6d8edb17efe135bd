# Everything runs in .venv, which is made here. Python 3.11 or newer is all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
FOLDERS := optim pallas_kernels schedules
# The tests install a CUDA compiler; where there is no CUDA, JAX would complain of it.
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK ?= 1

.PHONY: train test test-trainers lint docs links pictures bench clean

train: $(VENV)/.examples
	$(BIN)/python examples/train_lm.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# One process: a trainer that compiles uses all cores.
test-trainers: $(VENV)/.tunix
	$(BIN)/python -m pytest tests/trainers $(ARGS)

lint: $(VENV)/.lint
	mkdir -p build/types/octavo
	for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/types/octavo/$$folder; done
	ln -sfn ../../../package/__init__.py build/types/octavo/__init__.py
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python package $(FOLDERS)

# The site, in build/site. All pages anew: warnings of those that did not change count, too.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going --fresh-env $(ARGS) docs build/site

# Links that lead out of the site: needs the network.
links: $(VENV)/.docs
	$(BIN)/python -m sphinx -b linkcheck docs build/links

pictures: $(VENV)/.docs
	for program in docs/build_*.py; do $(BIN)/python $$program || exit 1; done

bench: $(VENV)/.examples
	$(BIN)/python benchmarks/step.py $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info

# One stamp for each set of extras: installed once, and again when pyproject changes.
EXTRAS_examples := examples
EXTRAS_test := test,docs,aot
EXTRAS_lint := test,lint
EXTRAS_docs := docs
EXTRAS_trainers := test,trainers

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Octavo needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS_$*)]'
	@touch $@

# Without what it depends on: its trainer needs little of it, and that is in the extra.
$(VENV)/.tunix: $(VENV)/.trainers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps google-tunix==0.1.7
	@touch $@
