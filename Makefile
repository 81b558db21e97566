# Everything below runs from a fresh clone: the targets install what they need first.
SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first Python that is new enough; `make PYTHON=...` overrides it.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin

.PHONY: help
help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: .venv/.installed ## Create .venv from the lock, with the project editable.

.venv/.installed: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (make PYTHON=...)" >&2; exit 1; }
	@"$(PYTHON)" tools/install.py

.PHONY: lock
lock: ## Pin the newest versions that pyproject.toml allows, with hashes.
	@"$(PYTHON)" tools/lock.py

.PHONY: gen
gen: install ## Generate the stubs from proto/, and the blocking client from the one for asyncio.
	@$(BIN)/python tools/stubs.py generate
	@$(BIN)/python tools/sync_client.py generate

.PHONY: verify-gen
verify-gen: install ## Prove that what is generated and checked in is current.
	@$(BIN)/python tools/stubs.py verify
	@$(BIN)/python tools/sync_client.py verify

.PHONY: check
check: install ## Lint, type-check, check layers, protos and stubs.
	@echo "check: ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "check: mypy"
	@$(BIN)/mypy
	@echo "check: import contracts"
	@$(BIN)/lint-imports --config pyproject.toml --no-logo
	@echo "check: protos and stubs"
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@$(MAKE) --no-print-directory verify-gen
	@echo "check: everything holds"

.PHONY: format
format: install ## Format the Python code and the protos, and apply safe fixes.
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write

# What pytest is told besides: make test ARGS="-k reserve -x".
ARGS ?=

.PHONY: test
test: install ## Run all tests against a real Postgres that they start themselves.
	@$(BIN)/python -m pytest -n auto --dist loadgroup --durations 10 $(ARGS)

.PHONY: soak
soak: SECONDS ?= 900
soak: install ## Keep a steady load for SECONDS=900 while agents die: nothing may grow.
	@$(BIN)/python -m tests.faults.soak --seconds $(SECONDS)

# PARTS=modelled,race runs only those; FOLDER=... keeps the histories there, whatever comes of it.
.PHONY: faults
faults: install ## Do harm to servers, connections and databases, and check the ledger (SECONDS=300 SEED=1).
	@$(BIN)/python -m tests.faults $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(FOLDER),--folder $(FOLDER))

# Again with the seed that it tells; CASES=4000 is about the slice that the tests run.
.PHONY: fuzz
fuzz: CASES ?= 200000
fuzz: install ## Ask every method whatever can be asked, and check every balance (CASES=200000 SEED=1).
	@$(BIN)/python -m tests.fuzz --cases $(CASES) $(if $(SEED),--seed $(SEED))

# ENTRIES=1500 is the slice that CI runs; FOLDER=... keeps the report there.
.PHONY: audit
audit: install ## Tamper with a ledger in every way, and see that each is found and named (ENTRIES=100000 SEED=1).
	@$(BIN)/python -m tests.tampering $(if $(ENTRIES),--entries $(ENTRIES)) $(if $(SEED),--seed $(SEED)) \
		$(if $(FOLDER),--folder $(FOLDER)) $(ARGS)

# A slice only shows that everything runs; with parts left out the page would not be whole.
.PHONY: bench
bench: install ## Measure everything in one run, and write docs/performance.md (SLICE=1, ONLY=stack,growth).
	@$(BIN)/python -m tests.bench $(if $(SLICE),--slice) $(if $(ONLY),--only "$(ONLY)") \
		$(if $(SLICE)$(ONLY),,--report) $(if $(FOLDER),--folder $(FOLDER)) $(ARGS)

.PHONY: fleet
fleet: install ## Let AGENTS=10000 reserve, think and settle for SECONDS=300.
	@$(BIN)/python -m tests.bench.fleet $(if $(AGENTS),--agents $(AGENTS)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(FOLDER),--folder $(FOLDER)) $(ARGS)

# A slice only shows that everything runs; with scenarios left out the page would not be whole.
.PHONY: replay
# LiteLLM takes part in the whole, and with LITELLM=1 in less: it is installed from tests/replay/litellm.lock, into an
# environment of its own. What was broken off goes on where it was.
replay: install ## Replay the incident catalogue against counters, LiteLLM and the ledger; writes docs/incidents.md (SLICE=1, ONLY=S1,D2).
	@$(BIN)/python -m tests.replay $(if $(SLICE),--slice) $(if $(ONLY),--only "$(ONLY)") \
		$(if $(SLICE)$(ONLY)$(TRIALS),$(if $(LITELLM),--litellm),--report --litellm) \
		$(if $(TRIALS),--trials $(TRIALS)) $(if $(FOLDER),--folder "$(FOLDER)")

.PHONY: flame
flame: install ## Draw where server and client spend their time, as docs/performance/flame-*-NAME.svg.
	@$(BIN)/python -m tests.bench.flame $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS) $(NAME)

.PHONY: demo
demo: install ## Spend a real request trace from one capped budget (TRACE=file for another one).
	@$(BIN)/peculium demo $(if $(TRACE),--trace "$(TRACE)")

.PHONY: clean
clean: ## Remove what the targets above made.
	@rm -rf .venv .venv.lock .venv.litellm build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find client server migrations tests tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
