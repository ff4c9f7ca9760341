# `make run` and `make test` do everything on a fresh machine; the environment is set up when it is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help run test browser machines train lint results card readme clean

help:
	@echo "make run      run the notebook top to bottom, into runs/ (EPOCHS=N: another length; RESUME=runs/NAME: go on)"
	@echo "make test     run the tests"
	@echo "make browser  run the notebook in JupyterLab, in Chromium, with screenshots in runs/browser/"
	@echo "make machines train on two simulated machines under fault injection (ONLY='names of disturbances')"
	@echo "make train    train from the command line with the default settings (EPOCHS=N)"
	@echo "make lint     check style, formatting and types"
	@echo "make results  take finished runs of the default settings from runs/ into results/, then make readme"
	@echo "make card     measure trained weights (RUN='runs/A runs/B' SIBLING=runs/OTHER), then make readme"
	@echo "make readme   write saved numbers and pictures into the pages and the notebook"
	@echo "make clean    delete the environment and caches; runs/ and data/ stay"

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

# CIFAR-10 out of reach (status 3) gives way to synthetic images; damaged, it stops the run. With `exec`, make waits
# after Ctrl-C until the run is saved.
run: $(READY)
	@$(BIN)/python -m machinery.data; status=$$?; set -- $(if $(EPOCHS),-p epochs $(EPOCHS)); \
	if [ $$status = 3 ]; then \
		echo "CIFAR-10 is out of reach: running on synthetic images instead."; \
		set -- -p data synthetic -p epochs $(or $(EPOCHS),2); \
	elif [ $$status != 0 ]; then exit $$status; fi; \
	$(BIN)/python -m benchmarks.how_long "$$@"; \
	exec $(BIN)/python -m machinery.notebook S9_Final.ipynb runs/S9_Final.ipynb "$$@" $(if $(RESUME),-p resume $(RESUME))

test: $(READY)
	$(BIN)/python -m pytest

browser: $(READY)
	$(BIN)/python -m pytest -m browser

machines: $(READY)
	$(BIN)/python benchmarks/machines.py $(if $(ONLY),--once --only $(ONLY))

train: $(READY)
	$(BIN)/python train.py $(if $(EPOCHS),--epochs $(EPOCHS))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

results: $(READY)
	$(BIN)/python benchmarks/publish.py --take

card: $(READY)
	$(BIN)/python benchmarks/card.py $(if $(RUN),--run $(RUN)) $(if $(SIBLING),--sibling $(SIBLING))
	$(MAKE) readme

readme: $(READY)
	$(BIN)/python benchmarks/publish.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache __pycache__ */__pycache__ */*/__pycache__
