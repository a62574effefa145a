# What CI does and what it does not, one target each. PYTHON chooses the environment.
PYTHON ?= python
# Kernels run on one core at a time without a GPU; threads only get in each other's way.
export OMP_NUM_THREADS ?= 1
# A Triton driver that executes compiled code on CPU tensors, as MODULE:CONTEXTMANAGER; see CONTRIBUTING.md.
DRIVER ?=
EMULATED ?= 80 86 89 90
GENERATIONS = 80 86 89 90 100 120
# Emulated outranks sanitized, so only the other generations need it.
SANITIZED ?= $(if $(DRIVER),$(filter-out $(EMULATED),$(GENERATIONS)),$(GENERATIONS))

.PHONY: check lint test slow sanitize nightly mutants matrix matrix-quick evidence executed table dropin host-cost bench bench-once

check: lint test
	$(PYTHON) -m vit_bench.support_table --check
	$(PYTHON) -m vit_bench.dropin_table --check

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright
	$(PYTHON) -m codespell_lib

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

# The numerical tests under ttsem: bounds, races, reads of memory that nobody wrote, exact bfloat16.
sanitize:
	$(PYTHON) -m ttsem.sanitize pytest -m sanitize

# The property tests with 500 random examples of each property.
nightly:
	$(PYTHON) -m pytest tests/properties --hypothesis-profile nightly

# Every named fault and 240 generated ones, one at a time, against the default tests: out/mutants.json and .md.
mutants:
	$(PYTHON) -m tests.mutants.run --named --count 240 --seed 0 --workers 2 --out out/mutants.json

# Every kernel as every preset launches it, for every GPU generation and dtype.
matrix:
	$(PYTHON) -m vit_bench.compile_matrix --json out/matrix.json --table out/matrix.md \
	    --evidence bench/evidence/compiled.json

# All of sm_90, and a pairwise sample of the other generations.
matrix-quick:
	$(PYTHON) -m vit_bench.compile_matrix --quick --json out/matrix.json --table out/matrix.md

# What a machine without a GPU can show, written down, and the README's table from it.
evidence: matrix
	TRITON_INTERPRET=1 $(PYTHON) -m vit_bench.evidence interpreted --out bench/evidence/interpreted.json
	$(PYTHON) -m vit_bench.evidence sanitized --capability $(SANITIZED) --out bench/evidence/sanitized.json
	$(if $(DRIVER),$(PYTHON) -m vit_bench.evidence emulated --driver $(DRIVER) --capability $(EMULATED) \
	    --out bench/evidence/emulated.json)
	$(MAKE) table

# On a machine with a GPU.
executed:
	$(PYTHON) -m vit_bench.evidence executed --workers $(shell nproc) --out bench/evidence/executed.json
	$(MAKE) table

table:
	$(PYTHON) -m vit_bench.support_table
	$(PYTHON) -m vit_bench.dropin_table

# Every family of models that accelerate() takes: compared, counted, compiled for six generations; then its table.
dropin:
	$(PYTHON) -m vit_bench.dropin_table measure $(if $(DRIVER),--driver $(DRIVER))

# Host time of a forward pass beside eager's dispatch; no GPU needed.
host-cost:
	$(PYTHON) -m vit_bench.host_cost

# The table of shapes under pytest-benchmark; `vit-engine bench` compares with every baseline that is installed.
bench:
	$(PYTHON) -m pytest bench --benchmark-only

# Each of its cases once, without timing: on a CPU those that one can be given.
bench-once:
	$(PYTHON) -m pytest bench --benchmark-disable
