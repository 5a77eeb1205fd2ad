//! Who may ask: accounts with passwords, and another server that decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use peregrine_routing::{BasicAuth, ForwardAuth, HeaderEdits, Redirect, Rules};

use super::rules::ruled;
use super::support::{Client, Origin, TestEdge, config, dead_address, service, until, upstream};

fn argon2id(password: &str, passes: u32) -> Arc<str> {
    let (memory_kib, salt) = (1_024, b"salt of the test");
    let params = argon2::Params::new(memory_kib, passes, 1, Some(32)).expect("params");
    let mut hash = [0; 32];
    argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
        .hash_password_into(password.as_bytes(), salt, &mut hash)
        .expect("a hash");
    let (salt, hash) = (STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(hash));
    format!("$argon2id$v=19$m={memory_kib},t={passes},p=1${salt}${hash}").into()
}

fn accounts(users: &[(&str, Arc<str>)], forward: bool) -> Rules {
    let users = users.iter().map(|(name, hash)| ((*name).into(), Arc::clone(hash))).collect();
    Rules { basic_auth: Some(BasicAuth { realm: "Staff".into(), users, forward }), ..Rules::default() }
}

fn basic(credentials: &str) -> String {
    format!("Authorization: Basic {}\r\n", STANDARD.encode(credentials))
}

fn get(client: &mut Client, fields: &str) -> super::support::Answer {
    client.send(format!("GET /x?q HTTP/1.1\r\nHost: a.test\r\n{fields}\r\n")).answer()
}

#[test]
fn who_has_the_password_goes_on_without_it_and_nobody_else_does() {
    let origin = Origin::ok();
    let bcrypt = bcrypt::hash("bcrypted", 4).expect("a hash").into();
    let edge = TestEdge::start(ruled(
        &origin,
        accounts(&[("alice", argon2id("hunter2", 1)), ("bob", bcrypt)], false),
    ));
    let mut client = edge.client();
    for (fields, status) in [
        (String::new(), 401),
        (basic("alice:hunter2"), 200),
        (basic("alice:hunter2"), 200),
        (basic("bob:bcrypted"), 200),
        (basic("alice:hunter3"), 401),
        (basic("alice:bcrypted"), 401),
        (basic("bob:hunter2"), 401),
        (basic("carol:hunter2"), 401),
        (basic("alice:"), 401),
        (basic("alice"), 401),
        (basic(":hunter2"), 401),
        (basic("alice:hunter2") + &basic("alice:hunter2"), 401),
        ("Authorization: Bearer hunter2\r\n".to_owned(), 401),
        ("Authorization: Basic ???\r\n".to_owned(), 401),
        (basic(&format!("alice:{}", "x".repeat(5_000))), 401),
        (basic("alice:hunter2").replace("Basic", "bASIC"), 200),
    ] {
        let before = origin.seen().len();
        let answer = get(&mut client, &fields);
        assert_eq!(answer.status, status, "{fields}");
        if status == 401 {
            assert_eq!(answer.reason(), "auth_required", "{fields}");
            assert_eq!(answer.field("www-authenticate"), Some("Basic realm=\"Staff\", charset=\"UTF-8\""));
            assert_eq!(origin.seen().len(), before, "the origin hears nothing: {fields}");
        } else {
            assert_eq!(origin.last().field("authorization"), None, "{fields}");
        }
    }
}

#[test]
fn authorization_goes_on_where_it_is_wanted_and_rules_may_set_another() {
    let origin = Origin::ok();
    let edge = TestEdge::start(ruled(&origin, accounts(&[("alice", argon2id("hunter2", 1))], true)));
    assert_eq!(get(&mut edge.client(), &basic("alice:hunter2")).status, 200);
    assert!(origin.last().field("authorization").expect("goes on").starts_with("Basic "));
    let set =
        HeaderEdits { set: vec![("authorization".into(), "Bearer own".into())], ..HeaderEdits::default() };
    let rules = Rules { request_headers: set, ..accounts(&[("alice", argon2id("hunter2", 1))], false) };
    let edge = TestEdge::start(ruled(&origin, rules));
    assert_eq!(get(&mut edge.client(), &basic("alice:hunter2")).status, 200);
    assert_eq!(origin.last().all("authorization"), ["Bearer own"]);
}

