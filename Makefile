# `make run` and `make test` do everything on a fresh machine; the environment is set up when it is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EPOCHS ?=
PARAMETERS := $(if $(EPOCHS),-p epochs $(EPOCHS))

.PHONY: help run test browser train lint results card readme clean

help:
	@echo "make run     run the notebook top to bottom, into runs/ (EPOCHS=N for another length)"
	@echo "make test    run the tests"
	@echo "make browser run the notebook in JupyterLab, in Chromium, and keep screenshots in runs/browser/"
	@echo "make train   train from the command line with the default settings"
	@echo "make lint    check style, formatting and types"
	@echo "make results take finished runs of the default settings from runs/ into the repository, then make readme"
	@echo "make card    measure the trained weights (RUN=runs/NAME: those of that run, which then ship), then make readme"
	@echo "make readme  write saved numbers and pictures into the pages and the notebook"
	@echo "make clean   delete the environment and caches; runs/ and data/ stay"

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

# Out of reach (status 3), CIFAR-10 gives way to the drawn stand-in; damaged, it stops the run. The terminal gets a line
# per epoch; the bars, which only a person in front of the notebook can see, stay out of the saved one.
run: $(READY)
	@mkdir -p runs; $(BIN)/python -m machinery.data; status=$$?; parameters="$(PARAMETERS)"; \
	if [ $$status = 3 ]; then \
		echo; echo "CIFAR-10 is out of reach: running on the synthetic stand-in instead, 2 epochs."; \
		parameters="-p data synthetic -p epochs $(or $(EPOCHS),2)"; \
	elif [ $$status != 0 ]; then exit $$status; fi; \
	TQDM_DISABLE=1 $(BIN)/python -m papermill S9_Final.ipynb runs/S9_Final.ipynb --log-output --kernel python3 $$parameters && \
	$(BIN)/python -m nbconvert --log-level WARN --to html runs/S9_Final.ipynb && \
	echo "Look at runs/S9_Final.html, or open runs/S9_Final.ipynb."

test: $(READY)
	$(BIN)/python -m pytest

browser: $(READY)
	$(BIN)/python -m pytest -m browser

train: $(READY)
	$(BIN)/python train.py $(if $(EPOCHS),--epochs $(EPOCHS))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

results: $(READY)
	$(BIN)/python benchmarks/publish.py --take

card: $(READY)
	$(BIN)/python benchmarks/card.py $(if $(RUN),--run $(RUN))
	$(MAKE) readme

readme: $(READY)
	$(BIN)/python benchmarks/publish.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache __pycache__ */__pycache__
