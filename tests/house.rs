//! The house: which room may know which. Reads the manifests and fails on any other arrow.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// (room, the rooms that it may depend on outside of tests), as drawn in ARCHITECTURE.md.
const ARROWS: &[(&str, &[&str])] = &[
    (".", &["config", "proxy", "link", "certs", "engine", "api", "routing", "bench"]),
    ("api", &["engine"]),
    ("engine", &["routing"]),
    ("proxy", &["routing"]),
    ("link", &["routing"]),
    ("certs", &["routing"]),
    ("config", &["proxy", "engine", "api"]),
    ("routing", &[]),
    ("bench", &["routing"]),
    ("sim", &["engine", "routing"]),
];

/// (crate, the rooms that alone may depend on it).
const WALLED_CRATES: &[(&str, &[&str])] = &[
    ("bollard", &["engine"]),
    ("russh", &["engine"]),
    ("rusqlite", &["engine"]),
    ("axum", &["api"]),
    ("utoipa", &["api"]),
    ("clap", &[".", "bench"]),
    ("indicatif", &["."]),
    ("postcard", &["link"]),
    ("instant-acme", &["certs"]),
];

/// Crates that have no place in a pure room.
const NOT_IN_PURE_ROOMS: &[&str] =
    &["tokio", "hyper", "http", "serde", "serde_json", "rustls", "jiff", "tracing", "metrics"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn dependencies(room: &str) -> BTreeSet<String> {
    let manifest = root().join(room).join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest).unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
    let parsed: toml::Table = text.parse().unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
    let table = parsed.get("dependencies").and_then(toml::Value::as_table);
    table.map(|table| table.keys().cloned().collect()).unwrap_or_default()
}

#[test]
fn no_room_knows_another_that_it_must_not_know() {
    for (room, allowed) in ARROWS {
        let rooms =
            dependencies(room).into_iter().filter_map(|d| d.strip_prefix("peregrine-").map(str::to_owned));
        for other in rooms {
            assert!(
                allowed.contains(&other.as_str()),
                "{room} must not depend on {other}: see ARCHITECTURE.md, \"Arrows\""
            );
        }
    }
}

#[test]
fn every_room_of_the_workspace_is_guarded() {
    let manifest: toml::Table = std::fs::read_to_string(root().join("Cargo.toml"))
        .expect("manifest")
        .parse()
        .expect("valid manifest");
    let members = manifest["workspace"]["members"].as_array().expect("members");
    for member in members.iter().filter_map(toml::Value::as_str) {
        assert!(ARROWS.iter().any(|(room, _)| *room == member), "{member} has no line in ARROWS");
    }
}

#[test]
fn heavy_crates_stay_in_their_room() {
    for (room, _) in ARROWS {
        for dependency in dependencies(room) {
            if let Some((_, owners)) = WALLED_CRATES.iter().find(|(name, _)| *name == dependency) {
                assert!(owners.contains(room), "only {owners:?} may depend on {dependency}, {room} does");
            }
        }
    }
}

#[test]
fn the_pure_room_has_no_clock_socket_runtime_or_format() {
    for dependency in dependencies("routing") {
        assert!(!NOT_IN_PURE_ROOMS.contains(&dependency.as_str()), "routing must not depend on {dependency}");
    }
    for (file, text) in sources("routing/src") {
        for word in ["std::net::Tcp", "std::net::Udp", "std::fs", "SystemTime", "Instant::", "std::process"] {
            assert!(!text.contains(word), "{} uses {word}: routing is pure", file.display());
        }
    }
}

#[test]
fn the_edge_and_the_engine_meet_in_the_wiring_alone() {
    for (file, text) in sources("src") {
        let both = text.contains("peregrine_proxy") && text.contains("peregrine_engine");
        let name = file.strip_prefix(root()).unwrap_or(&file).display().to_string();
        assert!(
            !both || name == "src/serve.rs",
            "{name} names both the edge and the engine; only src/serve.rs may"
        );
    }
}

