# make demo      the main job on a real MRI volume: routes compared, a small network trained
# make test      lint, types and every test; what CI runs
# make bench     what an operation, a layer, a network costs here, by pytest-benchmark; a table and bench-out/benchmarks.json
# make coverage  every test, and the lines that none of them reaches; fails under 95 % of fastenc/ and kernels/
# make fuzz      random calls and networks against PyTorch until MINUTES are over, or the one round of SEED again
# make mutants   the product broken one line at a time: which test catches it
# make nnunet    fastenc's trainer inside nnU-Net itself, from its planning to its prediction, on a CPU
# make audit     the kernels' bytes, registers and vector widths, without a GPU
# make sanitize  on a GPU: compute-sanitizer's memcheck and racecheck over the kernels
# make rehearsal the first run on a GPU machine, rehearsed without a GPU; takes several GB, in .venv/rehearsal
# make lock      after a change of .ci/constraints.txt: the hashes of all that it pins
# Each but the last two makes .venv if it is missing: the files whose hashes stand in .ci/requirements.txt, and no others.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Wheels alone: a source package would fetch what builds it unchecked. No dependencies: the list is complete, and one of
# them is not wanted: dynamic-network-architectures asks for timm, and so for torchvision, which nothing here imports.
HASHED := $(INSTALL) --require-hashes --only-binary :all: --no-deps
OLD_TRITON := .venv/triton-3.6
NNUNET := .venv/nnunet-2.8.1

.PHONY: demo test bench bench-smoke coverage fuzz mutants nnunet lint audit sanitize rehearsal lock clean

demo: .venv/installed
	$(BIN)/python -m fastenc demo $(ARGS)

test: lint $(OLD_TRITON)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest -n auto tests/proofs/test_compile.py
	$(MAKE) bench-smoke

# Save a run by ARGS=--benchmark-autosave, compare another commit with it by ARGS=--benchmark-compare.
bench: .venv/installed
	mkdir -p bench-out
	$(BIN)/python -m pytest bench/suites/bench_*.py --benchmark-sort=min --benchmark-columns=median,iqr,min,max,rounds \
		--benchmark-json=bench-out/benchmarks.json $(ARGS)

# Each benchmark once, untimed.
bench-smoke: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --benchmark-disable bench/suites/bench_*.py

coverage: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

mutants: .venv/installed
	$(BIN)/python tests/tools/mutants.py $(ARGS)

nnunet: $(NNUNET)/installed
	nnUNet_def_n_proc=1 PYTHONPATH=$(NNUNET) $(BIN)/python -m pytest -q tests/nnunet $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

MINUTES ?= 5
fuzz: .venv/installed
	$(BIN)/python tests/tools/fuzz.py $(if $(SEED),--seed $(SEED),--minutes $(MINUTES))

audit: .venv/installed
	$(BIN)/python -m fastenc.bench audit $(ARGS)

# torch's CPU-only build where pip is offered it, else the index's. The last line finds all that it asks for in place, but
# for the CUDA libraries that the index's torch pins by itself.
.venv/installed: pyproject.toml .ci/requirements.txt .ci/torch-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(HASHED) -r .ci/torch-cpu.txt 2>/dev/null || true
	$(HASHED) -r .ci/requirements.txt
	$(INSTALL) -c .ci/constraints.txt --no-warn-conflicts --no-build-isolation --editable '.[dev]'
	touch $@

# The oldest triton supported, laid over the same environment.
$(OLD_TRITON)/installed: .venv/installed .ci/triton-3.6.txt
	rm -rf $(OLD_TRITON)
	$(HASHED) --target $(OLD_TRITON) -r .ci/triton-3.6.txt
	touch $@

# What of nnU-Net a training on a CPU imports, laid over the same environment. acvl-utils comes as source alone, which the
# environment's setuptools builds.
$(NNUNET)/installed: .venv/installed .ci/nnunet.txt
	rm -rf $(NNUNET)
	$(HASHED) --no-binary acvl-utils --no-build-isolation --target $(NNUNET) -r .ci/nnunet.txt
	touch $@

# Each kernel in each dtype and layout. Without PyTorch's cache every tensor is an allocation of its own, so that an access
# past its end is seen. Only our kernels are checked, and no failed CUDA call: torch asks by such calls what a driver can.
SANITIZED := test_forward_and_backward and (1x3x7- or 3x64x120- or 2x24x29760- or 1x1x35937-)
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --kernel-name kns=forward_ \
	--kernel-name kns=backward_
sanitize: .venv/installed
	$(SANITIZE) --tool memcheck --report-api-errors no $(BIN)/python -m pytest -q tests/gpu/test_gpu_op.py -k '$(SANITIZED)'
	$(SANITIZE) --tool racecheck $(BIN)/python -m pytest -q tests/gpu/test_gpu_op.py -k '$(SANITIZED)'

rehearsal:
	$(PYTHON) tests/tools/rehearsal.py $(ARGS)

lock:
	.ci/lock

clean:
	rm -rf .venv .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
