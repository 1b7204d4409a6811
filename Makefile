# Every target sets up what it needs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
FUZZ_COUNT   ?= 1000000
FUZZ_SECONDS ?= 10

export OMP_NUM_THREADS := 1
export ORT_DISABLE_TELEMETRY := 1
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install demo test test-all fuzz fuzz-models chaos chaos-sim chaos-long load bench images lint clean help

help:           ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

# Not by hash: which wheel of torch is right is the machine's matter. The images are (deploy/locks/).
install: $(STAMP)  ## the whole project with its development tools, in .venv

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: there is no $(PYTHON) on this machine" >&2; \
	    echo "hint: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Shoal needs Python 3.11 or newer, $(PYTHON) is older" >&2; \
	    echo "hint: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: $(VENV) cannot be made" >&2; \
	    echo "hint: $(PYTHON) needs its venv module (Debian: apt install python3-venv), and the disk some space" >&2; exit 2; }
	@echo "installing Shoal and what it needs into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' || \
	  { echo "error: not everything could be installed, see above" >&2; \
	    echo "hint: is the package index reachable, and is there space? Then type make again: it goes on from there" >&2; exit 2; }
	@touch $(STAMP)

demo: install   ## 16 devices learn on the smartwatch data; report in build/demo/
	$(BIN)/shoal-fleet demo --out build/demo

test: install   ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: install  ## all tests, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS)

fuzz: install   ## a million hostile envelopes, every decoder, planted bugs, then a guided search
	$(BIN)/python -m tests.fuzz --count $(FUZZ_COUNT) --workers $(WORKERS) --planted
	$(BIN)/python -m tests.fuzz.guided --seconds $(FUZZ_SECONDS)

fuzz-models: install  ## ten thousand mutated models, signed rightly, on their way through a device; goes on where it ended
	$(BIN)/python -m tests.fuzz.models --count 10000 --workers $(WORKERS)

chaos: install  ## real processes under real faults: kill -9, SIGSTOP, broken links; some ten minutes
	rm -rf build/chaos
	$(BIN)/shoal-fleet chaos --real --faults 100 --seconds 900 --out build/chaos

load: install  ## 10,000 light agents over TLS against one broker and one aggregator; some ten minutes
	$(BIN)/shoal-fleet load --devices 10000 --seconds 60 --out build/load

chaos-sim: install  ## simulated fleets under faults, a minute of them
	$(BIN)/shoal-fleet chaos --seeds 24 --faults 10 --workers $(WORKERS)

chaos-long: install  ## 100 histories of 100 faults, then 1,000 real ones; goes on where it was cut off
	$(BIN)/shoal-fleet chaos --seeds 100 --faults 100 --out build/chaos-long
	$(BIN)/shoal-fleet chaos --real --faults 1000 --out build/chaos-long/real

lint: install   ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## one table of ratios against Flower, torch and memcpy; JSON in build/bench/
	$(BIN)/python -m bench --out build/bench

images:         ## the edge and cloud images, with docker, podman or buildah
	deploy/build-images.sh

clean:          ## remove .venv and build/
	rm -rf $(VENV) build
