PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v) 2>/dev/null)) python3.11)
VENV := .venv
GPU_VENV := .venv-gpu
QUICK ?= # 1: `make paper` in minutes, with fewer seeds and steps
VLLM ?= # another build of vllm than the one from the package index: a wheel's file or URL

train: $(VENV)/installed
	$(VENV)/bin/python train.py

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

# The paper's analyses in small, and a page of them: paper/index.html. QUICK=1 takes 10 minutes instead of 76.
paper: $(VENV)/installed
	$(VENV)/bin/python -m lab.paper $(if $(filter-out 0,$(QUICK)),--quick)

# vLLM, LoRA and 8-bit Adam: an environment of its own beside the small one.
gpu: $(GPU_VENV)/installed

test-gpu: $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python -m pytest -n 0 tests/test_vllm.py

# Made again only when the requirements change.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(GPU_VENV)/installed: requirements.txt requirements-gpu.txt
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-gpu.txt $(VLLM)
	touch $@

.PHONY: train test paper gpu test-gpu