#[test]
fn a_password_that_is_known_is_known_no_more_when_the_account_changes() {
    let origin = Origin::ok();
    let mut edge = TestEdge::start(ruled(&origin, accounts(&[("alice", argon2id("hunter2", 1))], false)));
    assert_eq!(get(&mut edge.client(), &basic("alice:hunter2")).status, 200);
    for users in [&[("alice", argon2id("other", 1))][..], &[("bob", argon2id("hunter2", 1))], &[]] {
        let version = edge.put(ruled(&origin, accounts(users, false)));
        edge.wait_acknowledged(version);
        assert_eq!(get(&mut edge.client(), &basic("alice:hunter2")).status, 401);
    }
}

#[test]
fn while_passwords_are_verified_others_are_served_and_too_many_are_sent_away() {
    const CLIENTS: usize = 100;
    let (origin, free) = (Origin::ok(), Origin::ok());
    let mut open = service(vec![upstream(free.addr)]);
    (open.name, open.routes[0].path_prefix) = ("open".into(), "/open".into());
    let slow = argon2id("hunter2", 10);
    let edge =
        TestEdge::start_with(config(), vec![ruled(&origin, accounts(&[("alice", slow)], false)), open]);
    assert_eq!(get(&mut edge.client(), &basic("alice:hunter2")).status, 200);
    let mut guessing: Vec<Client> = (0..CLIENTS).map(|_| edge.client()).collect();
    for (n, client) in guessing.iter_mut().enumerate() {
        client.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", basic(&format!("alice:guess {n}"))));
    }
    // Nobody waits behind the guesses: not another service, and not who is known.
    assert_eq!(edge.client().get("/open").status, 200);
    assert_eq!(get(&mut edge.client(), &basic("alice:hunter2")).status, 200);
    let mut told = [0, 0];
    for client in &mut guessing {
        let answer = client.answer();
        match (answer.status, answer.reason()) {
            (401, "auth_required") => told[0] += 1,
            (503, "auth_unavailable") => told[1] += 1,
            other => panic!("{other:?}"),
        }
    }
    // Four of one client's wait at a time; how many get a turn before the last has come is the machine's matter.
    assert!(told[0] >= 4 && told[1] >= 1 && told[0] + told[1] == CLIENTS, "{told:?}");
    assert_eq!(origin.seen().len(), 2);
}

// --- another server decides ---------------------------------------------------------------------------------

fn asking(authority: &str, copy: &[&str], timeout_ms: u32) -> Rules {
    Rules {
        forward_auth: Some(ForwardAuth {
            authority: authority.into(),
            path: "/verify?v=1".into(),
            copy_headers: copy.iter().map(|name| (*name).into()).collect(),
            timeout_ms,
        }),
        ..Rules::default()
    }
}

/// Answers every question with this head and body.
fn deciding(answer: &'static str) -> Origin {
    Origin::scripted(move |conn| {
        while conn.request().is_some() {
            conn.write(answer.as_bytes());
        }
    })
}

