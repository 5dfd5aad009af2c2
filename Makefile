# make demo needs only Python 3.11 or 3.12: it makes .venv and installs the versions that requirements/*.lock pin.
# PYTHON=… names the interpreter. The second time nothing is installed.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) 2>/dev/null)))
BIN := .venv/bin
TORCH := torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo serve bench check test browser soak lock clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    build the small model that comes along, serve it from Triton, ask about a picture"
	@echo "make serve   serve model_repository (fill it with: $(BIN)/wicore build CHECKPOINT)"
	@echo "make bench   measure the server with NVIDIA's perf_analyzer"
	@echo "make test    formatting, lint, types and the tests"
	@echo "make soak    the tests with the full counts"
	@echo "make check   formatting, lint and types alone"
	@echo "make lock    pin the versions of pyproject.toml anew"

demo: .venv/default.stamp
	@$(BIN)/wicore demo run

serve: .venv/default.stamp
	@exec $(BIN)/wicore serve

bench: .venv/default.stamp
	@$(BIN)/wicore bench triton

check: .venv/test.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# Two workers share the cores with the servers they start. What fails beside others is run once more by itself, and must
# pass there; its first failure stays in the output.
test: check browser
	$(BIN)/pytest -m "not soak" -n 2 --dist loadfile || \
		{ echo "Once more, by themselves:"; $(BIN)/pytest -m "not soak" --last-failed --last-failed-no-failures none; }

# The page is tested in a real browser. Without one those tests are skipped, and this line says so.
browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "`id -u`" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium for the tests of the page …"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "No Chromium: the tests of the page will be skipped. On Debian and Ubuntu: sudo apt-get install chromium"; fi

soak: .venv/test.stamp
	HYPOTHESIS_PROFILE=search $(BIN)/pytest -m "soak or hypothesis" --timeout 7200

.venv/python.stamp:
	@test -n "$(PYTHON)" || { echo "No Python found. Install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "$(PYTHON) is `$(PYTHON) -V`; WiCore needs 3.11 or 3.12. Name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

.venv/default.stamp: .venv/python.stamp requirements/default.lock pyproject.toml
	@test -e .venv/test.stamp -a .venv/test.stamp -nt requirements/default.lock -a .venv/test.stamp -nt pyproject.toml || \
		{ echo "Installing WiCore into .venv …" && $(BIN)/pip install --quiet --require-hashes -r requirements/default.lock && \
		$(BIN)/pip install --quiet --no-deps -e . ; }
	@touch $@

# PyTorch's builds differ by platform, so it is pinned by version and not by hash.
.venv/test.stamp: .venv/python.stamp requirements/default.lock requirements/test.lock pyproject.toml
	@echo "Installing WiCore and what its tests need into .venv …"
	@$(BIN)/pip install --quiet --require-hashes -r requirements/test.lock
	@$(BIN)/pip install --quiet $(TORCH)
	@$(BIN)/pip install --quiet --no-deps -e .
	@touch .venv/default.stamp $@

PIP_COMPILE := pip-compile --quiet --upgrade --generate-hashes --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links
lock: .venv/python.stamp
	$(BIN)/python -m venv .venv/lock
	.venv/lock/bin/pip install --quiet pip-tools
	.venv/lock/bin/$(PIP_COMPILE) --allow-unsafe --output-file=requirements/default.lock pyproject.toml
	.venv/lock/bin/$(PIP_COMPILE) --extra=test --unsafe-package=torch --output-file=requirements/test.lock pyproject.toml

clean:
	rm -rf .venv .bench build .mypy_cache .ruff_cache .pytest_cache .hypothesis
