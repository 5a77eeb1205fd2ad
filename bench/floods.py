#!/usr/bin/env python3
"""What 18 kinds of HTTP/2 floods cost an edge, and other clients meanwhile: Peregrine beside nginx, HAProxy and Caddy, on clear text.

usage: bench/floods.py PEREGRINE PEREGRINE-BENCH [FRAMES]

Each proxy has the first core for itself, with the configuration of `bench/conf`; its clients and the origin have the second. Each
kind comes once alone, FRAMES frames (20,000) on one connection as fast as they are taken, and the CPU time of the proxy and what
its memory grew by are told. Then all kinds come one after the other, again and again, from one attacker, while other clients ask
500 times a second over HTTP/1.1; their slowest is told beside what it was before the flood.
"""
import json, os, shutil, socket, struct, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
H1, H2, ORIGIN = 19180, 19182, 19101
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GET, POST = b"\x82\x86\x84\x41\x06a.test", b"\x83\x86\x84\x41\x06a.test"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 5, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
LOAD_S = 5
LATENCY_ROUNDS = 3
STARTED = []


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def kinds():
    """Name, what opens it, the n-th piece of it."""
    odd = lambda n: 2 * n + 1
    post, endless = frame(HEADERS, END_HEADERS, 1, POST), frame(HEADERS, 0, 1, GET)
    get = lambda n: frame(HEADERS, END_HEADERS | END_STREAM, odd(n), GET)
    return [
        ("PING", b"", lambda n: frame(PING, 0, 0, struct.pack(">Q", n))),
        ("acknowledged PING", b"", lambda n: frame(PING, 1, 0, struct.pack(">Q", n))),
        ("SETTINGS", b"", lambda n: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535 + n % 2))),
        ("empty SETTINGS", b"", lambda n: frame(SETTINGS, 0, 0)),
        ("PRIORITY", b"", lambda n: frame(PRIORITY, 0, odd(n), b"\0\0\0\0\7")),
        ("WINDOW_UPDATE of the connection", b"", lambda n: frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1")),
        ("WINDOW_UPDATE of a stream", post, lambda n: frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1")),
        ("empty DATA", post, lambda n: frame(DATA, 0, 1)),
        ("unknown type", b"", lambda n: frame(0xBB, 0, 0, b"x")),
        ("PRIORITY_UPDATE", b"", lambda n: frame(0x10, 0, 0, b"\0\0\0\1u=1")),
        ("empty CONTINUATION", endless, lambda n: frame(CONTINUATION, 0, 1)),
        ("CONTINUATION", endless, lambda n: frame(CONTINUATION, 0, 1, b"\x40\x01x\x01y")),
        ("rapid reset", b"", lambda n: get(n) + frame(RST_STREAM, 0, odd(n), b"\0\0\0\x08")),
        ("RST_STREAM of a closed stream", post + frame(RST_STREAM, 0, 1, b"\0\0\0\0"), lambda n: frame(RST_STREAM, 0, 1, b"\0\0\0\x08")),
        ("made you reset: window of 0", b"", lambda n: get(n) + frame(WINDOW_UPDATE, 0, odd(n), b"\0\0\0\0")),
        ("made you reset: DATA behind the end", b"", lambda n: get(n) + frame(DATA, 0, odd(n), b"x")),
        ("PUSH_PROMISE", b"", lambda n: frame(PUSH_PROMISE, END_HEADERS, 1, struct.pack(">I", odd(n)) + GET)),
        ("HEADERS without their end", b"", lambda n: frame(HEADERS, 0, odd(n))),
    ]


def flood(opening, pieces):
    """Sends it all, or as much as is taken until the proxy closes. Reads what comes, so that nobody waits for us."""
    left = memoryview(PREFACE + frame(SETTINGS, 0, 0) + opening + pieces)
    connection = socket.create_connection(("127.0.0.1", H2), timeout=2)
    try:
        while left:
            connection.settimeout(2)
            left = left[connection.send(left[:65536]):]
            connection.setblocking(False)
            try:
                while connection.recv(1 << 20):
                    pass
                return
            except BlockingIOError:
                pass
        # Done when it has answered the last of it: a PING behind it, or its end.
        connection.settimeout(2)
        connection.sendall(frame(PING, 0, 0, b"the last"))
        read, more = b"", b"-"
        while more and b"the last" not in read:
            more = connection.recv(1 << 20)
            read = read[-16:] + more
    except OSError:
        pass
    finally:
        connection.close()


def tree(pid):
    pids, found = [pid], []
    while pids:
        pid = pids.pop()
        found.append(pid)
        for task in os.listdir(f"/proc/{pid}/task"):
            pids += map(int, open(f"/proc/{pid}/task/{task}/children").read().split())
    return found


def cpu_ms(pid):
    """Of all threads, as the scheduler counts it."""
    total_ns = 0
    for process in tree(pid):
        for task in os.listdir(f"/proc/{process}/task"):
            total_ns += int(open(f"/proc/{process}/task/{task}/schedstat").read().split()[0])
    return total_ns / 1e6


def memory_kib(pid):
    total = 0
    for process in tree(pid):
        for line in open(f"/proc/{process}/smaps_rollup"):
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def wait_port(port, process):
    for _ in range(3000):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None:
                sys.exit(f"{process.args[0]} has ended with {process.returncode}")
            time.sleep(0.01)
    sys.exit(f"nobody listens at {port}")


def begin(words, **more):
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    STARTED.append(process)
    return process


def contenders(folder, peregrine):
    """Name, command, folder to run in, port that takes HTTP/2."""
    def copy(name):
        there = os.path.join(folder, name)
        shutil.copytree(os.path.join(HERE, "conf", name), there)
        return there

    pinned = ["taskset", "-c", "0"]
    there = copy("peregrine")
    yield "peregrine", pinned + [peregrine, "serve", "--config", f"{there}/peregrine.toml", "--data", f"{there}/data"], there, H1
    for name, command in (
        ("nginx", ["nginx", "-p", ".", "-c", "nginx.conf", "-e", "error.log"]),
        ("haproxy", ["haproxy", "-f", "haproxy.cfg"]),
        ("caddy", ["caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile"]),
    ):
        if not shutil.which(name):
            print(f"{name} is not there: skipped")
            continue
        there = copy(name)
        if name == "nginx":
            open(f"{there}/access_log.conf", "w").write("access_log off;\n")
            open(f"{there}/upstream.conf", "w").write(f"server 127.0.0.1:{ORIGIN};\n")
        if name == "caddy":
            open(f"{there}/access_log.caddy", "w").write("# none\n")
            # Without the part that needs a certificate.
            text = open(f"{there}/Caddyfile").read()
            open(f"{there}/Caddyfile", "w").write(text.split("https://localhost")[0])
        yield name, pinned + command, there, H1 if name == "caddy" else H2


def p99_us(bench, meanwhile):
    """The 99th percentile and the count of failures of other clients, in microseconds, while something else happens."""
    loading = subprocess.Popen(
        ["taskset", "-c", "1", bench, "load", "--target", f"127.0.0.1:{H1}", "--host", "web.test", "--path", "/bytes/100", "--connections", "8",
         "--rate", "500", "--seconds", str(LOAD_S), "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while loading.poll() is None:
        meanwhile()
    summary = json.loads(loading.communicate()[0])
    return summary["latency_us"]["p99"], summary["sent"] - summary["ok"]


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    peregrine, bench = map(os.path.abspath, sys.argv[1:3])
    frames = int(sys.argv[3]) if len(sys.argv) > 3 else 20_000
    os.sched_setaffinity(0, {1})
    every = [(name, opening, b"".join(map(nth, range(frames)))) for name, opening, nth in kinds()]
    folder = tempfile.mkdtemp(prefix="peregrine-floods-")
    global H2
    try:
        wait_port(ORIGIN, begin(["taskset", "-c", "1", bench, "origin", "--host", "127.0.0.1", "--port", str(ORIGIN)]))
        table, told = {}, []
        for contender, command, there, port in contenders(folder, peregrine):
            process = begin(command, cwd=there)
            wait_port(H1, process)
            H2 = port
            wait_port(H2, process)
            for _, opening, pieces in every[:3]:
                flood(opening, pieces[:90])  # so that nothing is there for the first time
            for name, opening, pieces in every:
                cpu, memory = cpu_ms(process.pid), memory_kib(process.pid)
                flood(opening, pieces)
                time.sleep(0.15)  # what it puts off until the connection has ended
                table.setdefault(name, {})[contender] = (cpu_ms(process.pid) - cpu, memory_kib(process.pid) - memory)

            def attack():
                attack.n = (attack.n + 1) % len(every)
                flood(*every[attack.n][1:])
            attack.n = 0
            for round in range(LATENCY_ROUNDS):
                steady, failed = p99_us(bench, lambda: time.sleep(0.05))
                flooded, lost = p99_us(bench, attack)
                told.append(f"{contender}: p99 of others {steady} µs before, {flooded} µs while flooded ({flooded / steady:.2f}); failed {failed} and {lost}")
                print(told[-1], flush=True)
            process.terminate()
            process.wait()
        names = list(next(iter(table.values())))
        print(f"\n| {frames} frames | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
        for kind, cells in table.items():
            print(f"| {kind} | " + " | ".join(f"{cells[n][0]:.1f} ms, {cells[n][1] / 1024:+.1f} MiB" for n in names) + " |")
        print("| the dearest | " + " | ".join(
            f"{max(c[n][0] for c in table.values()):.1f} ms, {max(c[n][1] for c in table.values()) / 1024:+.1f} MiB" for n in names) + " |")
    finally:
        for process in STARTED:
            process.terminate()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


main()
