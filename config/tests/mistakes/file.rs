//! The file as a whole: syntax, keys, types, places, and what is never shown.

use peregrine_config::{MAX_MISTAKES, Manifest};

use crate::{manifest, told};

#[test]
fn a_mistake_is_data_too() {
    let mistakes = manifest("[service.web]\nimage = \"shop:1.4\"\nport = 3000\nhost = []\n");
    let json = serde_json::to_value(&mistakes).unwrap();
    let expected = serde_json::json!([{
        "file": "peregrine.toml",
        "line": 4,
        "column": 1,
        "code": "config.unknown_key",
        "message": "unknown key `host` in [service.web]",
        "hint": "did you mean `hosts`?",
    }]);
    assert_eq!(json, expected);
}

#[test]
fn a_file_that_cannot_be_read_is_told_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peregrine.toml");
    let name = path.display();
    let missing = Manifest::load(&path).unwrap_err();
    told(
        &missing,
        &format!(
            "error[config.unreadable]: cannot read {name}: No such file or directory (os error 2)\n  = check the path, and that you may read it\n"
        ),
    );
    assert_eq!((missing.list()[0].line, missing.list()[0].column), (0, 0));
    std::fs::write(&path, b"[service.web]\n\xff").unwrap();
    told(
        &Manifest::load(&path).unwrap_err(),
        &format!(
            "error[config.unreadable]: cannot read {name}: byte 14 is not UTF-8\n  = save it as UTF-8\n"
        ),
    );
    std::fs::write(&path, vec![b'\n'; 4 * 1024 * 1024 + 1]).unwrap();
    told(
        &Manifest::load(&path).unwrap_err(),
        &format!(
            "error[config.unreadable]: cannot read {name}: it is larger than 4194304 bytes\n  = is it the right file?\n"
        ),
    );
}

#[test]
fn mistakes_beyond_the_limit_are_counted() {
    let text: String = (0..MAX_MISTAKES + 7).map(|n| format!("[service.s{n}]\n")).collect();
    let mistakes = manifest(&text);
    assert_eq!((mistakes.list().len(), mistakes.more()), (MAX_MISTAKES, 7));
    assert!(mistakes.to_string().ends_with("\nand 7 more mistakes\n"));
}

#[test]
fn a_file_of_windows_is_read_as_any_other() {
    let mistakes =
        manifest("\u{feff}[service.web]\r\nimage = \"shop:1.4\"\r\nprot = 3000\r\nport = 3000\r\n");
    let mistake = &mistakes.list()[0];
    assert_eq!((mistakes.list().len(), mistake.line, mistake.column), (1, 3, 1));
    assert!(mistakes.to_string().contains("\n3 | prot = …\n  | ^^^^\n"), "{mistakes}");
}

#[test]
fn control_characters_of_a_file_never_reach_the_terminal() {
    let mistakes = manifest("[service.web]\nimage = \"\u{1b}[2J\"\nport = 3000\n\"\u{1b}[1m\" = 1\n");
    let told = mistakes.to_string();
    assert!(!told.contains('\u{1b}'), "{told:?}");
}

#[test]
fn a_very_long_line_or_value_is_shown_in_part() {
    let mistakes = manifest(&format!("[service.web]\nimage = \"{}\"\nport = 3000\n", "!".repeat(100_000)));
    assert!(mistakes.to_string().len() < 1_000, "{} bytes", mistakes.to_string().len());
}

#[test]
fn an_unknown_key_is_told_with_the_one_that_was_meant() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
port = 3000
host = ["shop.example.com"]
"#,
        ),
        r#"error[config.unknown_key]: unknown key `host` in [service.web]
 --> peregrine.toml:4:1
  |
4 | host = …
  | ^^^^
  = did you mean `hosts`?
"#,
    );
}

#[test]
fn a_key_of_another_tool_is_understood() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
port = 3000
environment = { A = "1" }
[service.web.health]
colour = "red"
"#,
        ),
        r#"error[config.unknown_key]: unknown key `environment` in [service.web]
 --> peregrine.toml:4:1
  |
4 | environment = { A = … }
  | ^^^^^^^^^^^
  = did you mean `env`?

error[config.unknown_key]: unknown key `colour` in [service.web.health]
 --> peregrine.toml:6:1
  |
6 | colour = …
  | ^^^^^^
  = known keys here: healthy, interval, path, probe, timeout, unhealthy
"#,
    );
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_file() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4"
replicas = 0

[service.Web]
image = 5
port = 99999

[service.api]
imgae = "api:1"
port = 80
"#,
        ),
        r#"error[config.missing]: [service.web] has an image but no port
 --> peregrine.toml:1:10
  |
