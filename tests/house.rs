//! The house: which room may know which. Reads the manifests and fails on any other arrow.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// (room, the rooms that it may depend on outside of tests), as drawn in ARCHITECTURE.md.
const ARROWS: &[(&str, &[&str])] = &[
    (".", &["config", "proxy", "link", "engine", "api", "routing", "bench"]),
    ("api", &["engine"]),
    ("engine", &["routing"]),
    ("proxy", &["routing"]),
    ("link", &["routing"]),
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
