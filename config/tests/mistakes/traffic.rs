//! How a service is reached, probed and moved.

use crate::{manifest, told};

#[test]
fn hosts_are_hosts() {
    told(
        &manifest(
            r#"[service.web]
upstreams = ["10.0.0.5:8080"]
hosts = ["https://shop.example.com", "shop.example.com:443", "sh*p.example.com", "a..b", "shop.example.com/a b"]
"#,
        ),
        r#"error[config.bad_value]: "https://shop.example.com" is no host: a host has no scheme
 --> peregrine.toml:3:10
  |
3 | hosts = ["https://shop.example.com", "shop.example.com:443", "sh*p.example.com", "a..b", "shop.example.com/a b"]
  |          ^^^^^^^^^^^^^^^^^^^^^^^^^^
  = write "shop.example.com", "*.example.com" or "*", with a path behind it if need be: "shop.example.com/api"

error[config.bad_value]: "shop.example.com:443" is no host: a host has no port: [edge] says where to listen
 --> peregrine.toml:3:38
  |
3 | hosts = ["https://shop.example.com", "shop.example.com:443", "sh*p.example.com", "a..b", "shop.example.com/a b"]
  |                                      ^^^^^^^^^^^^^^^^^^^^^^
  = write "shop.example.com", "*.example.com" or "*", with a path behind it if need be: "shop.example.com/api"

error[config.bad_value]: "sh*p.example.com" is no host: a wildcard stands for whole labels at the front: *.example.com
 --> peregrine.toml:3:62
  |
3 | hosts = ["https://shop.example.com", "shop.example.com:443", "sh*p.example.com", "a..b", "shop.example.com/a b"]
  |                                                              ^^^^^^^^^^^^^^^^^^
  = write "shop.example.com", "*.example.com" or "*", with a path behind it if need be: "shop.example.com/api"

error[config.bad_value]: "a..b" is no host: a host has no empty labels
 --> peregrine.toml:3:82
  |
3 | hosts = ["https://shop.example.com", "shop.example.com:443", "sh*p.example.com", "a..b", "shop.example.com/a b"]
  |                                                                                  ^^^^^^
  = write "shop.example.com", "*.example.com" or "*", with a path behind it if need be: "shop.example.com/api"

error[config.bad_value]: "shop.example.com/a b" is no host: a path prefix has no ?, #, spaces or unescaped characters beyond ASCII
 --> peregrine.toml:3:90
  |
3 | hosts = ["https://shop.example.com", "shop.example.com:443", "sh*p.example.com", "a..b", "shop.example.com/a b"]
  |                                                                                          ^^^^^^^^^^^^^^^^^^^^^^
  = write "shop.example.com", "*.example.com" or "*", with a path behind it if need be: "shop.example.com/api"
"#,
    );
}

#[test]
fn a_host_and_path_lead_to_one_service() {
    told(
        &manifest(
            r#"[service.web]
upstreams = ["10.0.0.5:8080"]
hosts = ["shop.example.com", "shop.example.com/api/"]

[service.api]
upstreams = ["10.0.0.6:8080"]
hosts = ["SHOP.example.com/api", "api.example.com", "api.example.com."]
"#,
        ),
        r#"error[config.duplicate]: "SHOP.example.com/api" is a way into service web already
 --> peregrine.toml:7:10
  |
7 | hosts = ["SHOP.example.com/api", "api.example.com", "api.example.com."]
  |          ^^^^^^^^^^^^^^^^^^^^^^
  = a host and path lead to one service: take one out, or add a path to one of them

error[config.duplicate]: "api.example.com." is a way into this service already
 --> peregrine.toml:7:53
  |
7 | hosts = ["SHOP.example.com/api", "api.example.com", "api.example.com."]
  |                                                     ^^^^^^^^^^^^^^^^^^
  = a host and path lead to one service: take one out, or add a path to one of them
"#,
    );
}