1 | [service.web]
  |          ^^^
  = add port = 3000: the port on which the container listens

error[config.bad_value]: a service without a copy answers nobody
 --> peregrine.toml:3:12
  |
3 | replicas = 0
  |            ^
  = write replicas = 1 or more, or take the service out

error[config.bad_name]: "Web" is no name for a service
 --> peregrine.toml:5:10
  |
5 | [service.Web]
  |          ^^^
  = use a-z, 0-9 and hyphens inside, at most 63 characters, such as web or host-a

error[config.wrong_type]: service.Web.image has to be a string, but is a whole number
 --> peregrine.toml:6:9
  |
6 | image = 5
  |         ^
  = write "shop:1.4"

error[config.bad_value]: service.Web.port is 99999, which is not from 1 to 65535
 --> peregrine.toml:7:8
  |
7 | port = 99999
  |        ^^^^^
  = write a value from 1 to 65535

error[config.missing]: [service.api] does not say what runs
 --> peregrine.toml:9:10
  |
9 | [service.api]
  |          ^^^
  = add image = "shop:1.4" and port = 3000, or command = ["./shop"], or upstreams = ["10.0.0.5:8080"]

error[config.unknown_key]: unknown key `imgae` in [service.api]
  --> peregrine.toml:10:1
   |
10 | imgae = …
   | ^^^^^
   = did you mean `image`?
"#,
    );
}

#[test]
fn broken_syntax_is_told_with_what_else_is_sure() {
    told(
        &manifest(
            r#"[service.web]
image = "shop:1.4
port = 3000
replicas = 0
"#,
        ),
        r#"error[config.syntax]: this is not TOML: invalid basic string, expected `"`
 --> peregrine.toml:2:18
  |
2 | image = "shop:1.4
  |                  ^
  = texts are in quotes, on one line: key = "text"

error[config.bad_value]: a service without a copy answers nobody
 --> peregrine.toml:4:12
  |
4 | replicas = 0
  |            ^
  = write replicas = 1 or more, or take the service out
"#,
    );
}

#[test]
fn a_file_without_services_is_no_manifest() {
    told(
        &manifest(
            r#"# nothing
"#,
        ),
        r#"error[config.missing]: there is no service in this file
 --> peregrine.toml:1:1
  |
1 | # nothing
  | ^
  = add [service.web] with image = … and port = …
"#,
    );
}

#[test]
fn what_belongs_to_the_server_is_told_where_it_belongs() {
    told(
        &manifest(
            r#"[edge]
http = ["127.0.0.1:80"]
[machine.a]
process = true
[service.web]
upstreams = ["10.0.0.5:80"]
"#,
        ),
        r#"error[config.unknown_key]: unknown key `edge` in this file
 --> peregrine.toml:1:2
  |
1 | [edge]
  |  ^^^^
  = [edge] belongs into the file of `peregrine serve`; a manifest has services only: take it out here

error[config.unknown_key]: unknown key `machine` in this file
 --> peregrine.toml:3:2
  |
3 | [machine.a]
  |  ^^^^^^^
  = [machine] belongs into the file of `peregrine serve`; a manifest has services only: take it out here
"#,
    );
}

#[test]
fn wrong_types_are_told_with_an_example() {
    told(
        &manifest(
            r#"[service.web]
image = ["shop:1.4"]
port = "3000"
hosts = "shop.example.com"
replicas = 1.5
preserve_host = "yes"
slow_start = 10
max_request_body = 1048576
env = ["A=1"]
health = "/healthz"
"#,
        ),
        r#"error[config.wrong_type]: service.web.image has to be a string, but is a list
 --> peregrine.toml:2:9
  |
2 | image = ["shop:1.4"]
  |         ^^^^^^^^^^^^
  = write "shop:1.4"

error[config.wrong_type]: service.web.port has to be a whole number, but is a string
 --> peregrine.toml:3:8
  |
3 | port = "3000"
  |        ^^^^^^
  = write a number such as 1, without quotes

error[config.wrong_type]: service.web.hosts has to be a list, but is a string
 --> peregrine.toml:4:9
  |
4 | hosts = "shop.example.com"
  |         ^^^^^^^^^^^^^^^^^^
  = write ["shop.example.com"]

error[config.wrong_type]: service.web.replicas has to be a whole number, but is a number
 --> peregrine.toml:5:12
  |
5 | replicas = 1.5
  |            ^^^
  = write a number such as 1, without quotes

error[config.wrong_type]: service.web.preserve_host has to be true or false, but is a string
 --> peregrine.toml:6:17
  |
6 | preserve_host = "yes"
  |                 ^^^^^
  = write true or false, without quotes

error[config.wrong_type]: service.web.slow_start has to be a duration with a unit, but is a whole number
 --> peregrine.toml:7:14
  |
7 | slow_start = 10
  |              ^^
  = write "30s", "200ms" or "5m"

error[config.wrong_type]: service.web.max_request_body has to be a size with a unit, but is a whole number
 --> peregrine.toml:8:20
  |
8 | max_request_body = 1048576
  |                    ^^^^^^^
  = write "512MiB", "10MB" or "64KiB"

error[config.wrong_type]: service.web.env has to be a table, but is a list
 --> peregrine.toml:9:7
  |
9 | env = …
  |       ^
  = write [service.web.env] and its keys below

error[config.wrong_type]: service.web.health has to be a table, but is a string
  --> peregrine.toml:10:10
   |
10 | health = "/healthz"
   |          ^^^^^^^^^^
   = write [service.web.health] and its keys below
"#,
    );
}

