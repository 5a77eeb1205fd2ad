//! `[edge]`, `[api]`, `[machine.NAME]`, and where services go.

use crate::{server, told};

#[test]
fn the_api_speaks_clear_text_to_others_only_in_so_many_words() {
    told(
        &server(
            r#"[api]
listen = "0.0.0.0:7070"
"#,
        ),
        r#"error[config.unsafe]: the API would speak clear text on 0.0.0.0:7070, which others can reach
 --> peregrine.toml:2:10
  |
2 | listen = "0.0.0.0:7070"
  |          ^^^^^^^^^^^^^^
  = listen on 127.0.0.1 and reach it through SSH (ssh -L 7070:127.0.0.1:7070 …), or say allow_clear_text_on_public_address = true if that network is yours alone
"#,
    );
}

#[test]
fn names_of_the_api_are_whole_names() {
    told(
        &server(
            r#"[api]
allowed_hosts = ["api.example.com", "*.example.com", "https://api.example.com", "API.example.com.", "127.0.0.1"]
metrics_without_tokens = true
"#,
        ),
        r#"error[config.bad_value]: "*.example.com" cannot be in api.allowed_hosts: a wildcard would let the pages of others in
 --> peregrine.toml:2:37
  |
2 | allowed_hosts = ["api.example.com", "*.example.com", "https://api.example.com", "API.example.com.", "127.0.0.1"]
  |                                     ^^^^^^^^^^^^^^^
  = write the whole name, without scheme and port: "api.example.com"

error[config.bad_value]: "https://api.example.com" cannot be in api.allowed_hosts: a host has no scheme
 --> peregrine.toml:2:54
  |
2 | allowed_hosts = ["api.example.com", "*.example.com", "https://api.example.com", "API.example.com.", "127.0.0.1"]
  |                                                      ^^^^^^^^^^^^^^^^^^^^^^^^^
  = write the whole name, without scheme and port: "api.example.com"

error[config.duplicate]: api.example.com is in api.allowed_hosts twice
 --> peregrine.toml:2:81
  |
2 | allowed_hosts = ["api.example.com", "*.example.com", "https://api.example.com", "API.example.com.", "127.0.0.1"]
  |                                                                                 ^^^^^^^^^^^^^^^^^^
  = take one out

error[config.bad_value]: "127.0.0.1" cannot be in api.allowed_hosts: localhost and IP addresses are names of the API anyhow
 --> peregrine.toml:2:101
  |
2 | allowed_hosts = ["api.example.com", "*.example.com", "https://api.example.com", "API.example.com.", "127.0.0.1"]
  |                                                                                                     ^^^^^^^^^^^
  = write the whole name, without scheme and port: "api.example.com"

error[config.unknown_key]: unknown key `metrics_without_tokens` in [api]
 --> peregrine.toml:3:1
  |
3 | metrics_without_tokens = …
  | ^^^^^^^^^^^^^^^^^^^^^^
  = did you mean `metrics_without_token`?
"#,
    );
}

