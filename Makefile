PYTHON ?= python3.11
VENV := .venv

train: $(VENV)/installed
	$(VENV)/bin/python train.py

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

# Made again only when the requirements change.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: train test
