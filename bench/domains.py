#!/usr/bin/env python3
"""What many domains cost: a server with COUNT domains, each with a certificate of its own, on 127.0.0.1.

usage: bench/domains.py PEREGRINE PEREGRINE-BENCH PEREGRINE-SCALE [COUNT] [PEER_HOSTS] [KEPT_FOLDER]

In KEPT_FOLDER the filled store stays, and is used again the next time.

Prints the time from the start of the process to the first handshake for a domain that nobody has asked for, what the process
then has in memory, how long a change (a certificate that is imported) takes from the request to the handshake that shows it,
and the slowest requests while nothing and while ten certificates a second change. Beside it, if PEER_HOSTS is not 0: how long
nginx and haproxy take to load a configuration of so many hosts anew until a new one is served.
"""
import http.client, json, os, shutil, signal, socket, ssl, statistics, subprocess, sys, tempfile, time, uuid

HTTPS, HTTP, API, ORIGIN, PEER = 19443, 19480, 19470, 19411, 19444
PATIENCE_S = 300
CHANGES = 30
STARTED = []
# To make one takes as long as ten handshakes.
ANYBODY = ssl.create_default_context()
ANYBODY.check_hostname, ANYBODY.verify_mode = False, ssl.CERT_NONE


def certificate(folder, name):
    """A self-signed certificate and its key, as PEM."""
    chain, key = os.path.join(folder, name + ".pem"), os.path.join(folder, name + ".key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                    "-subj", "/CN=" + name, "-addext", "subjectAltName=DNS:" + name, "-keyout", key, "-out", chain],
                   check=True, stderr=subprocess.DEVNULL)
    return open(chain).read(), open(key).read()


def presented(port, name):
    """The names in the certificate that is presented for `name`; None if there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            with ANYBODY.wrap_socket(raw, server_hostname=name) as tls:
                return tls.getpeercert(binary_form=True)
    except OSError:
        return None


def wait_presented(port, name, process=None, certified=None):
    """Waits for a certificate with this name, or the other that is given: in ECDSA certificates the name lies as it is."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        found = presented(port, name)
        if found and (certified or name).encode() in found:
            return time.monotonic()
        if process and process.poll() is not None:
            sys.exit(f"the server has ended with {process.returncode}")
        time.sleep(0.002)
    sys.exit(f"no certificate for {name} within {PATIENCE_S} s")


def memory_mib(pid, field):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024