#[test]
fn listeners_are_addresses() {
    told(
        &server(
            r#"[edge]
http = [":80", "localhost:80", "0.0.0.0:80", "0.0.0.0:80"]
trusted_proxies = ["10.0.0.0/33"]
via_name = "my edge"
[edge.access_log]
format = "jsno"
[edge.limits]
max_header = "1KiB"
head_timeout = "0s"
[api]
listen = "7070"
"#,
        ),
        r#"error[config.bad_value]: ":80" is no address to listen on
 --> peregrine.toml:2:9
  |
2 | http = [":80", "localhost:80", "0.0.0.0:80", "0.0.0.0:80"]
  |         ^^^^^
  = write "0.0.0.0:80" or "[::]:80" for every address, "127.0.0.1:80" for this machine only

error[config.bad_value]: "localhost:80" is no address to listen on
 --> peregrine.toml:2:16
  |
2 | http = [":80", "localhost:80", "0.0.0.0:80", "0.0.0.0:80"]
  |                ^^^^^^^^^^^^^^
  = write an IP address and a port: "0.0.0.0:80"

error[config.duplicate]: 0.0.0.0:80 is in edge.http twice
 --> peregrine.toml:2:46
  |
2 | http = [":80", "localhost:80", "0.0.0.0:80", "0.0.0.0:80"]
  |                                              ^^^^^^^^^^^^
  = take one out

error[config.bad_value]: "10.0.0.0/33" is no network
 --> peregrine.toml:3:20
  |
3 | trusted_proxies = ["10.0.0.0/33"]
  |                    ^^^^^^^^^^^^^
  = write an address, or an address and the length of its prefix: "10.0.0.0/8"

error[config.bad_value]: "my edge" is no name for Via
 --> peregrine.toml:4:12
  |
4 | via_name = "my edge"
  |            ^^^^^^^^^
  = use letters, digits, - and . only

error[config.missing]: [edge.access_log] does not say where to
 --> peregrine.toml:5:7
  |
5 | [edge.access_log]
  |       ^^^^^^^^^^
  = add to = "stdout", or to = "/var/log/peregrine/access.log"

error[config.bad_value]: "jsno" is no value of edge.access_log.format
 --> peregrine.toml:6:10
  |
6 | format = "jsno"
  |          ^^^^^^
  = did you mean "json"?

error[config.bad_value]: edge.limits.max_header is "1KiB", which is not from 8KiB to 16MiB
 --> peregrine.toml:8:14
  |
8 | max_header = "1KiB"
  |              ^^^^^^
  = write a value from 8KiB to 16MiB

error[config.bad_value]: edge.limits.head_timeout is "0s", which is not from 1ms to 1h
 --> peregrine.toml:9:16
  |
9 | head_timeout = "0s"
  |                ^^^^
  = write a value from 1ms to 1h

error[config.bad_value]: "7070" is no address to listen on
  --> peregrine.toml:11:10
   |
11 | listen = "7070"
   |          ^^^^^^
   = write an IP address and a port: "127.0.0.1:7070"
"#,
    );
}

#[test]
fn an_edge_listens_somewhere() {
    told(
        &server(
            r#"[edge]
http = []
"#,
        ),
        r#"error[config.bad_value]: edge.http has 0 addresses
 --> peregrine.toml:2:8
  |
2 | http = []
  |        ^^
  = write 1 to 64 of them: ["0.0.0.0:80"]
"#,
    );
}

