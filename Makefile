# make demo    the main job on a real MRI volume: routes compared, a small network trained
# make test    lint, types and every test; what CI runs
# make bench   what an operation, a layer, a network costs here, by pytest-benchmark; a table and bench-out/benchmarks.json
# make fuzz    random calls and networks against PyTorch until MINUTES are over, or the one round of SEED again
# make audit   the kernels' bytes, registers and vector widths, without a GPU
# Each makes .venv if it is missing, with the versions pinned in .ci/constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
# nnU-Net's networks, for the tests. It asks for timm, and so for torchvision, which only networks left out here import.
NO_DEPS := dynamic-network-architectures
OLD_TRITON := .venv/triton-3.6

.PHONY: demo test bench bench-smoke lint fuzz audit clean

demo: .venv/installed
	$(BIN)/python -m fastenc demo $(ARGS)

test: lint $(OLD_TRITON)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest -n auto tests/test_compile.py
	$(MAKE) bench-smoke

# Save a run by ARGS=--benchmark-autosave, compare another commit with it by ARGS=--benchmark-compare.
bench: .venv/installed
	mkdir -p bench-out
	$(BIN)/python -m pytest bench/bench_*.py --benchmark-sort=min --benchmark-columns=median,iqr,min,max,rounds \
		--benchmark-json=bench-out/benchmarks.json $(ARGS)

# Each benchmark once, untimed.
bench-smoke: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --benchmark-disable bench/bench_*.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

MINUTES ?= 5
fuzz: .venv/installed
	$(BIN)/python tests/fuzz.py $(if $(SEED),--seed $(SEED),--minutes $(MINUTES))

audit: .venv/installed
	$(BIN)/python -m fastenc.bench audit $(ARGS)

.venv/installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	$(INSTALL) --no-deps $(NO_DEPS)
	touch $@

# The oldest triton supported, and a numpy that its interpreter works with, laid over the same environment.
$(OLD_TRITON)/installed: .venv/installed
	rm -rf $(OLD_TRITON)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD_TRITON) triton==3.6.0 numpy==2.3.5
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
