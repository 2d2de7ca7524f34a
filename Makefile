# `make demo` and `make test` are all that a new user needs; CI runs `make check` and `make test-plan`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BENCH  := $(VENV)-bench/bin/python
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# what an install builds from: a change of the C sources builds them anew
BUILD  := pyproject.toml setup.py constraints.txt $(wildcard common/_kernels*.[ch])

.PHONY: demo test test-plan sim sim-planted fuzz soak check lint types imports typing servers clean
.PHONY: bench bench-links bench-picture bench-scale bench-transport bench-store bench-codec bench-check

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev servers
	$(BIN)/pytest -n 2 --dist worksteal

# Refit plans over real model families. A CUDA build of torch (6 GB) in an environment of its own; needs no GPU.
test-plan: $(VENV)-plan/.plan
	REFLEET_PLAN_TESTS=1 $(VENV)-plan/bin/pytest -n 2 --dist worksteal tests/plan

# A whole fleet in one thread, with faults by seed: SEEDS=1000 runs so many beside the kept ones (docs/testing.md).
SEEDS ?= 1000
sim: $(VENV)/.dev
	$(BIN)/python tests/sim --seeds $(SEEDS)

# Breaks each mechanism in turn, and says which seed told.
sim-planted: $(VENV)/.dev
	$(BIN)/python tests/sim --planted

# Mutated inputs for every decoder, in two processes; what it finds is kept in tests/fuzz/corpus. Nightly: CASES=1000000.
fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz.py --cases $(or $(CASES),20000) $(if $(SEED),--seed $(SEED))

# Publishing, kills and restarts on real processes for ten minutes, with a table of what happened at the end.
soak: $(VENV)/.dev servers
	$(BIN)/python tests/soak.py --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

check: lint types imports test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev typing
	$(BIN)/mypy

imports: $(VENV)/.dev typing
	PYTHONPATH=.typing $(BIN)/lint-imports

# Every benchmark prints its table and keeps its figures in build/bench. From publish to served, against peers.
bench: $(VENV)-bench/.bench | build/bench
	$(BENCH) benchmarks/publish_to_served.py --json build/bench/served.json --plot build/bench/timeline.png

# Over links of 10, 1 and 0.1 Gbit/s between two network namespaces: Linux, as root.
bench-links: $(VENV)-bench/.bench | build/bench
	$(BENCH) benchmarks/links.py --kinds rl lora tune none --json build/bench/links.json

# The picture of what these two found.
bench-picture: $(VENV)-bench/.bench
	$(BENCH) benchmarks/served_plot.py build/bench/served.json build/bench/links.json docs/served.png

# What another worker, gigabyte or tensor costs.
bench-scale: $(VENV)-bench/.bench | build/bench
	$(BENCH) benchmarks/scale.py --json build/bench/scale.json --plot build/bench/scale.png

# Payload bytes through the server, against bare sockets and redis-py.
bench-transport: $(VENV)-bench/.bench | build/bench
	$(BENCH) benchmarks/transport.py --json build/bench/transport.json

# Bytes on disk and the way back to earlier versions.
bench-store: $(VENV)-bench/.bench | build/bench
	$(BENCH) benchmarks/store_cost.py --steps 20 --json build/bench/store.json

# Bytes and speed of the codec against other codecs, on checkpoints that it trains first (6 minutes, kept in ~/.cache).
bench-codec: $(VENV)-bench/.bench | build/bench
	$(BENCH) benchmarks/codec_peers.py --json build/bench/codec.json --plot build/bench/codecs.png

# Fails when the codec became larger or slower than benchmarks/ratios.json says.
bench-check: $(VENV)/.dev
	$(BIN)/python benchmarks/check.py

build/bench:
	@mkdir -p $@

# The packages as mypy and import-linter see them: an editable install maps them by a hook that neither follows.
typing:
	@mkdir -p .typing/refleet
	@ln -sfn ../../publisher .typing/refleet/publisher
	@ln -sfn ../../worker .typing/refleet/worker
	@ln -sfn ../../common .typing/refleet/common
	@ln -sfn ../../common/_root/__init__.py .typing/refleet/__init__.py
	@ln -sfn ../../common/_root/py.typed .typing/refleet/py.typed

# The tests run against two servers: Valkey comes from PyPI, redis-server from the system. CI installs it; a laptop is told.
servers:
	@command -v redis-server >/dev/null || if [ -n "$(CI)" ]; then apt-get update -q && apt-get install -y -q redis-server; \
	  else echo "redis-server is not installed: its tests are skipped (Debian: apt-get install redis-server)"; fi

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BUILD) | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(BUILD) | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)-plan/.plan: pyproject.toml constraints-plan.txt
	$(PYTHON) -m venv $(VENV)-plan
	$(VENV)-plan/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-plan.txt -e '.[plan]'
	@touch $@

# Other codecs, in an environment of their own: what they bring along (a plugin for pytest) is not for the tests.
$(VENV)-bench/.bench: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server]' -r benchmarks/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-plan $(VENV)-bench .typing build ./*.egg-info .mypy_cache .ruff_cache .pytest_cache
