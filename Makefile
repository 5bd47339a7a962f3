# Needs Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
TORCH ?=
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
LAB_ARGS ?=
EXTRAS ?= metaworld,kitchen,atari,smax,crafter,llm,slurm,dev
WORKERS ?= $(CORES)
MINUTES ?= 8

PAPER := prompt_tuning_dt
# `reproduce` tunes policies that ship: those of five seeds and two families. Without them it trains small ones.
SHIPPED := $(wildcard $(foreach f,cheetah-dir cheetah-vel,data/policies/$(f).prompt-dt-*.s[01234].safetensors))
SCALE ?= $(if $(word 10,$(SHIPPED)),desk,laptop)
WHOLE ?=
FRESH ?=
STORY := $(if $(WHOLE),--exhibit table1 --exhibit fig3,--exhibit story --exhibit story_bars)
EXHIBITS ?= $(if $(filter desk,$(SCALE)),$(STORY),--exhibit table1 --exhibit fig3 --exhibit fig5 --exhibit pdt_fig2)
READY := .venv/.ready
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: reproduce test test-all lint fix lab gpu docs readme readme-text clean help

reproduce: $(READY) ## the story of Prompt-Tuning DT's Table 1 from policies that ship, then: does it agree with the shipped numbers?
ifeq ($(SCALE),laptop)
	@echo "No policies of desk scale ship yet: table 1 and figure 3 at laptop scale instead, from raw physics."
endif
	$(BIN)/promptnb run $(PAPER) --scale $(SCALE) $(EXHIBITS) --cores $(CORES) $(if $(FRESH),--retrain)
	$(BIN)/promptnb render $(PAPER) --scale $(SCALE) $(EXHIBITS)
	$(BIN)/promptnb verify $(PAPER) --scale $(SCALE) $(EXHIBITS)
	@echo "The whole table: make reproduce SCALE=desk WHOLE=1. From raw physics, with policies trained here: FRESH=1 too."

PYTEST := $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadgroup

test: $(READY) .venv/.extras-$(EXTRAS) lint ## the tests, on all cores (EXTRAS=dev: without what needs extras)
	@$(PYTEST) -m "not long"

test-all: $(READY) .venv/.extras-$(EXTRAS),browser,docs lint ## long tests too, JupyterLab in a browser, and the site
	@$(PYTEST)

lint: $(READY) .venv/.extras-$(EXTRAS) ## is the code laid out as ruff.toml says?
	@$(BIN)/ruff format --check -q . || { echo "not formatted: run make fix" >&2; exit 1; }
	@$(BIN)/ruff check -q .

fix: $(READY) .venv/.extras-$(EXTRAS) ## format notebooks and code, export the package, clean the notebooks
	@$(BIN)/ruff check -q --fix . || true
	@$(BIN)/ruff format -q .
	@$(BIN)/nbdev_export
	@$(BIN)/python tests/faults.py
	@$(BIN)/nbdev_clean
	@$(BIN)/python tests/counts.py
	@$(BIN)/ruff format -q .

lab: $(READY) ## the notebooks in JupyterLab (LAB_ARGS="--port 9000" passes options on)
	@case "$$(id -u) $(LAB_ARGS)" in "0 "*--allow-root*) ;; "0 "*) \
	  echo 'JupyterLab does not start as root unless told to: make lab LAB_ARGS="--allow-root"' >&2; exit 2;; esac
	@$(BIN)/python -m ipykernel install --sys-prefix --name promptnb --display-name promptnb
	$(BIN)/jupyter lab --notebook-dir=. nbs/papers/$(PAPER).ipynb $(LAB_ARGS)

gpu: $(READY) ## on a machine with a GPU, MINUTES=8: the same numbers? how fast? and policies at paper scale
	$(BIN)/promptnb gpu --minutes $(MINUTES)

readme: $(READY) ## README.md from nbs/index.ipynb
	@$(MAKE) -s readme-text > .README.tmp && mv .README.tmp README.md

readme-text: $(READY)
	@$(BIN)/jupyter nbconvert --to markdown --no-input --stdout --log-level ERROR nbs/index.ipynb \
	  | sed -e 's#](\([^):]*\.ipynb\))#](nbs/\1)#g' -e 's#](\.\./#](#g'

SITE := $(BIN)/python -m sphinx -q -W --keep-going -c workflow/docs -d _docs/doctrees _docs/source

docs: $(READY) .venv/.extras-$(EXTRAS),docs ## the notebooks and the library's reference as a site, in _docs/site
	@$(BIN)/python workflow/docs/pages.py _docs/source
	@$(SITE) -b html _docs/site
	@$(SITE) -b coverage _docs/coverage > /dev/null
	@echo "the site: _docs/site/index.html"

clean: ## remove .venv, caches and builds; data, results and figures stay
	rm -rf .venv build dist _docs *.egg-info .pytest_cache .snakemake
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1~\2/p' $(MAKEFILE_LIST) | awk -F~ '{printf "%-16s %s\n", $$1, $$2}'
	@echo
	@echo 'PYTHON=python3.12    which Python makes .venv (>= 3.11)'
	@echo 'CORES=4              how many runs at a time (default: all cores, here $(CORES))'
	@echo 'SCALE=laptop         of make reproduce (default: desk where its policies ship, here $(SCALE))'
	@echo 'WHOLE=1 FRESH=1      of make reproduce: the whole table; policies trained here, from raw physics'
	@echo 'TORCH="torch --index-url https://download.pytorch.org/whl/cpu"'
	@echo '                     which build of torch to install first (read when .venv is made: make clean to change it)'

# The torch named by TORCH is held to the versions of settings.ini, so that the second install keeps it.
$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "promptnb needs Python >= 3.11, but $(PYTHON) --version says '$$($(PYTHON) --version 2>&1 | tail -n 1)': name another one with PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv: a few minutes, once."
	@$(PYTHON) -m venv .venv
	@sed -n 's/^ *\(torch[<>=].*\)/\1/p' settings.ini > .venv/torch.txt
	$(if $(TORCH),$(BIN)/python -m pip install -q -c .venv/torch.txt $(TORCH))
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/.extras-%: $(READY)
	@$(BIN)/python -m pip install -q -e ".[$*]"
	@touch $@
