# Everything runs in .venv. RUNTIME holds what the package needs to run and to serve; STAMP adds what tests and linters need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
STAMP := $(VENV)/.installed-dev
.DEFAULT_GOAL := help

.PHONY: help demo test slow-test ptx-test lint docs linkcheck bench bench-serve soak ray-test wheel-test gpu-test gpu-bench gpu-trt gpu-model gpu-e2e marks few-step-marks evaluation ablations clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: resolved together with the rest, pip would weigh other builds of it.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

$(STAMP): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,serve]'
	# Without what it asks for: that is torchvision, which has no build for a torch without CUDA.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps lpips
	touch $@

demo: $(RUNTIME) ## install the runtime (2.2 GB) and run the demo: 2 minutes on 2 cores, more with a slow download
	$(BIN)/slideredit-rt demo --out demo

# A file's tests stay in one process: they share what is slow to make. tests/conftest.py orders the files.
test: $(STAMP) ## install the development tools and run the tests: 20 to 25 minutes on 2 cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slow-test: $(STAMP) ## run the tests marked slow: long, and 4 GiB of free disk
	$(BIN)/python -m pytest -m slow -s

ptx-test: $(STAMP) ## run the PTX of every kernel on the CPU, for five targets: special values, missing barriers
	$(BIN)/python -m pytest -m slow -s tests/test_ptx_exhaustive.py

lint: $(STAMP) ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# A plain install: mypy cannot follow the folders that an editable one maps into the package.
	rm -rf build && $(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy
	MYPYPATH=build/typecheck $(BIN)/mypy tests bench/test_*.py

$(VENV)/.docs: $(RUNTIME)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# Writes build/docs/index.html. A link, an anchor or a name that leads nowhere is an error.
docs: $(VENV)/.docs ## build the documentation site into build/docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs

# Asks every site that the pages link to: needs a network.
linkcheck: $(VENV)/.docs ## check external links; needs a network
	$(BIN)/python -m sphinx -W --keep-going -q -b linkcheck -d build/doctrees docs build/linkcheck

bench: $(STAMP) ## time an engine step on the CPU beside eager torch
	$(BIN)/python -m pytest bench -o addopts=-q --benchmark-columns=median,iqr,rounds

# Some minutes of both cores; writes bench/results/serving.json and .md.
bench-serve: $(STAMP) ## compare servers under load: some minutes of both cores
	$(BIN)/python -m slideredit_rt.bench.serving_marks $(BENCH_OPTIONS)

soak: $(STAMP) ## send a server 10,000 requests, many of them malformed, slow or cancelled
	$(BIN)/python -m pytest -m slow -s tests/test_soak.py

ray-test: $(STAMP) ## install Ray and test two replicas, one of which is killed under load
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -m slow -s tests/test_ray.py tests/test_deploy.py

wheel-test: $(STAMP) ## install the wheel into an empty environment and run the demo there
	$(BIN)/python -m pytest -m slow -s tests/test_wheel.py

marks: $(STAMP) ## measure the quality of the embedded editor's sliders
	$(BIN)/python -m slideredit_rt.bench.marks

few-step-marks: $(STAMP) ## measure edits in few steps with the shapes editor's few-step LoRA
	$(BIN)/python -m slideredit_rt.bench.few_step_marks $(BENCH_OPTIONS)

# Both continue a killed run; delete the folder to start anew.
EVALUATION := runs/evaluation
evaluation: $(STAMP) ## compare sliders with other ways to scale an edit, on held-out shapes and people: over an hour
	$(BIN)/slideredit-rt evaluate --adapter shapes-st --adapter shapes-gst --sliders 1,2,3 --scenes 64,24,8 --out $(EVALUATION)
	mkdir -p bench/results/evaluation
	cd $(EVALUATION) && cp rows.csv report.json table.md *.png $(CURDIR)/bench/results/evaluation/
	$(BIN)/slideredit-rt evaluate --adapter portraits-st --adapter portraits-gst --sliders 1,2,3 --scenes 64,24,8 --out $(EVALUATION)-portraits
	mkdir -p bench/results/evaluation-portraits
	cd $(EVALUATION)-portraits && cp rows.csv report.json table.md *.png $(CURDIR)/bench/results/evaluation-portraits/

ablations: $(STAMP) ## repeat the studies of training method, rank and calibration: hours
	$(BIN)/python -m slideredit_rt.bench.ablations --out runs/ablations

# The GPU targets install nothing: they run in a Python that has torch with CUDA, triton, numpy, pytest and hypothesis,
# on a copy of the package laid out as it would be installed.
GPU_PYTHON ?= $(PYTHON)
STAGE := build/stage
# Without the safe path, python -m would find the package's folder in the repository, which lacks kernels, export and bench.
ON_GPU = PYTHONSAFEPATH=1 PYTHONPATH=$(STAGE)$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON)

$(STAGE): FORCE
	rm -rf $@ && mkdir -p $@
	cp -r slideredit_rt $@/ && cp -r kernels export bench $@/slideredit_rt/

FORCE:

gpu-test: $(STAGE) ## test the kernels on a GPU, with a Python that has torch and triton
	$(ON_GPU) -m pytest --noconftest -rs -p no:cacheprovider tests/test_gpu.py tests/test_triton_kernels.py

gpu-bench: $(STAGE) ## time every form of a projection on a GPU
	$(ON_GPU) -m slideredit_rt.bench.gpu_kernels --out bench/results $(BENCH_OPTIONS)

# Needs slideredit-rt's own dependencies as well (diffusers, onnx, onnxruntime, …), and tensorrt or tensorrt-rtx.
gpu-trt: $(STAGE) ## build, run and time TensorRT engines on a GPU
	$(ON_GPU) -m slideredit_rt.bench.gpu_tensorrt --out bench/results $(BENCH_OPTIONS)

# Needs slideredit-rt's own dependencies as well; a GPU of 48 GB for FLUX, of 24 GB with
# BENCH_OPTIONS="--family flux2_klein_4b", of 80 GB with "--family qwen_image_edit".
gpu-model: $(STAGE) ## time a full-size transformer with random weights on a GPU
	$(ON_GPU) -m slideredit_rt.bench.gpu_model --out bench/results $(BENCH_OPTIONS)

# A GPU of 48 GB for FLUX and FLUX.2-klein 9B, of 24 GB for 4B, such as BENCH_OPTIONS="--family flux2_klein_4b_kv", of 80 GB with
# qwen_image_edit or qwen_image_edit_plus.
gpu-e2e: $(STAGE) ## time whole edits on a GPU beside diffusers with PEFT
	$(ON_GPU) -m slideredit_rt.bench.gpu_e2e --out bench/results $(BENCH_OPTIONS)

clean: ## remove .venv, demo and build
	rm -rf $(VENV) demo build *.egg-info
