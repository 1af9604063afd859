# make demo | test | bench | figures | gpu | fix     everything runs in .venv, which is made on first use
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST_TRITON := triton==3.6.0
NEWEST_TRANSFORMERS := transformers==5.24.0  # with which PEFT does not generate yet: tests of parity need an older one
TORCH := torch==2.13.0  # pinned for development: a bare "torch" may pull gigabytes of CUDA libraries

.PHONY: demo test lint types bench figures gpu fix clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/oldest-triton: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps --target $@ $(OLDEST_TRITON)

$(VENV)/newest-transformers: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps --target $@ $(NEWEST_TRANSFORMERS)

demo: $(VENV)/ready  ## six prefix-tuned tasks, one frozen model, one mixed batch
	$(BIN)/prefix-attn demo

test: lint types $(VENV)/oldest-triton $(VENV)/newest-transformers  ## lint, type-check, compile every kernel for four GPUs, run all tests
	$(BIN)/python -m benchmarks.compile_report --quick --check
	PYTHONPATH=$(VENV)/oldest-triton $(BIN)/python -m benchmarks.compile_report --quick
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile
	PYTHONPATH=$(VENV)/newest-transformers $(BIN)/python -m pytest --numprocesses auto --dist loadfile tests/hf tests/bank tests/training tests/serving

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

bench: $(VENV)/ready  ## a few points of every benchmark, in two minutes; `prefix-attn bench --help` for more
	$(BIN)/prefix-attn bench all --quick

figures: $(VENV)/ready  ## from the newest results of each device, into benchmarks/figures
	$(BIN)/prefix-attn bench plot

gpu:  ## on a machine with an NVIDIA GPU: tests, parity and timings with the torch and Triton it has
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) $(if $(COMMIT),--commit $(COMMIT))

fix: $(VENV)/ready  ## what a formatter can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