#[test]
fn a_machine_says_what_runs_there() {
    told(
        &server(
            r#"[machine.a]
address = "10.0.0.2"
[machine.b]
docker = "unix:///var/run/docker.sock"
process = true
[machine.c]
docker = "/var/run/docker.sock"
[machine.d]
process = true
ssh_key = "key"
"#,
        ),
        r#"error[config.missing]: [machine.a] does not say what runs instances there
 --> peregrine.toml:1:10
  |
1 | [machine.a]
  |          ^
  = add docker = "unix:///var/run/docker.sock" (or tcp://, ssh://), or process = true

error[config.conflict]: [machine.b] is given both docker and process
 --> peregrine.toml:5:1
  |
5 | process = true
  | ^^^^^^^
  = a machine has one of them: take one out

error[config.bad_value]: "/var/run/docker.sock" is no address of a Docker engine
 --> peregrine.toml:7:10
  |
7 | docker = "/var/run/docker.sock"
  |          ^^^^^^^^^^^^^^^^^^^^^^
  = write "unix:///var/run/docker.sock", "tcp://10.0.0.2:2376" or "ssh://user@10.0.0.3"

error[config.conflict]: machine.d.ssh_key has no meaning here: a process machine is this one
  --> peregrine.toml:10:1
   |
10 | ssh_key = "key"
   | ^^^^^^^
   = take it out
"#,
    );
}

#[test]
fn docker_over_tcp_has_tls_or_is_ours_alone() {
    told(
        &server(
            r#"[machine.a]
docker = "tcp://10.0.0.2:2375"
[machine.b]
docker = "tcp://10.0.0.2:2376"
tls = { ca = "ca.pem" }
[machine.c]
docker = "tcp://docker.example.com:2376"
allow_clear_text = true
"#,
        ),
        r#"error[config.unsafe]: 10.0.0.2:2375 would be reached in clear text: who can reach it is root there
 --> peregrine.toml:2:10
  |
2 | docker = "tcp://10.0.0.2:2375"
  |          ^^^^^^^^^^^^^^^^^^^^^
  = add tls = { ca = "ca.pem", cert = "cert.pem", key = "key.pem" }, use ssh://, or say allow_clear_text = true if that network is yours alone

error[config.missing]: [machine.b.tls] has no cert
 --> peregrine.toml:5:1
  |
5 | tls = { ca = "ca.pem" }
  | ^^^
  = add cert = "cert.pem": all of ca, cert and key are needed

error[config.missing]: [machine.b.tls] has no key
 --> peregrine.toml:5:1
  |
5 | tls = { ca = "ca.pem" }
  | ^^^
  = add key = "key.pem": all of ca, cert and key are needed

error[config.missing]: [machine.c] has no address
 --> peregrine.toml:6:10
  |
6 | [machine.c]
  |          ^
  = add address = "10.0.0.2": the IP address at which the edge reaches it
"#,
    );
}

#[test]
fn docker_over_ssh_has_keys_on_both_sides() {
    told(
        &server(
            r#"[machine.a]
docker = "ssh://me@10.0.0.3"
[machine.b]
docker = "ssh://me@10.0.0.3"
ssh_key = "~/.ssh/id_ed25519"
host_key = "10.0.0.3 ssh-ed25519 AAAA"
address = "host"
[machine.c]
docker = "ssh://10.0.0.3"
"#,
        ),
        r#"error[config.missing]: an ssh:// address needs a private key
 --> peregrine.toml:2:10
  |
2 | docker = "ssh://me@10.0.0.3"
  |          ^^^^^^^^^^^^^^^^^^^
  = add ssh_key = "/home/you/.ssh/id_ed25519"

error[config.missing]: an ssh:// address needs the host's public key, so that nobody else can pass for it
 --> peregrine.toml:2:10
  |
2 | docker = "ssh://me@10.0.0.3"
  |          ^^^^^^^^^^^^^^^^^^^
  = add host_key = "ssh-ed25519 AAAA…": `ssh-keyscan -t ed25519 HOST` prints it, compare it there

error[config.bad_value]: "~/.ssh/id_ed25519" is no path that can be used in machine.b.ssh_key
 --> peregrine.toml:5:11
  |
5 | ssh_key = "~/.ssh/id_ed25519"
  |           ^^^^^^^^^^^^^^^^^^^
  = write the whole path, or one relative to this file; ~ is not expanded

error[config.bad_value]: "10.0.0.3 ssh-ed25519 AAAA" is no public key of a host
 --> peregrine.toml:6:12
  |
6 | host_key = "10.0.0.3 ssh-ed25519 AAAA"
  |            ^^^^^^^^^^^^^^^^^^^^^^^^^^^
  = write it as `ssh-keyscan -t ed25519 HOST` prints it, without the host: "ssh-ed25519 AAAA…"

error[config.bad_value]: "host" is no IP address
 --> peregrine.toml:7:11
  |
7 | address = "host"
  |           ^^^^^^
  = write the IP address at which the edge reaches the machine, such as "10.0.0.2"

error[config.bad_value]: "ssh://10.0.0.3" is no address of a Docker engine
 --> peregrine.toml:9:10
  |
9 | docker = "ssh://10.0.0.3"
  |          ^^^^^^^^^^^^^^^^
  = write "unix:///var/run/docker.sock", "tcp://10.0.0.2:2376" or "ssh://user@10.0.0.3"
"#,
    );
}

#[test]
fn a_service_has_a_machine_that_can_run_it() {
    told(
        &server(
            r#"[machine.host-a]
docker = "unix:///var/run/docker.sock"
[machine.host-b]
docker = "unix:///run/b.sock"
[service.web]
image = "a"
port = 1
[service.api]
image = "a"
port = 1
machine = "hosta"
[service.docs]
command = ["./docs"]
[service.old]
command = ["./old"]
machine = "host-a"
"#,
        ),
        r#"error[config.missing]: [service.web] could run on several machines
 --> peregrine.toml:5:10
  |
5 | [service.web]
  |          ^^^
  = add machine = "host-a", or another of them

error[config.bad_value]: there is no machine "hosta"
  --> peregrine.toml:11:11
   |
11 | machine = "hosta"
   |           ^^^^^^^
   = did you mean "host-a"?

error[config.missing]: no machine in this file can run a command, which [service.docs] needs
  --> peregrine.toml:12:10
   |
12 | [service.docs]
   |          ^^^^
   = add [machine.here] with process = true

error[config.conflict]: machine host-a cannot run a command
  --> peregrine.toml:16:11
   |
16 | machine = "host-a"
   |           ^^^^^^^^
   = name a machine that has process = …
"#,
    );
}