def change(token, body):
    connection = http.client.HTTPConnection("127.0.0.1", API, timeout=60)
    connection.connect()
    # Head and body are two writes: without this the second one waits for the answer to the first.
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.request("POST", "/api/v1/certificates", body,
                       {"authorization": "Bearer " + token, "content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        sys.exit(f"the import was answered with {answer.status}: {text[:300]}")


def begin(words, **more):
    """A process that is ended with this one."""
    STARTED.append(subprocess.Popen(words, **more))
    return STARTED[-1]


def load(bench):
    return begin([bench, "load", "--target", f"127.0.0.1:{HTTP}", "--host", "web.test", "--path", "/bytes/100",
                             "--rate", "2000", "--seconds", "10", "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def peregrine(folder, binary, bench, scale, count):
    config, data = os.path.join(folder, "server.toml"), os.path.join(folder, "data")
    with open(config, "w") as file:
        file.write(f'[edge]\nhttp = ["127.0.0.1:{HTTP}"]\nhttps = ["127.0.0.1:{HTTPS}"]\n[api]\nlisten = "127.0.0.1:{API}"\n'
                   f'[service.web]\nhosts = ["*"]\nupstreams = ["127.0.0.1:{ORIGIN}"]\nhealth = {{ probe = "none" }}\n')
    log = open(os.path.join(folder, "server.log"), "a")
    start = lambda: begin([binary, "serve", "--config", config, "--data", data], stdout=log, stderr=log)

    if not os.path.exists(os.path.join(data, "api-token")):
        server = start()
        wait_port(API, server)
        token = open(os.path.join(data, "api-token")).read().strip()
        chain, key = certificate(folder, "template.test")
        change(token, json.dumps({"domain": "template.test", "chain": chain, "key": key}))
        wait_presented(HTTPS, "template.test", server)
        stop(server)
        begun = time.monotonic()
        subprocess.run([scale, data, "template.test", str(count)], check=True, stdout=subprocess.DEVNULL)
        print(f"{count} domains were written in {time.monotonic() - begun:.1f} s", flush=True)
    token = open(os.path.join(data, "api-token")).read().strip()

    begun = time.monotonic()
    server = start()
    name = f"d{count * 2 // 3:07}.scale.test"
    first = wait_presented(HTTPS, name, server) - begun
    print(f"start to the first handshake for {name}: {first:.2f} s", flush=True)
    wait_ready(server)
    print(f"start to the API: {time.monotonic() - begun:.2f} s")
    last = wait_presented(HTTPS, f"d{count - 1:07}.scale.test", server) - begun
    print(f"start to a handshake for the last domain: {last:.2f} s")
    print(f"memory: {memory_mib(server.pid, 'VmRSS'):.0f} MiB, at most {memory_mib(server.pid, 'VmHWM'):.0f} MiB", flush=True)

    bodies = []
    run = uuid.uuid4().hex[:8]
    for number in range(CHANGES * 4):
        name = f"new{number}-{run}.test"
        chain, key = certificate(folder, name)
        bodies.append((name, json.dumps({"domain": name, "chain": chain, "key": key})))
    took = []
    for name, body in bodies[:CHANGES]:
        begun = time.monotonic()
        change(token, body)
        took.append((wait_presented(HTTPS, name, server) - begun) * 1000)
    print(f"a change, from the request to its handshake: median {statistics.median(took):.1f} ms, at most {max(took):.1f} ms of {CHANGES}", flush=True)

    rest = bodies[CHANGES:]
    for kind in ("nothing", "ten certificates a second", "nothing", "ten certificates a second"):
        loading, changes = load(bench), 0
        while kind != "nothing" and loading.poll() is None and rest:
            begun = time.monotonic()
            change(token, rest.pop()[1])
            changes += 1
            time.sleep(max(0, 0.1 - (time.monotonic() - begun)))
            if changes == CHANGES * 3 // 2:
                break
        summary = json.loads(loading.communicate()[0])
        figures = {field: summary[field] for field in ("ok", "sent", "latency_us")}
        print(f"while {kind} changes ({changes} changes): {json.dumps(figures)}", flush=True)
    print(f"memory at the end: {memory_mib(server.pid, 'VmRSS'):.0f} MiB")
    stop(server)


def peers(folder, hosts):
    """nginx and haproxy with so many hosts: a new one is added, and the configuration loaded anew."""
    names = [f"h{number:05}.peer.test" for number in range(hosts)] + ["added.peer.test"]
    chain, key = certificate(folder, "h.peer.test")
    together = os.path.join(folder, "together")
    os.makedirs(together, exist_ok=True)
    # One certificate for all of them but the new one: what is measured is the configuration.
    with open(os.path.join(together, "many.pem"), "w") as file:
        file.write(chain + key)
    added_chain, added_key = certificate(folder, names[-1])
    with open(os.path.join(together, "added.pem"), "w") as file:
        file.write(added_chain + added_key)

    def nginx(names):
        certificate_of = lambda name: "added" if name == "added.peer.test" else "many"
        servers = "".join(
            f"server {{ listen 127.0.0.1:{PEER} ssl; server_name {name}; ssl_certificate {together}/{certificate_of(name)}.pem; "
            f"ssl_certificate_key {together}/{certificate_of(name)}.pem; return 200; }}\n" for name in names)
        with open(os.path.join(folder, "nginx.conf"), "w") as file:
            file.write(f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
                       f"events {{ }}\nhttp {{ access_log off; server_names_hash_max_size 65536; server_names_hash_bucket_size 128;\n{servers} }}\n")
    nginx(names[:-1])
    process = begin(["nginx", "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"])
    wait_presented(PEER, names[0], certified="h.peer.test")
    nginx(names)
    begun = time.monotonic()
    process.send_signal(signal.SIGHUP)
    print(f"nginx with {hosts} hosts, from the reload to the new one: {(wait_presented(PEER, names[-1]) - begun) * 1000:.0f} ms", flush=True)
    stop(process)

    def haproxy(names):
        with open(os.path.join(folder, "list.txt"), "w") as file:
            for name in names:
                file.write(f"{together}/{'added' if name == 'added.peer.test' else 'many'}.pem {name}\n")
        with open(os.path.join(folder, "hosts.map"), "w") as file:
            file.writelines(f"{name} web\n" for name in names)
        with open(os.path.join(folder, "haproxy.cfg"), "w") as file:
            file.write(f"global\n nbthread 1\ndefaults\n mode http\n timeout client 10s\n timeout server 10s\n timeout connect 5s\n"
                       f"frontend f\n bind 127.0.0.1:{PEER} ssl crt-list {folder}/list.txt\n"
                       f" use_backend %[req.hdr(host),lower,map({folder}/hosts.map,web)]\nbackend web\n http-request return status 200\n")
    haproxy(names[:-1])
    said = os.path.join(folder, "haproxy.log")
    process = begin(["haproxy", "-W", "-f", f"{folder}/haproxy.cfg"], stderr=open(said, "w"))
    wait_presented(PEER, names[0], certified="h.peer.test")
    haproxy(names)
    # Its worker serves before the master listens to signals, and until then they are lost.
    while "Reloading" not in open(said).read():
        begun = time.monotonic()
        process.send_signal(signal.SIGUSR2)
        while "Reloading" not in open(said).read() and time.monotonic() - begun < 1:
            time.sleep(0.001)
    print(f"haproxy with {hosts} hosts, from the reload to the new one: {(wait_presented(PEER, names[-1]) - begun) * 1000:.0f} ms", flush=True)
    stop(process)


def wait_ready(process):
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", API, timeout=PATIENCE_S)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        if process.poll() is not None:
            sys.exit(f"the server has ended with {process.returncode}")
        time.sleep(0.005)
    sys.exit("the API does not answer")


def wait_port(port, process=None):
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process and process.poll() is not None:
                sys.exit(f"the server has ended with {process.returncode}")
            time.sleep(0.005)
    sys.exit(f"nobody listens at {port}")


def stop(process):
    process.terminate()
    process.wait()


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    binary, bench, scale = sys.argv[1:4]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 1_000_000
    hosts = int(sys.argv[5]) if len(sys.argv) > 5 else 10_000
    kept = sys.argv[6] if len(sys.argv) > 6 else None
    folder = kept or tempfile.mkdtemp(prefix="peregrine-domains-")
    os.makedirs(folder, exist_ok=True)
    try:
        begin([bench, "origin", "--host", "127.0.0.1", "--port", str(ORIGIN)], stdout=subprocess.DEVNULL)
        peregrine(folder, binary, bench, scale, count)
        if hosts:
            peers(folder, hosts)
    finally:
        for process in STARTED:
            stop(process)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


main()
