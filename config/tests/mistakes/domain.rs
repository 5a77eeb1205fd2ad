//! `[domain."NAME"]`, and where TLS is spoken.

use crate::{server, told};

#[test]
fn a_domain_says_what_it_presents_and_nothing_that_contradicts_it() {
    told(
        &server(
            r#"[domain."a.test"]
redirect = false
[domain."b.test"]
certificate = "b.pem"
[domain."c.test"]
pass_through = true
hsts = true
[domain."d.test"]
certificate = "d.pem"
key = "d.key"
client_auth = "optional"
min_version = "1.1"
hsst = true
"#,
        ),
        r#"error[config.missing]: [domain."a.test"] does not say what it presents
 --> peregrine.toml:1:9
  |
1 | [domain."a.test"]
  |         ^^^^^^^^
  = add certificate = "chain.pem" and key = "key.pem", or pass_through = true

error[config.missing]: [domain."b.test"] has no key
 --> peregrine.toml:4:1
  |
4 | certificate = "b.pem"
  | ^^^^^^^^^^^
  = add key = "tls/shop.example.com.pem"

error[config.conflict]: domain."c.test".hsts goes with a domain whose TLS the edge speaks
 --> peregrine.toml:7:1
  |
7 | hsts = true
  | ^^^^
  = take it out, or pass_through: with it the service speaks TLS

error[config.missing]: nothing says who signs the clients' certificates
  --> peregrine.toml:11:1
   |
11 | client_auth = "optional"
   | ^^^^^^^^^^^
   = add client_ca = "tls/clients.pem"

error[config.bad_value]: "1.1" is no value of domain."d.test".min_version
  --> peregrine.toml:12:15
   |
12 | min_version = "1.1"
   |               ^^^^^
   = did you mean "1.2"?

error[config.unknown_key]: unknown key `hsst` in [domain."d.test"]
  --> peregrine.toml:13:1
   |
13 | hsst = …
   | ^^^^
   = did you mean `hsts`?
"#,
    );
}

#[test]
fn a_domain_is_a_name_and_is_there_once() {
    told(
        &server(
            r#"[domain."10.0.0.1"]
pass_through = true
[domain."a.*"]
pass_through = true
[domain."a.test"]
pass_through = true
[domain."A.test."]
pass_through = true
"#,
        ),
        r#"error[config.bad_name]: "10.0.0.1" is an address, not a name
 --> peregrine.toml:1:9
  |
1 | [domain."10.0.0.1"]
  |         ^^^^^^^^^^
  = clients do not say addresses in a handshake: write [domain."*"] for all who say no name

error[config.bad_name]: "a.*" cannot be a domain: a wildcard stands for whole labels at the front: *.example.com
 --> peregrine.toml:3:9
  |
3 | [domain."a.*"]
  |         ^^^^^
  = write "shop.example.com", "*.example.com" or "*"

error[config.duplicate]: a.test is there twice
 --> peregrine.toml:7:9
  |
7 | [domain."A.test."]
  |         ^^^^^^^^^
  = take one out: case and a dot at the end do not count
"#,
    );
}

#[test]
fn an_address_speaks_clear_text_or_tls() {
    told(
        &server("[edge]\nhttp = [\"0.0.0.0:80\"]\nhttps = [\"0.0.0.0:80\"]\n"),
        r#"error[config.duplicate]: 0.0.0.0:80 is in edge.http and in edge.https
 --> peregrine.toml:3:9
  |
3 | https = ["0.0.0.0:80"]
  |         ^^^^^^^^^^^^^^
  = take one out: an address speaks clear text or TLS
"#,
    );
}