#[test]
fn nothing_that_may_be_secret_is_shown() {
    told(
        &manifest(
            r#"[service.web]
port = 1
image = "a"
env = { PASSWORD = "hunter2", PIN = 1234 }
healt = { path = "hunter2" }
service = { evn = { TOKEN = "hunter2" } }

[service.web.evn]
TOKEN = "hunter2"
[srevice.web.env]
TOKEN = "hunter2"
"#,
        ),
        r#"error[config.wrong_type]: service.web.env.PIN has to be a string
 --> peregrine.toml:4:37
  |
4 | env = { PASSWORD = …, PIN = … }
  |                             ^
  = put the value in quotes, also if it is a number

error[config.unknown_key]: unknown key `healt` in [service.web]
 --> peregrine.toml:5:1
  |
5 | healt = { path = … }
  | ^^^^^
  = did you mean `health`?

error[config.unknown_key]: unknown key `service` in [service.web]
 --> peregrine.toml:6:1
  |
6 | service = { evn = { TOKEN = … } }
  | ^^^^^^^
  = known keys here: balance, capabilities, command, directory, env, health, hosts, image, labels, machine, max_request_body, move, port, preserve_host, protocol, replicas, resources, rules, send_proxy_protocol, slow_start, sticky_cookie, timeouts, upstreams

error[config.unknown_key]: unknown key `evn` in [service.web]
 --> peregrine.toml:8:14
  |
8 | [service.web.evn]
  |              ^^^
  = did you mean `env`?

error[config.unknown_key]: unknown key `srevice` in this file
  --> peregrine.toml:10:2
   |
10 | [srevice.web.env]
   |  ^^^^^^^
   = did you mean `service`?
"#,
    );
}

#[test]
fn nothing_that_may_be_secret_is_shown_where_the_syntax_is_broken() {
    told(
        &manifest(
            r#"[service.web]
port = 1
image = "a"
[service.web.env]
PASSWORD = "hunter2
TOKEN = hunter2
"#,
        ),
        r#"error[config.syntax]: this is not TOML: invalid basic string, expected `"`
 --> peregrine.toml:5:20
  |
5 | PASSWORD = …
  |             ^
  = texts are in quotes, on one line: key = "text"

error[config.syntax]: this is not TOML: string values must be quoted, expected literal string
 --> peregrine.toml:6:9
  |
6 | TOKEN = …
  |         ^
  = texts are in quotes, on one line: key = "text"
"#,
    );
}

#[test]
fn the_caret_stands_below_what_it_means() {
    told(
        &manifest("[service.web]\n\t\timage = \"ä ö\", port = 1\n"),
        "error[config.bad_value]: \"ä ö\" is no reference of an image\n --> peregrine.toml:2:11\n  |\n2 | \t\timage = \"ä ö\", port = 1\n  | \t\t        ^^^^^\n  = write it as for docker run: \"shop:1.4\" or \"shop@sha256:…\", without a scheme\n\nerror[config.syntax]: this is not TOML: unexpected key or value, expected newline, `#`\n --> peregrine.toml:2:16\n  |\n2 | \t\timage = \"ä ö\", port = 1\n  | \t\t             ^\n  = write one key = value a line, tables as [service.web], texts in quotes\n",
    );
}

#[test]
fn a_key_that_is_there_twice_is_told() {
    told(
        &manifest(
            r#"[service.web]
image = "a"
image = "b"
port = 1
"#,
        ),
        r#"error[config.syntax]: this is not TOML: duplicate key
 --> peregrine.toml:3:1
  |
3 | image = "b"
  | ^^^^^
  = a key is in a table once: take one out
"#,
    );
}
