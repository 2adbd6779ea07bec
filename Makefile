# Every target sets up what it needs; only Python 3.11 or newer has to be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-gpu test-oldest native sanitize lint format docs gpt2-mini clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)  ## convert the bundled model, compare it with the dense one, open it in a new process
	$(BIN)/d2dmoe convert --model checkpoints/gpt2-mini --active 0.25,0.5,0.75 --overwrite
	$(BIN)/python recipes/gpt2_mini/generate.py checkpoints/gpt2-mini-d2dmoe

test: $(READY)  ## the default tests: no network, no GPU, no data folder needed
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(READY)  ## minutes each; some need the data folder (D2DMOE_DATA)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)  ## what only a GPU can show; skips without one
	$(BIN)/python -m pytest -m gpu

test-oldest: $(READY)  ## the loader against the oldest supported transformers
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet -c constraints.txt torch accelerate datasets peft pytest pytest-timeout \
		pytest-xdist hypothesis scikit-learn pyyaml pillow
	$(VENV)-oldest/bin/python -m pip install --quiet "transformers==5.17.0"
	$(VENV)-oldest/bin/python -m pip install --quiet --no-deps -e .
	$(VENV)-oldest/bin/python -m pytest -n auto --dist worksteal \
		tests/moe/test_loader.py tests/discovery/test_architectures.py tests/cli/test_cli.py

native: $(READY)  ## build the CPU kernels again after a change, and say so if that fails
	D2DMOE_NATIVE=1 $(BIN)/python setup.py -q build_ext --inplace

SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(READY)  ## the operator tests with the CPU kernels under AddressSanitizer and UBSan
	D2DMOE_NATIVE=1 D2DMOE_CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --build-lib build/sanitize
	D2DMOE_LIBRARY=$(CURDIR)/build/sanitize/d2dmoe/kernels/cpu/libd2dmoe.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest tests/kernels/test_operator.py tests/kernels/test_few_tokens.py tests/kernels/test_int8.py \
		tests/kernels/test_linear.py -k "not compiled and not registered"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

DOCS := $(VENV)/.docs
$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: $(DOCS)  ## the guides as a site in build/site; a broken link fails
	$(BIN)/mkdocs build --strict

gpt2-mini: $(READY)  ## train the bundled model again (about half an hour on 2 cores; needs the data folder)
	$(BIN)/python recipes/gpt2_mini/train.py --compile

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info