#[test]
fn who_decides_is_told_of_the_request_and_its_fields_go_on_instead_of_the_clients_own() {
    let origin = Origin::ok();
    let auth = deciding(
        "HTTP/1.1 200 OK\r\nX-User: alice\r\nX-Group: a\r\nX-Group: b\r\nX-Other: 1\r\nContent-Length: 2\r\n\r\nok",
    );
    let rules = asking(&auth.addr.to_string(), &["x-user", "x-group", "x-absent"], 5_000);
    let edge = TestEdge::start(ruled(&origin, rules));
    let mut client = edge.client();
    for _ in 0..3 {
        let answer = client
            .send(
                "POST /p%61th/./x?q=1 HTTP/1.1\r\nHost: Shop.test.:81\r\nContent-Length: 5\r\nCookie: s=1\r\nCookie: t=2\r\n\
                 Authorization: Bearer t\r\nX-User: mallory\r\nX_User: mallory\r\nX-Absent: mallory\r\nX-Kept: 1\r\n\
                 Connection: x-user\r\nX-Forwarded-For: 6.6.6.6\r\n\r\norder",
            )
            .answer();
        assert_eq!((answer.status, answer.text(), answer.field("x-user")), (200, "ok", None));
    }
    let asked = auth.last();
    assert_eq!(asked.line(), "GET /verify?v=1 HTTP/1.1");
    for (name, value) in [
        ("host", &*auth.addr.to_string()),
        ("x-forwarded-method", "POST"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-host", "shop.test:81"),
        ("x-forwarded-uri", "/path/x?q=1"),
        ("x-forwarded-for", "127.0.0.1"),
        ("cookie", "s=1; t=2"),
        ("authorization", "Bearer t"),
    ] {
        assert_eq!(asked.all(name), [value], "{name}");
    }
    // What the client says of itself is shown, and nothing about its body or its connection.
    assert_eq!((asked.all("x-kept"), asked.body.len()), (vec!["1"], 0));
    assert_eq!((asked.all("content-length").len(), asked.all("connection").len()), (0, 0));
    assert!(!asked.head.contains("mallory"), "{}", asked.head);
    assert_eq!((auth.seen().len(), auth.connections()), (3, 1), "its connection is used again");
    let seen = origin.last();
    assert_eq!((seen.all("x-user"), seen.all("x-group")), (vec!["alice"], vec!["a", "b"]));
    assert_eq!(
        (seen.head.contains("mallory"), seen.all("x-other").len(), seen.all("x-kept")),
        (false, 0, vec!["1"])
    );
    assert_eq!(seen.body, b"order");
}

#[test]
fn any_other_answer_is_the_clients_and_the_origin_hears_nothing() {
    let origin = Origin::ok();
    for (answer, status, field, body) in [
        (
            "HTTP/1.1 302 Found\r\nLocation: https://login.test/?a=b\r\nSet-Cookie: n=1\r\nContent-Length: 0\r\n\r\n",
            302,
            ("location", "https://login.test/?a=b"),
            "",
        ),
        (
            "HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
            401,
            ("www-authenticate", "Bearer"),
            "no",
        ),
        (
            "HTTP/1.1 403 No\r\nX-Peregrine-Reason: forged\r\nX-Why: because\r\nContent-Length: 2\r\n\r\nno",
            403,
            ("x-why", "because"),
            "no",
        ),
        ("HTTP/1.1 500 Oh\r\nX-Why: broken\r\nContent-Length: 2\r\n\r\noh", 500, ("x-why", "broken"), "oh"),
    ] {
        let auth = deciding(answer);
        let edge = TestEdge::start(ruled(&origin, asking(&auth.addr.to_string(), &[], 5_000)));
        let mut client = edge.client();
        for _ in 0..2 {
            let told = client.get("/");
            assert_eq!(
                (told.status, told.text(), told.field(field.0)),
                (status, body, Some(field.1)),
                "{answer}"
            );
            assert_eq!(told.reason(), "-");
        }
    }
    assert_eq!(origin.seen().len(), 0);
}

#[test]
fn when_nobody_can_be_asked_nobody_goes_on() {
    let origin = Origin::ok();
    let silent = Origin::scripted(|conn| while conn.more().is_some() {});
    let rubbish = Origin::scripted(|conn| {
        conn.head();
        conn.write(b"HELLO\r\n\r\n");
    });
    let closing = Origin::scripted(|conn| drop(conn.head()));
    let large = Origin::scripted(|conn| {
        while conn.request().is_some() {
            let body = "x".repeat(65 * 1024);
            conn.write(format!("HTTP/1.1 403 No\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
        }
    });
    let half = Origin::scripted(|conn| {
        conn.head();
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf");
    });
    let addresses = [dead_address(), silent.addr, rubbish.addr, closing.addr, large.addr, half.addr];
    for (authority, timeout_ms) in addresses
        .iter()
        .map(|address| (address.to_string(), if *address == silent.addr { 50 } else { 5_000 }))
        .chain([(String::new(), 5_000), ("nowhere.invalid:1".to_owned(), 500)])
    {
        let edge = TestEdge::start(ruled(&origin, asking(&authority, &[], timeout_ms)));
        let mut client = edge.client();
        for _ in 0..2 {
            let answer = client.get("/");
            assert_eq!((answer.status, answer.reason()), (503, "auth_unavailable"), "{authority}");
            assert!(answer.field("retry-after").is_some());
        }
    }
    assert_eq!(origin.seen().len(), 0);
}

#[test]
fn a_connection_that_was_closed_meanwhile_is_no_reason_to_send_a_client_away() {
    let origin = Origin::ok();
    let auth = Origin::scripted(|conn| {
        if conn.request().is_some() {
            conn.answer("ok");
        }
    });
    let edge = TestEdge::start(ruled(&origin, asking(&auth.addr.to_string(), &[], 5_000)));
    let mut client = edge.client();
    for _ in 0..20 {
        assert_eq!(client.get("/").status, 200);
    }
    assert_eq!((origin.seen().len(), auth.seen().len()), (20, 20));
}

#[test]
fn passwords_and_who_decides_are_asked_in_turn_and_redirects_before_both() {
    let origin = Origin::ok();
    let auth = deciding("HTTP/1.1 204 Yes\r\n\r\n");
    let rules = Rules {
        forward_auth: asking(&auth.addr.to_string(), &[], 5_000).forward_auth,
        redirects: vec![Redirect { from: "/old".into(), below: false, to: "/new".into(), status: 301 }],
        ..accounts(&[("alice", argon2id("hunter2", 1))], false)
    };
    let edge = TestEdge::start(ruled(&origin, rules));
    let mut client = edge.client();
    assert_eq!((client.get("/").status, auth.seen().len()), (401, 0));
    assert_eq!((client.get("/old").status, auth.seen().len()), (301, 0));
    assert_eq!(get(&mut client, &basic("alice:hunter2")).status, 200);
    assert_eq!(auth.last().field("authorization"), None, "the password stays at the edge");
}

#[test]
fn a_client_that_leaves_while_it_is_decided_costs_nobody_anything() {
    let origin = Origin::ok();
    let go_on = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&go_on);
    let auth = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            until("it may answer", || may.load(Ordering::SeqCst));
            conn.answer("ok");
        }
    });
    let edge = TestEdge::start(ruled(&origin, asking(&auth.addr.to_string(), &[], 60_000)));
    let mut leaving = edge.client();
    leaving.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    until("it is asked about", || auth.seen().len() == 1);
    leaving.socket.set_read_timeout(Some(Duration::from_secs(1))).expect("time-out");
    drop(leaving);
    go_on.store(true, Ordering::SeqCst);
    assert_eq!(edge.client().get("/").status, 200);
    assert_eq!(origin.seen().len(), 1);
}