#[test]
fn steps_rise_to_100() {
    told(
        &manifest(
            r#"[service.a]
image = "a"
port = 1
move = { steps = [50, 10, 100] }
[service.b]
image = "a"
port = 1
move = { steps = [1, 50] }
[service.c]
image = "a"
port = 1
move = { steps = [0, 101] }
[service.d]
image = "a"
port = 1
move = { steps = [], step_hold = "5s", step_max = "1s" }
"#,
        ),
        r#"error[config.bad_value]: service.a.move.steps do not rise
 --> peregrine.toml:4:18
  |
4 | move = { steps = [50, 10, 100] }
  |                  ^^^^^^^^^^^^^
  = write percentages that rise, the last one 100, such as [1, 10, 50, 100]

error[config.bad_value]: service.b.move.steps do not end at 100
 --> peregrine.toml:8:18
  |
8 | move = { steps = [1, 50] }
  |                  ^^^^^^^
  = write percentages that rise, the last one 100, such as [1, 10, 50, 100]

error[config.bad_value]: service.c.move.steps is 0, which is not from 1 to 100
  --> peregrine.toml:12:19
   |
12 | move = { steps = [0, 101] }
   |                   ^
   = write a value from 1 to 100

error[config.bad_value]: service.c.move.steps is 101, which is not from 1 to 100
  --> peregrine.toml:12:22
   |
12 | move = { steps = [0, 101] }
   |                      ^^^
   = write a value from 1 to 100

error[config.bad_value]: service.d.move.steps do not end at 100
  --> peregrine.toml:16:18
   |
16 | move = { steps = [], step_hold = "5s", step_max = "1s" }
   |                  ^^
   = write percentages that rise, the last one 100, such as [1, 10, 50, 100]

error[config.bad_value]: service.d.move.step_max is shorter than step_hold
  --> peregrine.toml:16:51
   |
16 | move = { steps = [], step_hold = "5s", step_max = "1s" }
   |                                                   ^^^^
   = a step is held at least for step_hold and waits at most for step_max: write a longer step_max
"#,
    );
}

#[test]
fn amounts_have_units_and_limits() {
    told(
        &manifest(
            r#"[service.web]
image = "a"
port = 1
resources = { memory = "512", cpu = 0, pids = -1 }
health = { path = "healthz", interval = "30", timeout = "2h" }
move = { soak = "1w", abort_on = { error_rate = "1", p95_increase = true } }
"#,
        ),
        r#"error[config.bad_value]: "512" is no size
 --> peregrine.toml:4:24
  |
4 | resources = { memory = "512", cpu = 0, pids = -1 }
  |                        ^^^^^
  = write a number and a unit (B, KB, MB, GB, KiB, MiB, GiB): "512MiB", "10MB"

error[config.bad_value]: service.web.resources.cpu is 0, which is not from 0.01 to 4096
 --> peregrine.toml:4:37
  |
4 | resources = { memory = "512", cpu = 0, pids = -1 }
  |                                     ^
  = write a value from 0.01 to 4096

error[config.bad_value]: service.web.resources.pids is -1, which is not from 1 to 4194304
 --> peregrine.toml:4:47
  |
4 | resources = { memory = "512", cpu = 0, pids = -1 }
  |                                               ^^
  = write a value from 1 to 4194304

error[config.bad_value]: "healthz" is no path that can be requested
 --> peregrine.toml:5:19
  |
5 | health = { path = "healthz", interval = "30", timeout = "2h" }
  |                   ^^^^^^^^^
  = write it from the first slash on, escaped: "/healthz"

error[config.bad_value]: "30" is no duration
 --> peregrine.toml:5:41
  |
5 | health = { path = "healthz", interval = "30", timeout = "2h" }
  |                                         ^^^^
  = write a number and a unit (ms, s, m, h, d) without a space: "200ms", "30s", "1m30s"

error[config.bad_value]: service.web.health.timeout is "2h", which is not from 1ms to 1h
 --> peregrine.toml:5:57
  |
5 | health = { path = "healthz", interval = "30", timeout = "2h" }
  |                                                         ^^^^
  = write a value from 1ms to 1h

error[config.bad_value]: "1w" is no duration
 --> peregrine.toml:6:17
  |
6 | move = { soak = "1w", abort_on = { error_rate = "1", p95_increase = true } }
  |                 ^^^^
  = write a number and a unit (ms, s, m, h, d) without a space: "200ms", "30s", "1m30s"

error[config.bad_value]: "1" is no percentage
 --> peregrine.toml:6:49
  |
6 | move = { soak = "1w", abort_on = { error_rate = "1", p95_increase = true } }
  |                                                 ^^^
  = write "1%" or 0.01

error[config.wrong_type]: service.web.move.abort_on.p95_increase has to be a share, but is true or false
 --> peregrine.toml:6:69
  |
6 | move = { soak = "1w", abort_on = { error_rate = "1", p95_increase = true } }
  |                                                                     ^^^^
  = write "10%" or 0.1
"#,
    );
}

#[test]
fn a_word_that_is_none_is_told_with_the_words() {
    told(
        &manifest(
            r#"[service.web]
image = "a"
port = 1
protocol = "h2"
balance = "least-in-fligth"
health = { probe = "grpc" }
"#,
        ),
        r#"error[config.bad_value]: "h2" is no value of service.web.protocol
 --> peregrine.toml:4:12
  |
4 | protocol = "h2"
  |            ^^^^
  = did you mean "h2c"?

error[config.bad_value]: "least-in-fligth" is no value of service.web.balance
 --> peregrine.toml:5:11
  |
5 | balance = "least-in-fligth"
  |           ^^^^^^^^^^^^^^^^^
  = did you mean "least_in_flight"?

error[config.bad_value]: "grpc" is no value of service.web.health.probe
 --> peregrine.toml:6:20
  |
6 | health = { probe = "grpc" }
  |                    ^^^^^^
  = write one of: http, tcp, none
"#,
    );
}

