# make install   a virtual environment in .venv with the tested set of constraints.txt
# make demo      the main job on the packaged corpus: table on the terminal, page in runs/demo/report.html
# make bench     measures what balancing costs and how fast the lab is: benchmarks/results, docs/evidence/speed{,_lab}.md
# make gpu       what a GPU alone can show, in eight minutes on a machine with one: benchmarks/results and docs/evidence/gpu.md
# make test      everything that CI runs
# make test-frameworks   the tests of torchtitan, Megatron-Core and others, each in an environment of its own
# make docs      the handbook, in build/site; make docs-serve shows it while you write
# make notebooks executes the notebooks of the handbook and stores their outputs
# make mutants   breaks the source on purpose, one known defect at a time; the tests must notice every break
# make random-mutants   200 random breaks of the core, each run against the tests that reach its line; runs/random_mutants
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
# make test TORCH=2.10.0 tests another version of torch than constraints.txt pins
TORCH ?=
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)

# axe-core checks the accessibility of the pages. Without npm these tests are skipped.
AXE := test -d build/node_modules/axe-core || ! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --fetch-retries=0 --fetch-timeout=20000 --prefix build axe-core@4.14.1

.PHONY: install demo bench gpu test test-frameworks docs docs-serve notebooks mutants random-mutants clean

install: $(VENV)/.installed

# Runs again only when the project's requirements change. torch comes first: pip would take the largest build otherwise.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(CONSTRAINTS))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/equipoise compare --out $(DEMO) --resume

bench: install
	for name in overhead operations sample experts trainer attach audit speed; do $(BIN)/python benchmarks/$$name.py || exit 1; done

gpu: install
	$(BIN)/python benchmarks/gpu.py

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/tools/handbook.py
	-$(AXE)
	$(BIN)/pytest -n 2 --dist loadgroup

# make test-frameworks ONLY=torchtitan runs one
test-frameworks: install
	$(BIN)/python tests/frameworks/run.py $(ONLY)

docs: install
	$(BIN)/python docs/tools/handbook.py

docs-serve: install
	$(BIN)/python docs/tools/handbook.py --serve

notebooks: install
	$(BIN)/python docs/tools/notebooks.py

mutants: install
	PYTHONPATH=tests $(BIN)/python -m mutants $(ONLY)

# Goes on where it was stopped; remove runs/random_mutants after a change of the source or the tests.
random-mutants: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[mutants]"
	PYTHONPATH=tests $(BIN)/python -m mutants.random_sample

clean:
	rm -rf $(VENV) runs build dist
