# Every target sets up what it needs; only Python 3.11 or newer has to be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-gpu test-oldest lint format gpt2-mini clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)  ## convert the bundled model, compare it with the dense one, open it in a new process
	$(BIN)/d2dmoe convert --model checkpoints/gpt2-mini --active 0.25,0.5,0.75 --overwrite
	$(BIN)/python recipes/gpt2_mini/generate.py checkpoints/gpt2-mini-d2dmoe

test: $(READY)  ## the default tests: no network, no GPU, no data folder needed
	$(BIN)/python -m pytest

test-slow: $(READY)  ## minutes each; some need the data folder (D2DMOE_DATA)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

test-oldest: $(READY)  ## the loader against the oldest supported transformers
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet -c constraints.txt torch accelerate datasets peft pytest pytest-timeout \
		hypothesis scikit-learn pyyaml pillow
	$(VENV)-oldest/bin/python -m pip install --quiet "transformers==5.17.0"
	$(VENV)-oldest/bin/python -m pip install --quiet --no-deps -e .
	$(VENV)-oldest/bin/python -m pytest tests/test_loader.py tests/test_architectures.py tests/test_cli.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpt2-mini: $(READY)  ## train the bundled model again (about half an hour on 2 cores; needs the data folder)
	$(BIN)/python recipes/gpt2_mini/train.py --compile

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info
