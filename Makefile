# Every target works on a bare machine with Python 3.11 to 3.13 and make: it makes .venv when needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DATASETS ?= datasets
OUTPUTS ?= outputs
FASHION := $(DATASETS)/fashion-mnist
DEMO := configs/pretrain_convnext-mini_fashion-mnist_full.yaml
FAST := not slow and not slurm and not browser

# What notices a package that is too old: every program's start, pretraining, evaluation, export, engines on two ranks,
# the released encoders.
MIN := .venv-min
MIN_TESTS := tests/unit/runtime/test_usage.py tests/smoke/test_main_job.py tests/distributed/test_engines.py \
  tests/unit/evaluation/test_programs.py tests/unit/evaluation/encoders tests/unit/models

.PHONY: help demo test test-isa test-min test-all docs audit audit-all slow-tools lint format bench gpu-check options clean

help:
	@echo "make demo      install, fetch Fashion-MNIST, pretrain a small network, evaluate, write the report"
	@echo "make test      the fast suite;  make test-all  also Slurm, browser, fault loops, long runs"
	@echo "make test-isa  tests of learned figures under other instruction sets and numbers of threads; prints their ranges"
	@echo "make test-min  programs, engines and encoders with the oldest packages that requirements-min.txt allows, in .venv-min"
	@echo "make lint      ruff and mypy;   make format    ruff format"
	@echo "make audit     the collapse audit: six arms, three seeds;  make audit-all  ablations, estimators, long tails"
	@echo "make bench     speed ratios beside their peers"
	@echo "make gpu-check all that is measured on a GPU, in parts that are never repeated"
	@echo "make docs      the pages as a site, in outputs/site"
	@echo "make options   write docs/options.md from the options' own texts"
	@echo "make clean     remove caches (not datasets, not outputs)"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11 on PATH; expected Python 3.11 or newer; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m data.make_shards fashion-mnist --out $(FASHION)
	$(BIN)/python pretrain.py $(DEMO) run.name=demo run.output_dir=$(OUTPUTS) data.shards=$(FASHION)
	$(BIN)/python evaluate.py configs/eval_fashion_mnist.yaml encoder=$(OUTPUTS)/demo 'probes=[prototypes,knn]' data.shards=$(FASHION)
	$(BIN)/python -m report $(OUTPUTS)/demo --out $(OUTPUTS)/demo/report

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "$(FAST)" -n 2 --dist loadscope -q

# Verdicts must not hang on rounding: TEST_ISA=--slow adds the tests that take minutes.
test-isa: $(VENV)/.installed-dev
	$(BIN)/python -m tests.helpers.isa_matrix $(TEST_ISA)

# The bounds as pins, and the test tools.
$(MIN)/.installed: requirements-min.txt requirements-dev.txt
	$(PYTHON) -m venv $(MIN)
	sed 's/>=/==/' requirements-min.txt > $(MIN)/oldest.txt
	grep -E '^(pytest|hypothesis|jaxtyping|beartype|scikit-learn)' requirements-dev.txt >> $(MIN)/oldest.txt
	echo tensorboard >> $(MIN)/oldest.txt
	$(MIN)/bin/python -m pip install --quiet --disable-pip-version-check -r $(MIN)/oldest.txt
	@touch $@

test-min: $(MIN)/.installed
	$(MIN)/bin/python -m pytest -m "$(FAST)" -n 2 --dist loadscope -q $(MIN_TESTS)

$(FASHION)/manifest.json: | $(VENV)/.installed
	$(BIN)/python -m data.make_shards fashion-mnist --out $(FASHION)

# Stopped and started again, an audit goes on where it was.
audit: $(FASHION)/manifest.json
	$(BIN)/python -m audit configs/audit_fashion-mnist.yaml output_dir=$(OUTPUTS)

audit-all: audit $(VENV)/.installed-dev
	$(BIN)/python -m audit configs/audit_fashion-mnist_collapse.yaml output_dir=$(OUTPUTS)
	$(BIN)/python -m audit configs/audit_fashion-mnist_ablations.yaml output_dir=$(OUTPUTS)
	$(BIN)/python -m audit configs/audit_fashion-mnist_more.yaml output_dir=$(OUTPUTS)
	$(BIN)/python -m audit configs/audit_fashion-mnist_few.yaml output_dir=$(OUTPUTS)
	$(BIN)/python -m data.make_shards lt $(FASHION) --imbalance 100 --out $(FASHION)-lt100
	$(BIN)/python -m audit configs/audit_fashion-mnist-lt100.yaml output_dir=$(OUTPUTS)
	$(BIN)/python -m data.make_shards lt $(FASHION) --imbalance 1000 --out $(FASHION)-lt1000
	$(BIN)/python -m audit configs/audit_fashion-mnist-lt1000.yaml output_dir=$(OUTPUTS)
	$(BIN)/python -m data.make_shards digits --out datasets/digits
	$(BIN)/python -m audit configs/audit_digits.yaml output_dir=$(OUTPUTS)

# What the slow tests start besides Python: a Slurm, a browser, network namespaces. Without root they skip by name.
slow-tools:
	@{ command -v slurmctld && command -v chromium && command -v ip; } >/dev/null || [ "$$(id -u)" != 0 ] || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    slurm-wlm munge iproute2 chromium fonts-dejavu-core >/dev/null; }

test-all: $(VENV)/.installed-dev slow-tools
	$(BIN)/python -m pytest -m "$(FAST)" -n 2 --dist loadscope -q
	$(BIN)/python -m pytest -m "slow or slurm or browser" -q --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.report gmm unique loss comm loader --out $(OUTPUTS)/benchmarks

# Stopped and started again, it goes on where it was.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check --out $(OUTPUTS)/gpu_check

options: $(VENV)/.installed
	$(BIN)/python -m runtime.options_page training.config:PretrainConfig=pretrain.py evaluation.config:EvaluationConfig=evaluate.py \
	  audit.config:AuditConfig='configs/audit_*.yaml' slurm.config:ClusterConfig='slurm/clusters/*.yaml' > docs/options.md

docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "outputs/site/index.html; for the search: $(BIN)/python -m http.server -d outputs/site"

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build decoupled_prototypes.egg-info
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
