# make install | demo | down | test | test-faults | test-recipes | test-compose | test-cluster | test-lowest | lint | types | check | docs | lock | audit | clean
PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
# uv from PATH, or, where there is none, one of our own in .uv/.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

export UV_NO_PROGRESS ?= 1

.PHONY: install demo down test test-faults test-recipes test-compose test-cluster test-lowest lint types check docs lock audit clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml | $(UV)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "DeMe needs Python 3.11 to 3.13; name one with PYTHON=…"; exit 1; }
	test -x $(BIN)/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@# What a first start would do: compile our own modules, and migrate empty databases to copy.
	$(BIN)/python -m compileall -q deme_core tasks flows
	$(BIN)/python -m tasks.databases
	@touch $@

.uv/bin/uv:
	@$(PYTHON) -m pip install --quiet --target .uv uv==$(UV_VERSION) 2>/dev/null || \
		{ $(PYTHON) -m venv .uv/venv && .uv/venv/bin/pip install --quiet uv==$(UV_VERSION) && \
		  mkdir -p .uv/bin && ln -sf ../venv/bin/uv .uv/bin/uv; } || \
		{ echo "Cannot install uv: install it yourself, or the Debian packages python3-pip or python3-venv."; exit 1; }

# The way a team uses it: a local stack, a deployment, its report. `make down` stops the stack.
demo: install
	$(BIN)/deme up
	@eval "$$($(BIN)/deme env)" && $(BIN)/prefect deployment run deme/full && $(BIN)/deme follow

down:
	$(BIN)/deme down

# With TESTS=… those alone.
test: install
	$(BIN)/python -m pytest $(TESTS) -m "not long" -n 2 --dist loadscope --no-loadscope-reorder -rs

# kill -9 of every service in the middle of a run and more, the better part of an hour; and new random examples of the property tests.
test-faults: install
	$(BIN)/python -m pytest tests/faults -n 2 --dist loadscope --no-loadscope-reorder
	$(BIN)/python -m pytest tests/cluster -m long
	$(BIN)/python -m pytest tests/integration tests/e2e -m long
	$(BIN)/python -m pytest $$(grep -l hypothesis tests/unit/*.py) -n 2 --hypothesis-profile exploring

# The paper's six recipes on tiny stand-ins; some five minutes.
test-recipes: install
	$(BIN)/python -m pytest tests/recipes

# docker-compose.yml on a real engine (needs root, and debootstrap where no registry can be reached); some ten minutes.
test-compose: install
	$(BIN)/python -m pytest tests/compose

# The unit tests with the oldest versions that pyproject.toml allows, in an environment of their own; some five minutes.
test-lowest: | $(UV)
	$(UV) venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv-lowest
	$(UV) pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[stack,server,ray,dev]"
	.venv-lowest/bin/python -m pytest tests/unit -m "not long" -n 2

# Two Ray nodes on loopback, one of which is killed, and a worker of a work pool; several minutes on two cores.
test-cluster: TESTS = tests/cluster
test-cluster: test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: install
	$(BIN)/mypy

check: test lint types

# docs/recipe.md, of what deme_core/recipe/ says; a test compares the two.
docs: install
	$(BIN)/python -m deme_core.recipe_reference

# Without bitsandbytes: where it is installed diffusers imports it whether it is needed or not, which takes seconds.
lock: | $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --extra stack --extra server --extra ray --extra dev --custom-compile-command "make lock" pyproject.toml -o requirements.lock

# Known holes in what the lock names; needs PyPI's own service. Strict: what cannot be looked up is no good news.
audit: | $(UV)
	$(UV) tool run pip-audit --strict --disable-pip --require-hashes -r requirements.lock

clean:
	rm -rf $(VENV) .uv
