//! What a service runs.

use crate::{manifest, told};

#[test]
fn a_missing_port_is_told() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
"#,
        ),
        r#"error[config.missing]: [service.web] has an image but no port
 --> peregrine.toml:1:10
  |
1 | [service.web]
  |          ^^^
  = add port = 3000: the port on which the container listens
"#,
    );
}

#[test]
fn a_service_says_what_runs() {
    told(
        &manifest(
            r#"[service.web]
hosts = ["shop.example.com"]
"#,
        ),
        r#"error[config.missing]: [service.web] does not say what runs
 --> peregrine.toml:1:10
  |
1 | [service.web]
  |          ^^^
  = add image = "shop:1.4" and port = 3000, or command = ["./shop"], or upstreams = ["10.0.0.5:8080"]
"#,
    );
}

#[test]
fn a_service_is_either_run_or_fixed() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
port = 3000
upstreams = ["10.0.0.5:8080"]

[service.api]
command = ["./api"]
port = 3000
capabilities = ["KILL"]

[service.old]
upstreams = ["10.0.0.5:8080"]
port = 8080
replicas = 2
env = { A = "1" }
move = { soak = "1m" }
"#,
        ),
        r#"error[config.conflict]: [service.web] has upstreams and also something to run
 --> peregrine.toml:2:1
  |
2 | image = "shop:1.4"
  | ^^^^^
  = upstreams are servers that Peregrine does not run: keep either upstreams or image or command

error[config.conflict]: service.api.port has no meaning here: a command is given a free port, in PORT and for {port} in its arguments
 --> peregrine.toml:8:1
  |
8 | port = 3000
  | ^^^^
  = take it out

error[config.conflict]: service.api.capabilities has no meaning here: a command has what the user of `peregrine serve` has
 --> peregrine.toml:9:1
  |
9 | capabilities = ["KILL"]
  | ^^^^^^^^^^^^
  = take it out

error[config.conflict]: service.old.port has no meaning here: each upstream has its own port
  --> peregrine.toml:13:1
   |
13 | port = 8080
   | ^^^^
   = take it out

error[config.conflict]: service.old.replicas has no meaning here: Peregrine does not run the servers in upstreams
  --> peregrine.toml:14:1
   |
14 | replicas = 2
   | ^^^^^^^^
   = take it out

error[config.conflict]: service.old.env has no meaning here: Peregrine does not run the servers in upstreams
  --> peregrine.toml:15:1
   |
15 | env = { A = … }
   | ^^^
   = take it out

error[config.conflict]: service.old.move has no meaning here: Peregrine does not run the servers in upstreams
  --> peregrine.toml:16:1
   |
16 | move = { soak = "1m" }
   | ^^^^
   = take it out
"#,
    );
}

#[test]
fn a_container_is_given_back_capabilities_by_their_names_and_none_that_is_power_over_the_machine() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
port = 3000
capabilities = [
  "SETUID",
  "CAP_SETGID",
  "chwon",
  "SYS_ADMIN",
  "SETUID",
  7,
]
"#,
        ),
        r#"error[config.bad_value]: "CAP_SETGID" is no capability that a container can be given
 --> peregrine.toml:6:3
  |
6 |   "CAP_SETGID",
  |   ^^^^^^^^^^^^
  = did you mean "SETGID"?

error[config.bad_value]: "chwon" is no capability that a container can be given
 --> peregrine.toml:7:3
  |
7 |   "chwon",
  |   ^^^^^^^
  = did you mean "CHOWN"?

error[config.bad_value]: "SYS_ADMIN" is no capability that a container can be given
 --> peregrine.toml:8:3
  |
8 |   "SYS_ADMIN",
  |   ^^^^^^^^^^^
  = write some of: AUDIT_WRITE, CHOWN, DAC_OVERRIDE, FOWNER, FSETID, IPC_LOCK, KILL, MKNOD, NET_BIND_SERVICE, NET_RAW, SETFCAP, SETGID, SETPCAP, SETUID, SYS_CHROOT, SYS_NICE; every other one is power over the machine

error[config.duplicate]: "SETUID" is in service.web.capabilities twice
 --> peregrine.toml:9:3
  |
9 |   "SETUID",
  |   ^^^^^^^^
  = take one out

error[config.wrong_type]: service.web.capabilities has to be a string, but is a whole number
  --> peregrine.toml:10:3
   |
10 |   7,
   |   ^
   = write "SETUID"
"#,
    );
}

#[test]
fn several_copies_of_a_single_writer_are_a_contradiction() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
port = 3000
replicas = 2
move = { single_writer = true }
"#,
        ),
        r#"error[config.conflict]: service.web.replicas is 2, and of a single_writer at most one copy may run
 --> peregrine.toml:4:12
  |
4 | replicas = 2
  |            ^
  = write replicas = 1, or take single_writer out of its move settings
"#,
    );
}

#[test]
fn zero_copies_are_no_service() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
port = 3000
replicas = 0
"#,
        ),
        r#"error[config.bad_value]: a service without a copy answers nobody
 --> peregrine.toml:4:12
  |
4 | replicas = 0
  |            ^
  = write replicas = 1 or more, or take the service out
"#,
    );
}

