# make demo    install, then adapt the built-in network to handwritten digits
# make test    install, then run the tests
# make faults  kill, damage, race and fuzz whole (tests/faults/); about an hour
# Any target takes PYTHON=python3.12 (the interpreter) and VENV=folder (where to install).

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/

.PHONY: demo test test-slow check faults parity parity-shift benchmarks clean

demo: install-test
	$(RUN)flaxtransfer train --resume

test: install-test
	$(RUN)python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: install-slow
	XLA_FLAGS=--xla_backend_optimization_level=3 $(RUN)python -m pytest -m slow $(ARGS)

check: install-dev
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

faults: install-test
	$(RUN)python -m tests.faults.kills
	$(RUN)python -m tests.faults.kills --signal TERM
	$(RUN)python -m tests.faults.kills --job race --random 10
	$(RUN)python -m tests.faults.damage
	$(RUN)python -m tests.faults.cache_race --rounds 1000
	$(RUN)python -m tests.faults.fuzz --rounds 13000

parity: install-parity
	# On disk: the networks are whole ones, and would fill the memory that other tests write to.
	PYTEST_DEBUG_TEMPROOT=$${TMPDIR:-/tmp} \
	  $(RUN)python -m pytest -n 2 --dist worksteal -m parity tests/parity $(ARGS)

parity-shift: install-parity-shift
	$(RUN)python -m pytest -m parity_shift tests/parity_shift $(ARGS)

benchmarks: install-parity install-parity-shift
	$(RUN)python experiments/benchmarks/train_step.py --model resnet50 --compare both
	$(RUN)python experiments/benchmarks/train_step.py --model resnet18 --compare both
	$(RUN)python experiments/benchmarks/cached_prefix.py
	$(RUN)python experiments/benchmarks/probes.py

clean:
	rm -rf $(VENV) build dist

# One environment serves all targets; a target adds its extra the first time it is asked for.
# What was installed is remembered beside the interpreter's version and the two files that decide
# it, so that a second call costs a comparison, and another PYTHON makes the environment anew.
# --no-compile: Python compiles what it imports, and pip would compile all that is installed, which
# takes as long as the rest.
.PHONY: venv install-test install-slow install-dev install-parity install-parity-shift

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 ..." >&2; \
	  exit 2; }
	@want=$$($(PYTHON) -c 'import sys; print(sys.version)'); \
	have=$$($(RUN)python -c 'import sys; print(sys.version)' 2>/dev/null || true); \
	if [ "$$want" != "$$have" ]; then \
	  rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); \
	fi

install-test install-slow install-dev install-parity install-parity-shift: install-%: venv
	@want=$$(cat pyproject.toml constraints.txt | cksum); \
	if [ "$$want" != "$$(cat $(VENV)/.installed-$* 2>/dev/null)" ]; then \
	  echo "installing flaxtransfer[$*] into $(VENV)"; \
	  PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN)python -m pip install --quiet --no-compile \
	    -c constraints.txt -e '.[$*]' \
	  && printf '%s\n' "$$want" > $(VENV)/.installed-$*; \
	fi