#[test]
fn the_same_password_at_the_same_time_is_verified_once() {
    const CLIENTS: usize = 50;
    let origin = Origin::ok();
    let edge = TestEdge::start(ruled(&origin, accounts(&[("alice", argon2id("hunter2", 10))], false)));
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| edge.client()).collect();
    for client in &mut clients {
        client.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", basic("alice:hunter2")));
    }
    // More than may wait of one client, if each were one.
    for client in &mut clients {
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(origin.seen().len(), CLIENTS);
}

#[test]
fn a_path_that_the_two_might_read_differently_is_not_asked_about() {
    let origin = Origin::ok();
    let auth = deciding("HTTP/1.1 204 Yes\r\n\r\n");
    let edge = TestEdge::start(ruled(&origin, asking(&auth.addr.to_string(), &[], 5_000)));
    for path in ["//admin", "/a/..%2fadmin", "/admin;x", "/%2561dmin"] {
        let answer = edge.client().get(path);
        assert_eq!((answer.status, answer.reason()), (400, "ambiguous_path"), "{path}");
    }
    assert_eq!((auth.seen().len(), origin.seen().len()), (0, 0));
    assert_eq!(edge.client().get("/admin").status, 200);
}

#[test]
fn so_many_requests_are_in_flight_also_if_somebody_decides_on_all_of_them_at_once() {
    const CLIENTS: usize = 5;
    let go_on = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&go_on);
    let origin = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            until("it may answer", || may.load(Ordering::SeqCst));
            conn.answer("ok");
        }
    });
    let all_there = Arc::new(std::sync::Barrier::new(CLIENTS));
    let auth = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            all_there.wait();
            conn.answer("ok");
        }
    });
    let rules = Rules { max_in_flight: 1, ..asking(&auth.addr.to_string(), &[], 60_000) };
    let edge = TestEdge::start(ruled(&origin, rules));
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| edge.client()).collect();
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    until("one is in flight", || origin.seen().len() == 1);
    go_on.store(true, Ordering::SeqCst);
    let mut statuses: Vec<u16> = clients.iter_mut().map(|client| client.answer().status).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 503, 503, 503, 503]);
}
