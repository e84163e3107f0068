# make help lists the targets. Everything happens in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
RUN := $(BIN)/python
# with uv the packages of locks/ are installed, each file compared with its hash; pip takes the same versions from constraints.txt
UV := $(shell command -v uv 2>/dev/null)
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
UV_INSTALL := $(UV) pip install --quiet --python $(RUN)
# $(call install,docs): the extra dev, and another one
install = $(if $(UV),$(UV_INSTALL) --require-hashes $(patsubst %,-r locks/%.txt,$(sort dev $(1))) && \
  $(UV_INSTALL) --no-deps --no-build-isolation -e .,$(PIP_INSTALL) -e '.[$(1)]')
PROFILE ?= smoke
SEEDS ?= 1
REPRODUCE := $(RUN) -m vitscope reproduce
# empty settings are left out; OVERRIDES='optimizer.lr=1e-3 trainer.max_epochs=5' holds for every run, SLURM='partition=gpu time=600'
REPRODUCED = profile=$(PROFILE) seeds=$(SEEDS) $(if $(FROM),from=$(FROM)) $(if $(EXPORT),export=$(EXPORT)) $(if $(GPUS),gpus=$(GPUS)) $(if $(JOBS),jobs=$(JOBS)) \
  $(if $(OVERRIDES),overrides='$(OVERRIDES)') $(if $(DRY),dry=$(DRY)) $(if $(LAUNCHER),launcher=$(LAUNCHER)) \
  $(addprefix slurm.,$(SLURM))
FIGURES := $(addprefix fig,1 2 3 4 5 6 7 8 9 10 11 12 B C1 C2 C3 C4 C5 C6 C7 D1 D2 D3 D4 E F1 F2)
QUESTIONS := landscape-objective msa-placement baselines sam sharpness-gap
TABLES := table-models table-curvature table-robustness table-buildup table-claims
PYTEST ?= $(BIN)/pytest
# two worker processes of one thread each: tests of small networks gain nothing from more threads
PARALLEL ?= -n 2 --dist worksteal
FUZZ ?= 1000
BENCH ?= hessian landscape representation attention training data report sweep startup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-newest test-oldest test-extras gpu-check lint format bench fuzz soak doctor clean reproduce reproduce-cost wandb-report $(QUESTIONS) $(TABLES) sweep sweep-local docs docs-figures locks notebooks

help: ## list the targets
	@grep -hE '^[a-zA-Z0-9_%-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-24s %s\n", $$1, $$2}'
	@echo
	@echo "reproduce makes all of these; each is a target with the same settings:"
	@printf '  %s\n' "$(wordlist 1,16,$(FIGURES))" "$(wordlist 17,99,$(FIGURES))" "$(TABLES)" "$(QUESTIONS)"
	@echo "settings: PROFILE=smoke|cifar10_small|cifar10|cifar100|imagenet SEEDS=5 GPUS=0,1 or JOBS=2 OVERRIDES='optimizer.lr=1e-3'"
	@echo "  SEEDS=5-8 (these seeds) EXPORT=results/x (write the numbers as JSON) FROM=results/x,results/y (draw from them)"
	@echo "  DRY=1 (list runs, hours and disk) LAUNCHER=slurm SLURM='partition=gpu time=1440'"

$(SETUP): pyproject.toml constraints.txt locks/dev.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch and its CUDA libraries are several GB; once)"
	@$(call install,dev)
	@touch $@

setup: $(SETUP) ## create .venv and install what was tested, with uv where there is one

demo: $(SETUP) ## the main job: train an AlterNet on photographs, diagnose it, minutes on two cores
	$(RUN) train.py model=alternet

test: $(SETUP) ## the tests that CI runs
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL)

test-slow: $(SETUP) ## the longer tests too
	$(PYTEST) -m 'slow or not slow'