/// What `cargo deny check bans licenses sources` would say, by the same file, for those who have no cargo-deny.
#[test]
fn every_dependency_has_a_licence_of_the_list_comes_from_a_registry_and_is_not_banned() {
    let text = std::fs::read_to_string(root().join("deny.toml")).expect("deny.toml");
    let rules: toml::Table = text.parse().expect("deny.toml");
    let allowed: BTreeSet<&str> = rules["licenses"]["allow"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(toml::Value::as_str)
        .collect();
    let (packages, built) = (packages(), built());
    assert!(packages.len() > 100 && built.len() > 100, "everything is there");
    for package in &packages {
        let name = package["name"].as_str().expect("a name");
        let Some(source) = package["source"].as_str() else { continue };
        assert!(source.starts_with("registry+"), "{name} comes from {source}");
        let licence = package["license"].as_str().unwrap_or_default();
        assert!(is_allowed(licence, &allowed), "{name} has the licence {licence:?}: see deny.toml");
    }
    for banned in rules["bans"]["deny"].as_array().expect("a list") {
        let name = banned["name"].as_str().expect("a name");
        let wrappers: Vec<_> =
            banned.get("wrappers").and_then(toml::Value::as_array).into_iter().flatten().collect();
        let depends = |package: &&serde_json::Value| {
            package["dependencies"].as_array().into_iter().flatten().any(|one| one["name"] == name)
        };
        if wrappers.is_empty() {
            assert!(!built.contains(name), "{name}: {}", banned["reason"]);
        }
        for own in packages.iter().filter(|package| package["source"].is_null()).filter(depends) {
            let own = own["name"].as_str().expect("a name");
            assert!(wrappers.iter().any(|w| w.as_str() == Some(own)), "{own} depends on {name}");
        }
    }
}

#[test]
fn there_is_one_version_of_each_big_crate() {
    let packages = packages();
    for name in ["tokio", "hyper", "h2", "http", "rustls", "aws-lc-rs", "hickory-resolver", "bollard"] {
        let versions: BTreeSet<_> = packages
            .iter()
            .filter(|package| package["name"] == name)
            .map(|package| package["version"].to_string())
            .collect();
        assert_eq!(versions.len(), 1, "{name}: {versions:?}");
    }
}

const HOST: &str = "x86_64-unknown-linux-gnu";

/// All packages that could be built for this machine, with features that are off, too.
fn packages() -> Vec<serde_json::Value> {
    let told = cargo(&["metadata", "--format-version", "1", "--filter-platform", HOST]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("cargo says JSON");
    told["packages"].as_array().expect("packages").clone()
}

/// The names of those that are built.
fn built() -> BTreeSet<String> {
    let told = cargo(&["tree", "--workspace", "--target", HOST, "--prefix", "none", "--format", "{p}"]);
    told.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

fn cargo(arguments: &[&str]) -> String {
    let told = std::process::Command::new(env!("CARGO"))
        .args(arguments)
        .args(["--locked", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    String::from_utf8(told.stdout).expect("cargo writes text")
}

/// Whether an SPDX expression can be satisfied: `AND` binds tighter than `OR`, and `/` is an old form of that.
fn is_allowed(licence: &str, allowed: &BTreeSet<&str>) -> bool {
    let spaced = licence.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let allowed = one_of(&mut words, allowed);
    allowed && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn one_of(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let mut any = all_of(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        any |= all_of(words, allowed);
    }
    any
}

fn all_of(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let mut all = term(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        all &= term(words, allowed);
    }
    all
}

fn term(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let inner = one_of(words, allowed);
        return inner & words.next_if_eq(&")").is_some();
    }
    let name = words.next().unwrap_or_default();
    if words.next_if_eq(&"WITH").is_some() {
        let exception = words.next().unwrap_or_default();
        return allowed.contains(&*format!("{name} WITH {exception}"));
    }
    allowed.contains(name)
}

#[test]
fn licences_are_read_as_spdx_says() {
    let allowed = BTreeSet::from(["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"]);
    for (licence, fits) in [
        ("MIT", true),
        ("MIT/GPL-3.0", true),
        ("GPL-3.0 OR MIT AND ISC", true),
        ("(MIT OR GPL-3.0) AND ISC", true),
        ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
        ("GPL-3.0", false),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR ISC) AND (GPL-3.0)", false),
        ("Apache-2.0", false),
        ("", false),
        ("MIT ISC", false),
        ("(MIT", false),
    ] {
        assert_eq!(is_allowed(licence, &allowed), fits, "{licence:?}");
    }
}

#[test]
fn the_architecture_page_stays_short() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    assert!(text.lines().count() <= 200, "ARCHITECTURE.md has {} lines", text.lines().count());
}

#[test]
fn no_test_file_is_forgotten() {
    let listed = std::fs::read_to_string(root().join("tests/it.rs")).expect("tests/it.rs");
    for entry in std::fs::read_dir(root().join("tests")).expect("tests/") {
        let path = entry.expect("entry").path();
        let Some(stem) = path.file_stem().and_then(|s| s.to_str()) else { continue };
        let is_module = path.extension().is_some_and(|e| e == "rs") || path.join("mod.rs").exists();
        if is_module && stem != "it" {
            assert!(listed.contains(&format!("mod {stem};")), "tests/{stem} is not listed in tests/it.rs");
        }
    }
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, into: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text =
                    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                into.push((path, text));
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    found
}
