#!/bin/sh
# Runs every fuzz target for SECONDS with its seeds; fails on the first crash and says where its input is.
set -eu

seconds=${1:-}
case $seconds in
    '' | *[!0-9]* | 0*)
        echo "usage: fuzz/smoke.sh SECONDS    (for each target, at least 1)" >&2
        exit 2
        ;;
esac
cd "$(dirname "$0")/.."

if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "fuzz/smoke.sh: no nightly compiler; install it with: rustup toolchain install nightly --profile minimal" >&2
    exit 2
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
    cargo install cargo-fuzz --locked
fi

for target in $(cargo +nightly fuzz list); do
    seeds=fuzz/seeds/$target
    if [ -z "$(ls "$seeds" 2>/dev/null)" ]; then
        echo "fuzz/smoke.sh: $target has no seeds in $seeds" >&2
        exit 1
    fi
    echo "fuzz: $target for $seconds s from $(ls "$seeds" | wc -l) seeds"
    # What is found on the way goes into a folder of its own: a smoke run leaves nothing behind.
    corpus=$(mktemp -d)
    status=0
    cargo +nightly fuzz run "$target" "$corpus" "$seeds" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 || status=$?
    rm -rf "$corpus"
    if [ "$status" -ne 0 ]; then
        echo "fuzz/smoke.sh: $target failed; see the input named above in fuzz/artifacts/$target/" >&2
        exit 1
    fi
done
