# make run [DATA=FOLDER]   the whole chain          make test        lint, types and the tests
# make down                end the local servers    make test-fast   unit tests only
# make test-long           the longest tests: chains of every field, every command of the pages, the bench
# make docs                the pages, in build/site  make audit       known holes of what it stands on
# make licences            of all packages           make sbom        build/sbom.cdx.json, for others
# make bench [ONLY=loader,step] [OUT=FILE] [DATA=FOLDER]   measure everything side by side
# make faults [FAULTS='"kill mlflow" …'] [STAGES='pretrain …']   kill and pause every server, hours
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 2>/dev/null))
BIN := .venv/bin
export DO_NOT_TRACK := true

.PHONY: run test test-fast test-long lint bench faults down clean-env docs audit sbom licences
.DELETE_ON_ERROR:

run: .venv/ready
	@$(BIN)/ringmo run $(if $(DATA),--data '$(DATA)') $(ARGS)

# Files of tests side by side, one more than there are cores: much of their time goes to servers that
# start and processes that end. In the order that tests/conftest.py gives them.
test: lint
	@$(BIN)/pytest -n $$(($$(nproc) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-fast: .venv/ready
	@$(BIN)/pytest -m "not slow and not long"

test-long: .venv/ready
	@$(BIN)/pytest -n 2 --dist loadfile -m long

lint: .venv/ready
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy ringmo flows

bench: .venv/ready
	@$(BIN)/python -m benchmarks $(if $(ONLY),--only '$(ONLY)') $(if $(OUT),--out '$(OUT)') \
	  $(if $(DATA),--data '$(DATA)') $(ARGS)

faults: .venv/ready
	@PYTHONPATH=tests:tests/faults $(BIN)/python -m fault_cells $(if $(FAULTS),--faults $(FAULTS)) \
	  $(if $(STAGES),--stages $(STAGES)) $(ARGS)

# Strict: a link or an anchor that leads nowhere ends it.
docs: .venv/ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open build/site/index.html in a browser"

audit sbom licences: .venv/ready
	@$(BIN)/python .ci/dependencies.py $@

down: .venv/ready
	@$(BIN)/ringmo down

# Built once; again only when what it is made from changes. uv installs in a fifth of pip's time.
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ringmo needs Python 3.11 or 3.12: none found" >&2; exit 2; }
	@echo "building the environment in .venv (some 6 GB, a few minutes the first time)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
