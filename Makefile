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
gen: install ## Generate the stubs in client/peculium/v1 from proto/.
	@$(BIN)/python tools/stubs.py generate

.PHONY: verify-gen
verify-gen: install ## Prove that the checked-in stubs are what proto/ generates.
	@$(BIN)/python tools/stubs.py verify
