#!/usr/bin/env bash
# What a thousand switches do to the slowest requests: 5,000 requests a second (HTTP/1.1 and HTTP/2, a tenth of them POST) for
# a while without a switch, then as long with a switch of their upstream every few milliseconds, a durable change each. Prints
# the 99.9th percentile of both; rounds alternate, so that what else the machine does falls on both.
# usage: bench/switches.sh PEREGRINE PEREGRINE-BENCH [ROUNDS] [SECONDS]
set -euo pipefail
peregrine=${1:?usage: bench/switches.sh PEREGRINE PEREGRINE-BENCH [ROUNDS] [SECONDS]}
bench=${2:?usage: bench/switches.sh PEREGRINE PEREGRINE-BENCH [ROUNDS] [SECONDS]}
rounds=${3:-3} seconds=${4:-10}
per_second=$((1000 / rounds / (seconds - 1) + 1))
folder=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$folder"' EXIT

for port in 19111 19112; do
  "$bench" origin --host 127.0.0.1 --port "$port" >"$folder/origin-$port.log" 2>&1 & pids+=($!)
done
cat >"$folder/server.toml" <<TOML
[edge]
http = ["127.0.0.1:19180"]

[api]
listen = "127.0.0.1:19170"
TOML
"$peregrine" serve --config "$folder/server.toml" --data "$folder/data" >"$folder/server.log" 2>&1 & pids+=($!)
api=http://127.0.0.1:19170
until curl -sf "$api/readyz" >"$folder/ready" 2>&1; do
  kill -0 "${pids[2]}" || { cat "$folder/server.log" >&2; exit 1; }
done

put() { # the change that makes the origin at this port the upstream, for curl
  echo "url = $api/api/v1/services/web"
  echo 'request = PUT'
  echo "output = $folder/answer.json"
  echo 'write-out = "%{http_code}\n"'
  echo "header = \"authorization: Bearer $(cat "$folder/data/api-token")\""
  echo 'header = "content-type: application/json"'
  printf 'data = "%s"\n' "$(sed 's/"/\\"/g' <<<'{"name":"web","routes":[{"host":"web.test","path":"/"}],"health":{"probe":"none"},"workload":{"kind":"fixed","upstreams":[{"address":"127.0.0.1:'"$1"'"}]}}')"
}
load() { # protocol, connections, name
  "$bench" load --target 127.0.0.1:19180 --host web.test --path /bytes/100 --protocol "$1" --connections "$2" --rate 2500 \
    --seconds "$seconds" --post-percent 10 --json >"$folder/$3.json" 2>"$folder/$3.log"
}
figure() { # name, field
  sed -n 's/.*"'"$2"'": *\([0-9]*\).*/\1/p' "$folder/$1.json" | head -1
}

put 19111 >"$folder/first.curl"
[ "$(curl -s -K "$folder/first.curl")" = 200 ] || { cat "$folder/answer.json" >&2; exit 1; }
for switch in $(seq $((per_second * (seconds - 1)))); do
  [ "$switch" = 1 ] || echo next
  put $((19111 + switch % 2))
done >"$folder/switches.curl"
status=0
for round in $(seq "$rounds"); do
  for kind in steady switching; do
    load http1 16 "http1-$kind" & one=$!
    load h2c 2 "h2c-$kind" & other=$!
    changed=0
    if [ "$kind" = switching ]; then
      # One client for all of them: what is measured is the switch, not the start of a thousand programs.
      curl -s --rate "$per_second/s" -K "$folder/switches.curl" >"$folder/codes"
      changed=$(grep -c '^200$' "$folder/codes" || true)
    fi
    # Each by itself: `wait` for both tells of the second alone. A load that has lost a request ends with a failure.
    for waited in "$one" "$other"; do wait "$waited" || status=1; done
    for protocol in http1 h2c; do
      echo "round $round, $protocol, $kind ($changed switches): $(figure "$protocol-$kind" ok) of $(figure "$protocol-$kind" sent) ok, p99.9 $(figure "$protocol-$kind" p99_9) us"
    done
  done
done
[ "$status" = 0 ] || echo "a load has failed: see the lines whose requests are not all ok" >&2
exit "$status"