# the newest versions that pyproject.toml allows, on the newest Python of this machine, then Hydra's release candidate
NEWEST := .venv-newest
NEWEST_PYTHON ?= $(firstword $(shell for v in 14 13 12 11; do \
  python3.$$v -c 'import sys; print(sys.executable)' 2>/dev/null; done) $(PYTHON))
NEWEST_RUN := $(NEWEST)/bin/python
NEWEST_PIP := $(NEWEST_RUN) -m pip --disable-pip-version-check
NEWEST_TESTS := $(NEWEST_RUN) -m pytest -n 0 -p no:cacheprovider tests/contracts
NEWEST_TRAINING := $(NEWEST_RUN) train.py model=vit model.depth=1 model.patch_size=8 data=digits caps=smoke logger=none
CANDIDATE := $(NEWEST)/hydra-candidate

test-newest: ## contract tests and a smoke training with the newest allowed versions (NEWEST_PYTHON=python3.13)
	@test -x $(NEWEST_RUN) || $(NEWEST_PYTHON) -m venv $(NEWEST)
	@echo "installing into $(NEWEST) (torch and its CUDA libraries are several GB; once)"
	$(NEWEST_PIP) install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	$(NEWEST_RUN) -VV
	$(NEWEST_PIP) list | grep -E '^(torch|torchvision|pytorch-lightning|hydra-core|omegaconf|timm|wandb|numpy) '
	OMP_NUM_THREADS=1 $(NEWEST_TESTS)
	$(NEWEST_TRAINING) paths.runs=$(NEWEST)/runs
	$(NEWEST_PIP) install --quiet --upgrade --target $(CANDIDATE) 'hydra-core>=1.4.0rc1,<1.5'
	PYTHONPATH=$(CANDIDATE) $(NEWEST_RUN) -c 'import hydra, omegaconf; print(hydra.__version__, omegaconf.__version__)'
	OMP_NUM_THREADS=1 PYTHONPATH=$(CANDIDATE) $(NEWEST_TESTS)/test_hydra.py
	PYTHONPATH=$(CANDIDATE) $(NEWEST_TRAINING) paths.runs=$(NEWEST)/runs

# the oldest versions that pyproject.toml allows; what they are built on is newer, and warns about how it is called
OLDEST := .venv-oldest
OLDEST_RUN := $(OLDEST)/bin/python

test-oldest: ## the tests with the oldest allowed versions, which uv chooses
	@test -x $(OLDEST_RUN) || $(PYTHON) -m venv $(OLDEST)
	@echo "installing into $(OLDEST) (torch and its CUDA libraries are several GB; once)"
	$(OLDEST_RUN) -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST_RUN) --resolution lowest-direct -e '.[dev]'
	OMP_NUM_THREADS=1 $(OLDEST_RUN) -m pytest -p no:cacheprovider -o filterwarnings=default $(PARALLEL)

test-extras: ## install each optional extra into a fresh environment and use it (EXTRAS='optuna joblib')
	$(PYTHON) .ci/check_extras.py .venv-extras $(EXTRAS)

gpu-check: $(SETUP) ## on one CUDA GPU, 25 minutes: the tests marked gpu, then the figures of the card (installs .[bench])
	@$(RUN) benchmarks/gpu.py --only-check
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(PYTEST) -m gpu tests/gpu
	$(RUN) benchmarks/gpu.py

lint: $(SETUP) ## ruff, pyright and the check of names and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(RUN) .ci/check_style.py

format: $(SETUP) ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reproduce: $(SETUP) ## every figure and table, and the page (PROFILE=smoke|cifar10|cifar100|imagenet SEEDS=1 GPUS=0,1 JOBS=2 DRY=1)
	$(REPRODUCE) all $(REPRODUCED)

reproduce-cost: DRY := 1
reproduce-cost: $(SETUP) ## only list the runs, hours and disk space of `make reproduce` with the same settings
	$(REPRODUCE) all $(REPRODUCED)

$(QUESTIONS): $(SETUP)
	$(REPRODUCE) $@ $(REPRODUCED)

