# Few targets, each one line of what it is for. PROFILE=release builds optimised.
PROFILE ?= dev
BUILT   := $(or $(CARGO_TARGET_DIR),target)
TARGET  := $(BUILT)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
DATA    ?= data
LISTEN  ?= 0.0.0.0:5001

.PHONY: help run demo test lint bench bench-cluster compose-test metrics-check chaos fuzz

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

run: ## build, start a server on the embedded store, print what to type next
	cargo build --locked --profile $(PROFILE) -p qpq-server -p qpq-cli
	$(TARGET)/qpq-server --listen $(LISTEN) --data-dir $(DATA)

demo: ## three users register, chat and form a group, by themselves, on a server of their own
	cargo build --locked --profile $(PROFILE) -p qpq-server -p qpq-cli
	scripts/demo $(TARGET)

test: ## everything, after installing what is missing
	scripts/test

lint: ## formatting, clippy, dependency walls, licences, known vulnerabilities
	scripts/lint

bench: ## speed beside its floors, on this machine
	cargo build --locked --release -p qpq-server -p qpq-tests --bins
	$(BUILT)/release/qpq-load bench

bench-cluster: ## the same for a cluster: edges, Postgres, Redis and NATS on this machine
	cargo build --locked --release -p qpq-server -p qpq-admin -p qpq-tests --bins
	$(BUILT)/release/qpq-load bench-cluster

compose-test: ## docker compose up in a real engine, and a chat through kills of everything in it
	cargo build --locked --profile $(PROFILE) -p qpq-server -p qpq-admin -p qpq-cli
	tests/compose/run $(TARGET)

metrics-check: ## dashboard, alerts and docs/metrics.md against what running servers expose
	cargo build --locked --profile $(PROFILE) --workspace --bins
	tests/observability/check $(TARGET)

chaos: ## a million messages through a cluster while everything in it is killed; nothing may be lost
	cargo build --locked --release -p qpq-server -p qpq-admin -p qpq-tests --bins
	$(BUILT)/release/qpq-chaos

fuzz: ## each frame decoder for a minute (needs a nightly toolchain)
	scripts/fuzz
