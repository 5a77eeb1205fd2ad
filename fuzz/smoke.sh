#!/bin/sh
# Runs every fuzz target for SECONDS from its seeds, or only builds them; fails on the first crash and says where its input is.
# The smoke run of CI is to say the same of the same tree, so it takes the same way each time; FUZZ_SEED=0 takes another one.
# It needs the compiler of the workspace and a C++ compiler (for libFuzzer), neither a nightly nor cargo-fuzz.
set -eu

seconds=${1:-}
case $seconds in
    build) ;;
    '' | *[!0-9]* | 0*)
        echo "usage: fuzz/smoke.sh SECONDS [TARGET]…    (for each target, at least 1; without one, all)" >&2
        echo "       fuzz/smoke.sh build" >&2
        exit 2
        ;;
esac
shift
cd "$(dirname "$0")/.."

missing=
command -v cargo >/dev/null 2>&1 || missing="$missing cargo (install Rust with rustup, https://rustup.rs)"
command -v c++ >/dev/null 2>&1 || missing="$missing c++ (Debian: apt-get install g++)"
if [ -n "$missing" ]; then
    echo "fuzz/smoke.sh: missing:$missing" >&2
    exit 2
fi

# What cargo-fuzz would set, but for the sanitizer (README.md says why): coverage for libFuzzer, in our crates and below.
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
# The flags are for the host's triple by name: build scripts and macros are built without them.
host=$(rustc -vV | sed -n 's/^host: //p')
# A folder of its own: Cargo lets one build at a time into one.
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:+$CARGO_TARGET_DIR/fuzz}
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-fuzz/target}
export CARGO_TARGET_DIR

began=$(date +%s)
RUSTFLAGS="$coverage --cfg fuzzing" cargo build --quiet --manifest-path fuzz/Cargo.toml --target "$host" --bins
echo "fuzz: built in $(($(date +%s) - began)) s"
[ "$seconds" != build ] || exit 0

if [ $# -eq 0 ]; then
    set -- $(cd fuzz/fuzz_targets && ls | sed -n 's/\.rs$//p')
fi
for target; do
    seeds=fuzz/seeds/$target
    if [ -z "$(ls "$seeds" 2>/dev/null)" ]; then
        echo "fuzz/smoke.sh: $target has no seeds in $seeds" >&2
        exit 1
    fi
    echo "fuzz: $target for $seconds s from $(ls "$seeds" | wc -l) seeds"
    # What is found on the way goes into a folder of its own: a smoke run leaves nothing behind.
    corpus=$(mktemp -d)
    mkdir -p "fuzz/artifacts/$target"
    status=0
    RUST_BACKTRACE=1 "$CARGO_TARGET_DIR/$host/debug/$target" "$corpus" "$seeds" -artifact_prefix="fuzz/artifacts/$target/" \
        -seed="${FUZZ_SEED:-1}" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 || status=$?
    rm -rf "$corpus"
    if [ "$status" -ne 0 ]; then
        echo "fuzz/smoke.sh: $target failed; see the input named above in fuzz/artifacts/$target/" >&2
        exit 1
    fi
done