$(TABLES): $(SETUP)
	$(REPRODUCE) $@ $(REPRODUCED)

fig%: $(SETUP) ## one figure with all its parts: fig1 to fig12, figB, figC1 to figC7, figD1 to figD4, figE, figF1, figF2
	$(REPRODUCE) $@ $(REPRODUCED)

table-%: $(SETUP) ## one table: models, curvature, robustness, buildup, claims (train and measure what is missing)
	$(REPRODUCE) $@ $(REPRODUCED)

# empty settings are left out; OVERRIDES="caps=smoke trainer.max_epochs=5" holds for every trial
SWEEP_OPTIONS = $(if $(GPUS),gpus=$(GPUS)) $(if $(JOBS),jobs=$(JOBS)) $(if $(LIMIT),limit=$(LIMIT)) \
  $(if $(PROFILE),profile=$(PROFILE)) $(if $(DRY),dry=$(DRY)) $(OVERRIDES)

sweep-local: $(SETUP) ## a sweep on this machine, no server (SWEEP=sweeps/x.yaml GPUS=0,1 or JOBS=2, LIMIT=n PROFILE=smoke DRY=1)
	@$(RUN) -m vitscope sweep $(SWEEP) $(SWEEP_OPTIONS)

sweep: $(SETUP) ## a W&B sweep, one agent a GPU (SWEEP=sweeps/x.yaml GPUS=0,1 SWEEP_ID=to-go-on PROFILE=smoke)
	@$(RUN) -m vitscope sweep $(SWEEP) server=true $(if $(SWEEP_ID),sweep_id=$(SWEEP_ID)) $(SWEEP_OPTIONS)

wandb-report: $(SETUP) ## a W&B report and a workspace of runs (RUNS=runs FIGURES_FROM=figures TITLE=name SPEC=report.json; installs .[report])
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report]'
	@$(RUN) -m vitscope wandb-report $(if $(RUNS),runs=$(RUNS)) $(if $(FIGURES_FROM),figures=$(FIGURES_FROM)) \
	  $(if $(TITLE),title='$(TITLE)') $(if $(ENTITY),entity=$(ENTITY)) $(if $(PROJECT),project=$(PROJECT)) $(if $(SPEC),spec=$(SPEC))

bench: $(SETUP) ## every claim about speed, its peers in the same run (installs .[bench]; BENCH=hessian for one)
	@$(call install,bench)
	@for name in $(BENCH); do echo "== $$name"; $(RUN) benchmarks/$$name.py || exit $$?; done

fuzz: $(SETUP) ## random input against every guard, a thousand cases each (FUZZ=1000); kills at random moments
	FUZZ=$(FUZZ) $(PYTEST) -m 'slow or not slow' tests/config/test_fuzz.py tests/runs/checkpoints/test_checkpoint_io.py tests/training/test_survival.py \
	  tests/data/test_loader.py tests/cli/test_kill_points.py

soak: $(SETUP) ## a million rows, 50 killed saves of 300 MB, 8 writers, 2,000 steps, 200 runs: prints figures
	$(RUN) benchmarks/soak.py

docs: $(SETUP) ## the documentation site in build/site, which opens from disk (installs .[docs])
	@$(call install,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

docs-figures: $(SETUP) ## draw the figures of the diagnostics' pages that are missing (FIGURES_OF='cka fourier' draws these again)
	$(RUN) docs/scripts/draw_figures.py $(if $(FIGURES_OF),$(FIGURES_OF),--missing)

notebooks: $(SETUP) ## run the tutorials and the notebook as they stand, with small data
	$(PYTEST) -m slow tests/cli/test_tutorials.py

locks: ## write locks/ from pyproject.toml and constraints.txt (needs uv)
	$(PYTHON) .ci/make_locks.py $(UV)

doctor: $(SETUP) ## what works on this machine
	@$(RUN) -m vitscope doctor

clean: ## remove caches, not runs
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
