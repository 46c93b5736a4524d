# Two commands matter: `make demo` and `make test`. Every target sees to its own set-up (build/run, build/setup).
# All paths here are relative: the clone may live anywhere, also below a folder with spaces in its name.
.DEFAULT_GOAL := help
.SUFFIXES:
SHELL := /bin/sh
PYTHON := .venv/bin/python
RUN := sh build/run
PYTEST := $(PYTHON) -m pytest
GROUPS := peers runtimes cluster docker hosts vm
# Where a group's tests are; tests/hosts.py has taken one of the names.
place = tests/$(if $(filter hosts,$(1)),many_hosts,$(1))
# What the two core groups do not look into: the groups of their own.
CORE := $(foreach group,$(GROUPS),--ignore=$(call place,$(group))) tests
# For example: make test-unit ARGS='-k allocator -x'
ARGS :=
# Tests wait more than they reckon, so their files run side by side, in this many processes; 0: in one, as a debugger wants.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); if [ "$$n" -gt 4 ]; then echo 8; else echo $$((2 * n)); fi)
BESIDE := $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadscope)

.PHONY: help venv lint format test test-unit test-kernel $(addprefix test-,$(GROUPS)) \
	demo bench bench-check protos protos-check update-pins clean

help: ## list these targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)$$/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-19s %s\n' "$$name" "$$text"; done

venv:
	@$(RUN) plain true

lint: ## ruff (rules and format), mypy --strict, and whether the generated protobuf code is up to date
	@$(RUN) plain sh build/lint

format: ## let ruff format the code and repair what it can
	@$(RUN) plain $(PYTHON) -m ruff format .
	@$(RUN) plain $(PYTHON) -m ruff check --fix .

test: ## the suite for contributors: unit and kernel tests, as root, under 15 minutes
	@$(RUN) test $(PYTEST) $(BESIDE) $(CORE) $(ARGS)

test-unit: ## tests that need neither root nor a network namespace
	@$(RUN) plain $(PYTEST) $(BESIDE) -m "not kernel" $(CORE) $(ARGS)

test-kernel: ## tests in real network namespaces (root)
	@$(RUN) test $(PYTEST) $(BESIDE) -m kernel $(CORE) $(ARGS)

test-peers: ## the same configurations through Debian's reference plugins, compared (root)
test-runtimes: ## podman, containerd and other real clients (root)
test-cluster: ## several nodes and a real etcd (root)
test-docker: ## dockerd with the Docker shim (root)
test-hosts: ## several hosts, joined by an underlay (root)
test-vm: ## what needs a kernel that this machine lacks, in a virtual machine (root)
# A cache for each: which tests failed last (pytest --last-failed) is a question to one group.
$(addprefix test-,$(GROUPS)): suite = $(PYTEST) $(BESIDE) -o cache_dir=.pytest_cache/$(@:test-%=%) "$(call place,$(@:test-%=%))"
test-vm: suite = sh tests/vm/suite
$(addprefix test-,$(GROUPS)):
	@if test -d "$(call place,$(@:test-%=%))"; then $(RUN) $(@:test-%=%) $(suite) $(ARGS); \
	else echo "$@: there are no tests in $(call place,$(@:test-%=%)) yet"; fi

demo: ## one host from end to end: two containers get addresses, ping each other, and go away again (root)
	@$(RUN) demo $(PYTHON) -m demo

bench: ## time taken, side by side with Debian's reference plugins; writes out/bench.json (root)
	@$(RUN) bench $(PYTHON) -m bench $(ARGS)

bench-check: ## as bench, and exit 1 when a row is over its limit (root)
	@$(RUN) bench $(PYTHON) -m bench --check $(ARGS)

protos: ## write the Python code of protos/*/v*/*.proto
	@$(RUN) plain sh build/protos write

protos-check: ## fail when that code is not what the .proto files say
	@$(RUN) plain sh build/protos check

update-pins: ## write build/constraints.txt anew: the newest versions that pyproject.toml allows
	@NETLOOM_UNPINNED=1 $(RUN) plain sh build/pins

clean: ## remove what the other targets made: .venv, out/ and caches
	@rm -rf .venv out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The launcher. Static: it starts in half the time, and needs nothing of the host. CC alone builds it. On x86_64 it does
# without libc, too (warm/bare.h); LAUNCHER_BARE= builds it with libc.
LAUNCHER := out/launcher
LAUNCHER_BARE = $(if $(filter x86_64-%,$(shell $(CC) -dumpmachine)),-DNETLOOM_BARE -nostdlib -fno-stack-protector -U_FORTIFY_SOURCE)
LAUNCHER_OPTIONS = -std=c11 -O2 -Wall -Wextra -Werror -static $(LAUNCHER_BARE)
LAUNCHER_FLAGS = $(LAUNCHER_OPTIONS)
SANITIZERS := -std=c11 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZER := out/fuzz-launcher
FUZZ_INPUTS := 1000000

.PHONY: launcher launcher-sanitized fuzz-launcher test-sanitizers
launcher: ## the executable of every plugin, out/launcher; needs a C compiler and nothing else
	@mkdir -p "$$(dirname "$(LAUNCHER)")"
	@$(CC) $(LAUNCHER_FLAGS) $(LAUNCHER_DEFINES) -o "$(LAUNCHER)" warm/launcher.c

launcher-sanitized: ## the same under address and undefined sanitizers
	@mkdir -p "$$(dirname "$(LAUNCHER)")"
	@$(CC) $(SANITIZERS) -o "$(LAUNCHER)" warm/launcher.c

fuzz-launcher: ## a million hostile answers to the launcher's parser, under address and undefined sanitizers
	@mkdir -p "$$(dirname "$(FUZZER)")"
	@$(CC) $(SANITIZERS) -o "$(FUZZER)" tests/warm/fuzz_launcher.c
	@"$(FUZZER)" $(FUZZ_INPUTS)

test-sanitizers: ## the launcher's tests once more, with the launcher under address and undefined sanitizers
	@NETLOOM_SANITIZE=1 $(RUN) plain $(PYTEST) tests/warm/test_launcher.py $(ARGS)

# Bundles and installation. DESTDIR may have spaces; PREFIX may not, as systemd and the launcher have it compiled in.
DESTDIR ?=
PREFIX ?= /usr
install uninstall: export DESTDIR := $(DESTDIR)
install uninstall: export PREFIX := $(PREFIX)
install deb: export CC := $(CC)
install deb: export LAUNCHER_FLAGS = $(LAUNCHER_OPTIONS)

.PHONY: binaries install uninstall deb
binaries: ## every program as a bundle that needs nothing but glibc: out/bundle, and out/launcher
	@$(RUN) binaries $(PYTHON) -I build/bundle.py
	@$(MAKE) --no-print-directory launcher

install: binaries ## launchers, bundle, units and configuration onto this system: DESTDIR= PREFIX=/usr (root)
	@sh build/install

uninstall: ## take away what install put there, and put back what was there before: DESTDIR= PREFIX=/usr (root)
	@sh build/uninstall

deb: binaries ## the same as a package for Debian: out/netloom_VERSION_ARCHITECTURE.deb
	@sh build/deb
