# The targets and their purpose: `make help`. PROFILE=release builds with optimisations.
PROFILE ?= dev
BUILT   := $(or $(CARGO_TARGET_DIR),target)
TARGET  := $(BUILT)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
DATA    ?= data
LISTEN  ?= 0.0.0.0:5001

.PHONY: help run demo test lint bench bench-cluster compose-test metrics-check chaos
.PHONY: conversations fuzz

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

run: ## build, start a server on the embedded store, print the next commands
	cargo build --locked --profile $(PROFILE) -p qpq-server -p qpq-cli
	$(TARGET)/qpq-server --listen $(LISTEN) --data-dir $(DATA)

demo: ## run a scripted chat of three users on a temporary server
	cargo build --locked --profile $(PROFILE) -p qpq-server -p qpq-cli
	scripts/demo $(TARGET)

test: ## run all tests, after installing missing tools and servers
	scripts/test

lint: ## check formatting, style, clippy, dependencies, licences and advisories
	scripts/lint

bench: ## measure one server against its floors
	cargo build --locked --release -p qpq-server -p qpq-tests --bins
	$(BUILT)/release/qpq-load bench

bench-cluster: ## measure a cluster on this machine against its floors
	cargo build --locked --release -p qpq-server -p qpq-admin -p qpq-tests --bins
	$(BUILT)/release/qpq-load bench-cluster

compose-test: ## run the compose cluster in a container engine, and chat while everything is killed
	cargo build --locked --profile $(PROFILE) -p qpq-server -p qpq-admin -p qpq-cli
	tests/compose/run $(TARGET)

metrics-check: ## check dashboard, alerts and docs/metrics.md against the metrics of running servers
	cargo build --locked --profile $(PROFILE) --workspace --bins
	tests/observability/check $(TARGET)

chaos: ## send a million messages through faults, failovers and restores; none may be lost
	cargo build --locked --release -p qpq-server -p qpq-admin -p qpq-tests --bins
	$(BUILT)/release/qpq-chaos

conversations: ## let devices write, change groups, crash and lose state at random, ten minutes
	cargo nextest run --locked -p qpq-tests --run-ignored only --no-capture \
	    -E 'test(many_conversations)'

fuzz: ## fuzz each frame decoder for a minute (needs a nightly toolchain)
	scripts/fuzz
