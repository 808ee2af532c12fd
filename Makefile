# Each command sets up all it needs in .venv, once.
#   make demo        distil five experts on the bundled world and guide with them (no ComfyUI needed)
#   make test        all tests; those of the nodes run where a ComfyUI is at hand
#   make test-fast   the tests of the core without those that train, sample or measure: under a minute
#   make test-wide   every quantisation of every model, and every class of models, every image processor of transformers
#   make test-faults kill, fill disks and cut files off while things are made: 220 kills, in minutes
#   make fuzz        100,000 strange files and names for all that reads them: minutes
#   make soak        500 prompts through one ComfyUI, whose memory has to stay flat: eight minutes
#   make test-real   the tests with real pretrained networks: installs one, or takes the folder at PPAP_REAL
#   make test-frontend  open and run the workflows on ComfyUI's page in a browser: needs chromium, installs playwright
#   make test-versions  the tests of networks and experts with older releases of transformers and peft
#   make lint        ruff and mypy
#   make comfyui     start ComfyUI with this pack in it
#   make bench       the short table of the benchmark
#   make pictures    run every workflow at its full settings in ComfyUI, and make the pictures in docs of them
#   make screenshots  run every workflow on ComfyUI's page in a browser, and keep pictures of the pages in runs/screenshots
#   make drawings    draw the workflows of one story each and the blueprints again (needs a ComfyUI)
#   make help-pages  write the inputs and outputs of the nodes into their help pages, and their translations (needs a ComfyUI)
#   make sweep       ask every class of ComfyUI's models, and write their answers into docs/compatibility.md
#   make symbols     list what the pack uses of ComfyUI in tools/comfy_symbols.json, and say what of it this ComfyUI lacks
#   make archive     build the archive that the registry publishes, and print its size
# A ComfyUI is looked for at COMFYUI_PATH, then around this folder (ComfyUI/custom_nodes/<pack>), then in comfy-cli's default.

PYTHON ?= python3
BIN := .venv/bin
AROUND := $(patsubst %/main.py,%,$(wildcard $(abspath ../..)/main.py))
COMFYUI_PATH ?= $(or $(and $(wildcard ../../custom_nodes),$(AROUND)),$(patsubst %/main.py,%,$(wildcard $(HOME)/comfy/ComfyUI/main.py)))
export COMFYUI_PATH
NAME := $(notdir $(CURDIR))
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

VERSIONS := transformers-4.50.3 transformers-4.57.6 peft-0.18.0
VERSION_TESTS := $(patsubst %,tests/unit/test_%.py,releases loaders families labels missing_weights offline download experts \
	distill saved_work)

.PHONY: demo test test-fast test-wide test-faults fuzz soak test-real test-frontend test-versions lint comfyui bench pictures \
	screenshots drawings help-pages sweep symbols archive

demo: .venv/ready
	$(BIN)/ppap demo

bench: .venv/ready
	$(BIN)/ppap bench --quick

test: .venv/ready .venv/comfyui
	$(PYTEST)

test-fast: .venv/ready
	$(PYTEST) tests/unit -m "not slow and not wide and not faults"

test-wide: .venv/ready .venv/comfyui
	$(PYTEST) -m wide

test-faults: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/test_faults.py -m faults

fuzz: .venv/ready
	OMP_NUM_THREADS=1 PPAP_FUZZ=100000 $(BIN)/python -m pytest tests/unit/test_fuzz.py

soak: .venv/ready .venv/comfyui
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/comfy/soak.py -s

test-real: .venv/ready .venv/comfyui
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[real]"
	$(PYTEST) -m real

test-frontend: .venv/ready .venv/comfyui
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[frontend]"
	$(BIN)/python -m pytest tests/frontend -m frontend

test-versions: $(VERSIONS:%=.venv/versions/%)
	@for place in $^; do echo "With $${place##*/}"; PYTHONPATH=$$place $(PYTEST) $(VERSION_TESTS) || exit 1; done

# Packages that stand before those of .venv; pip says what in .venv would not go with them.
.venv/versions/transformers-%: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ transformers==$*

.venv/versions/peft-%: .venv/versions/transformers-4.57.6
	cp -r $< $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $@ peft==$*

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	@ln -sfn "$(CURDIR)" .venv/ppap_pack  # the pack as ComfyUI sees it, a package: its nodes import above their folder
	MYPYPATH=.venv $(BIN)/mypy -p ppap_pack.nodes.schemas

pictures: .venv/ready .venv/comfyui
	$(BIN)/python -m pytest tests/comfy/full_workflows.py
	$(BIN)/python -m tools.banner

screenshots: .venv/ready .venv/comfyui
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[frontend]"
	PPAP_SCREENSHOTS=runs/screenshots $(BIN)/python -m pytest tests/frontend -m frontend -k dropped

drawings: .venv/ready .venv/comfyui
	$(BIN)/python -m tools.workflows "$(COMFYUI_PATH)"
	$(BIN)/python -m tools.blueprints "$(COMFYUI_PATH)"

help-pages: .venv/ready .venv/comfyui
	$(BIN)/python -m tools.help_pages "$(COMFYUI_PATH)"
	$(BIN)/python -m tools.locales "$(COMFYUI_PATH)"

sweep: .venv/ready .venv/comfyui
	PPAP_REFRESH_SWEEP=1 $(BIN)/python -m pytest tests/comfy/test_every_class.py -m "wide or not wide"

symbols: .venv/ready .venv/comfyui
	$(BIN)/python -m tools.comfy_symbols "$(COMFYUI_PATH)"

archive: .venv/ready
	$(BIN)/python -m tools.archive

comfyui: .venv/ready .venv/comfyui
	@test -n "$(COMFYUI_PATH)" || { echo "No ComfyUI found: pip install comfy-cli && comfy install, or set COMFYUI_PATH to yours."; exit 1; }
	@test -e "$(COMFYUI_PATH)/custom_nodes/$(NAME)" || { ln -s "$(CURDIR)" "$(COMFYUI_PATH)/custom_nodes/$(NAME)" && \
		echo "Linked this pack into $(COMFYUI_PATH)/custom_nodes."; }
	cd "$(COMFYUI_PATH)" && "$(CURDIR)/$(BIN)/python" main.py \
		$(or $(ARGS),`"$(CURDIR)/$(BIN)/python" -c "import torch; print('' if torch.accelerator.is_available() else '--cpu')"`)

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; a few minutes, mostly downloading torch)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# What the ComfyUI at hand requires, with the torch of constraints.txt; made again for another ComfyUI.
.venv/comfyui: .venv/ready FORCE
	@if [ -z "$(COMFYUI_PATH)" ]; then echo "No ComfyUI at hand: the tests of the nodes will be skipped."; \
	elif [ "$$(cat $@ 2>/dev/null)" != "$(COMFYUI_PATH)" ]; then \
		echo "Installing what the ComfyUI at $(COMFYUI_PATH) requires"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r "$(COMFYUI_PATH)/requirements.txt" -c constraints.txt \
		&& echo "$(COMFYUI_PATH)" > $@; fi

FORCE:
