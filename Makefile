# The two commands of the README are `make demo` and `make test`; each does its own set-up.
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
FUZZ_SECONDS ?= 6

.PHONY: demo test bench bench-tls soak build release format lint tests fuzz-smoke clean

demo:
	@scripts/setup demo
	@$(CARGO) build --profile demo --bin peregrine
	@$(TARGET)/demo/peregrine demo $(DEMO_ARGS)

# Everything that CI runs.
test:
	@scripts/timed setup scripts/setup test
	@scripts/timed format $(CARGO) fmt --all -- --check
	@scripts/timed lint $(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	@scripts/timed tests scripts/run-tests $(FUZZ_SECONDS)

bench:
	@scripts/setup bench
	@scripts/build-release
	@$(TARGET)/release/peregrine-bench table
	@$(TARGET)/release/peregrine-bench compare --peregrine $(TARGET)/pgo/peregrine $(BENCH_ARGS)
	@bench/switches.sh $(TARGET)/pgo/peregrine $(TARGET)/release/peregrine-bench

# The scenarios over TLS, with a minimal Pingora proxy among the peers.
bench-tls:
	@scripts/setup bench
	@$(CARGO) build --release --bin peregrine
	@$(CARGO) build --release -p peregrine-bench
	@cd bench/peers && CARGO_TARGET_DIR=target $(CARGO) build --release
	@$(TARGET)/release/peregrine-bench compare --tls --peregrine $(TARGET)/release/peregrine $(BENCH_ARGS)

build:
	@scripts/setup build
	@$(CARGO) build --release --bin peregrine

# The binary for production: built twice, the second time with a profile of its own work.
release:
	@scripts/setup build
	@scripts/build-release

format:
	@$(CARGO) fmt --all

lint:
	@$(CARGO) clippy --workspace --all-targets -- -D warnings

tests:
	@scripts/run-tests $(FUZZ_SECONDS)

clean:
	@$(CARGO) clean

# Half an hour of random moves, kills and faults in one process, and half an hour with edges apart; prints what grew.
soak:
	@scripts/setup test
	@$(CARGO) test --workspace --no-run --quiet
	@PEREGRINE_SOAK_SECONDS=$(or $(SOAK_SECONDS),1800) $(CARGO) test --workspace --test stories soak -- --nocapture --test-threads 1