#[test]
fn names_are_labels_and_some_are_taken() {
    told(
        &manifest(
            r#"[service.my_shop]
upstreams = ["10.0.0.5:8080"]
[service.peregrine]
upstreams = ["10.0.0.5:8080"]
"#,
        ),
        r#"error[config.bad_name]: "my_shop" is no name for a service
 --> peregrine.toml:1:10
  |
1 | [service.my_shop]
  |          ^^^^^^^
  = use a-z, 0-9 and hyphens inside, at most 63 characters, such as web or host-a

error[config.bad_name]: a service cannot be called peregrine: that name is Peregrine's own
 --> peregrine.toml:3:10
  |
3 | [service.peregrine]
  |          ^^^^^^^^^
  = choose another name
"#,
    );
}

#[test]
fn upstreams_are_addresses() {
    told(
        &manifest(
            r#"[service.web]
upstreams = ["10.0.0.5", "http://a:80", "10.0.0.6:80", "10.0.0.6:80", { address = "a:1", weight = 0 }, { weight = 2 }]
[service.none]
upstreams = []
"#,
        ),
        r#"error[config.bad_value]: "10.0.0.5" is no server's address
 --> peregrine.toml:2:14
  |
2 | upstreams = ["10.0.0.5", "http://a:80", "10.0.0.6:80", "10.0.0.6:80", { address = "a:1", weight = 0 }, { weight = 2 }]
  |              ^^^^^^^^^^
  = write an address or host name with a port and without a scheme: "10.0.0.5:8080"

error[config.bad_value]: "http://a:80" is no server's address
 --> peregrine.toml:2:26
  |
2 | upstreams = ["10.0.0.5", "http://a:80", "10.0.0.6:80", "10.0.0.6:80", { address = "a:1", weight = 0 }, { weight = 2 }]
  |                          ^^^^^^^^^^^^^
  = write an address or host name with a port and without a scheme: "10.0.0.5:8080"

error[config.duplicate]: 10.0.0.6:80 is in service.web.upstreams twice
 --> peregrine.toml:2:56
  |
2 | upstreams = ["10.0.0.5", "http://a:80", "10.0.0.6:80", "10.0.0.6:80", { address = "a:1", weight = 0 }, { weight = 2 }]
  |                                                        ^^^^^^^^^^^^^
  = take one out, and say { address = …, weight = 2 } if it is to get more

error[config.bad_value]: service.web.upstreams.weight is 0, which is not from 1 to 1000
 --> peregrine.toml:2:99
  |
2 | upstreams = ["10.0.0.5", "http://a:80", "10.0.0.6:80", "10.0.0.6:80", { address = "a:1", weight = 0 }, { weight = 2 }]
  |                                                                                                   ^
  = write a value from 1 to 1000

error[config.missing]: an upstream has no address
 --> peregrine.toml:2:104
  |
2 | upstreams = ["10.0.0.5", "http://a:80", "10.0.0.6:80", "10.0.0.6:80", { address = "a:1", weight = 0 }, { weight = 2 }]
  |                                                                                                        ^^^^^^^^^^^^^^
  = write { address = "10.0.0.5:8080", weight = 2 }

error[config.bad_value]: service.none.upstreams has 0 servers
 --> peregrine.toml:4:13
  |
4 | upstreams = []
  |             ^^
  = write 1 to 1000 of them: ["10.0.0.5:8080"]
"#,
    );
}

#[test]
fn a_command_is_a_list() {
    told(
        &manifest(
            r#"[service.web]
command = "node server.js"
[service.api]
command = []
env = { PORT = "1" }
"#,
        ),
        r#"error[config.wrong_type]: service.web.command is a list: no shell splits it
 --> peregrine.toml:2:11
  |
2 | command = "node server.js"
  |           ^^^^^^^^^^^^^^^^
  = write ["node", "server.js"], or ["sh", "-c", …] for what only a shell can do

error[config.bad_value]: service.api.command names no program
 --> peregrine.toml:4:11
  |
4 | command = []
  |           ^^
  = write ["program", "argument"]

error[config.bad_name]: PORT is set by Peregrine: it tells the command where to listen
 --> peregrine.toml:5:9
  |
5 | env = { PORT = … }
  |         ^^^^
  = take it out
"#,
    );
}

#[test]
fn an_image_is_a_reference() {
    told(
        &manifest(
            r#"[service.web]
image = "https://example.com/shop:1.4"
port = 3000
directory = "/app"
"#,
        ),
        r#"error[config.bad_value]: "https://example.com/shop:1.4" is no reference of an image
 --> peregrine.toml:2:9
  |
2 | image = "https://example.com/shop:1.4"
  |         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  = write it as for docker run: "shop:1.4" or "shop@sha256:…", without a scheme

error[config.conflict]: service.web.directory has no meaning here: an image has its own working directory
 --> peregrine.toml:4:1
  |
4 | directory = "/app"
  | ^^^^^^^^^
  = take it out
"#,
    );
}

#[test]
fn labels_and_environments_have_names() {
    told(
        &manifest(
            r#"[service.web]
image = "a"
port = 1
labels = { "a b" = "c" }
env = { "A=B" = "secret", C = 5 }
"#,
        ),
        r#"error[config.bad_value]: service.web.labels."a b" is no label
 --> peregrine.toml:4:20
  |
4 | labels = { "a b" = "c" }
  |                    ^^^
  = a label's name has letters, digits, - _ . /, its value any text; both at most 63 characters

error[config.bad_name]: service.web.env."A=B" is no environment variable
 --> peregrine.toml:5:9
  |
5 | env = { "A=B" = …, C = … }
  |         ^^^^^
  = names have no =, and neither names nor values have NUL

error[config.wrong_type]: service.web.env.C has to be a string
 --> peregrine.toml:5:31
  |
5 | env = { "A=B" = …, C = … }
  |                        ^
  = put the value in quotes, also if it is a number
"#,
    );
}
