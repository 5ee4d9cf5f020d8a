# Everything that a contributor does in a day.  `make help` lists it.
.DEFAULT_GOAL := help
PATHS ?=
# each writes a page of docs/evidence from cells of its own; tools/bench/peers/compare.py wants environments beside
MATRICES ?= evidence evidence_solvers evidence_moe evidence_w4a4 evidence_ssm evidence_reparam evidence_cnn evidence_formats evidence_gsq evidence_mquant evidence_petr \
	evidence_gsrender evidence_mvctrack evidence_lavt
ARGS ?=

.PHONY: help sync fix lint test slow native bench docs samples evidence evidence-selection new-plugin

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

sync:  ## install the workspace and its tools, as the lock says
	uv sync --locked

fix:  ## format, and mend what can be mended by itself
	uv run ruff check --fix .
	uv run ruff format .

lint:  ## style, formatting, import contracts, types
	uv run ruff check .
	uv run ruff format --check .
	uv run lint-imports
	uv run mypy

test:  ## tests on the CPU; PATHS=packages/qcore for a part of them
	uv run pytest -q $(PATHS)

slow:  ## the tests that take longer
	uv run pytest -q -m slow

native:  ## compile the C++ kernels into the source tree
	cd kernels && uv run --with setuptools python setup.py -q build_ext --inplace

bench:  ## time the kernels on this machine
	uv run python tools/bench/kernels.py

docs:  ## write docs/methods.md, recipes.md and systems.md anew, and check links and commands
	uv run python tools/check_docs.py

samples:  ## run the main job, and put what it prints into README.md and docs/tour.md
	uv run python tools/samples.py

evidence:  ## compute the cells of docs/evidence that are missing, matrix by matrix; ARGS=--list says which
	@for m in $(MATRICES); do echo "== $$m"; uv run --group evidence python tools/bench/$$m.py $(ARGS) || exit 1; done

evidence-selection:  ## the same for selectors; needs the texts that tools/bench/labelled.py names
	uv run python tools/bench/selection.py

new-plugin:  ## start a plug-in: make new-plugin name=ternary
	@test -n "$(name)" || { echo "give it a name: make new-plugin name=ternary"; exit 2; }
	uv run python tools/new_plugin.py $(name)