#[test]
fn a_balance_by_hash_says_what_to_hash() {
    told(
        &manifest(
            r#"[service.a]
image = "a"
port = 1
balance = { hash_header = "x tenant" }
[service.b]
image = "a"
port = 1
balance = {}
[service.c]
image = "a"
port = 1
balance = { hash_header = "a", hash_cookie = "b" }
"#,
        ),
        r#"error[config.bad_value]: "x tenant" is no name of a header or cookie
 --> peregrine.toml:4:27
  |
4 | balance = { hash_header = "x tenant" }
  |                           ^^^^^^^^^^
  = use letters, digits, - and _, at most 63 characters: "x-tenant"

error[config.missing]: service.b.balance does not say what to hash
 --> peregrine.toml:8:1
  |
8 | balance = {}
  | ^^^^^^^
  = write { hash_header = "x-tenant" } or { hash_cookie = "session" }

error[config.conflict]: a request is hashed by a header or by a cookie
  --> peregrine.toml:12:32
   |
12 | balance = { hash_header = "a", hash_cookie = "b" }
   |                                ^^^^^^^^^^^
   = take one out
"#,
    );
}

#[test]
fn probes_agree_with_their_path_and_their_service() {
    told(
        &manifest(
            r#"[service.a]
image = "a"
port = 1
health = { probe = "http" }
[service.b]
image = "a"
port = 1
health = { probe = "tcp", path = "/" }
[service.c]
image = "a"
port = 1
health = { probe = "none" }
"#,
        ),
        r#"error[config.missing]: [service.a.health] asks for an HTTP probe but has no path
 --> peregrine.toml:4:1
  |
4 | health = { probe = "http" }
  | ^^^^^^
  = add path = "/healthz": what answers 2xx or 3xx when the copy is well

error[config.conflict]: service.b.health.path has no meaning here: only an HTTP probe asks for a path
 --> peregrine.toml:8:27
  |
8 | health = { probe = "tcp", path = "/" }
  |                           ^^^^
  = take out either path or probe

error[config.conflict]: service.c.health.probe can be "none" for fixed upstreams only: a rollout waits for a good probe
  --> peregrine.toml:12:20
   |
12 | health = { probe = "none" }
   |                    ^^^^^^
   = write probe = "tcp", or path = "/healthz"
"#,
    );
}

#[test]
fn what_rules_change_can_be_changed_and_secrets_are_not_shown() {
    told(
        &manifest(
            r#"[service.a]
image = "a"
port = 1
[service.a.rules]
redirects = [{ from = "/old/*", to = "/old/new" }]
rewrite = { strip_prefix = "/api/" }
[service.a.rules.headers.request]
set = { Host = "hunter2" }
"#,
        ),
        r#"error[config.bad_value]: the redirect from "/old/*" to "/old/new" leads to itself
 --> peregrine.toml:5:14
  |
5 | redirects = [{ from = "/old/*", to = "/old/new" }]
  |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  = write a path that it is not for, or the address of another site

error[config.bad_value]: strip_prefix "/api/" ends in a slash
 --> peregrine.toml:6:11
  |
6 | rewrite = { strip_prefix = "/api/" }
  |           ^^^^^^^^^^^^^^^^^^^^^^^^^^
  = write it without, such as /api: it ends where a segment of the path does

error[config.bad_value]: the header field "Host" cannot be changed: it frames, routes or identifies
 --> peregrine.toml:7:1
  |
7 | [service.a.rules.headers.request]
  | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  = the edge alone writes such fields (docs/security.md). Take it out, or use a name of your own
"#,
    );
}

#[test]
fn a_header_that_says_for_whom_a_connection_is_has_a_version_and_a_connection_of_its_own() {
    told(
        &manifest(
            r#"[service.a]
upstreams = ["10.0.0.5:8080"]
protocol = "h2c"
send_proxy_protocol = "v2"

[service.b]
upstreams = ["10.0.0.6:8080"]
send_proxy_protocol = "v3"
"#,
        ),
        r#"error[config.conflict]: service.a.send_proxy_protocol says for whom a connection is, and one of h2c serves many clients
 --> peregrine.toml:4:1
  |
4 | send_proxy_protocol = "v2"
  | ^^^^^^^^^^^^^^^^^^^
  = take it out, or write protocol = "http1"

error[config.bad_value]: "v3" is no value of service.b.send_proxy_protocol
 --> peregrine.toml:8:23
  |
8 | send_proxy_protocol = "v3"
  |                       ^^^^
  = did you mean "v1"?
"#,
    );
}
