//! The promises of the room, kept through its public interface. One module for each promise.

mod apply;
mod balance;
mod channel;
mod drain;
mod health;
mod hold;
mod matching;
mod mirror;
mod ready;
mod remote;
mod shares;
mod sticky;
mod support;

#[test]
fn no_file_of_tests_is_forgotten() {
    let listed = include_str!("main.rs");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it");
    for file in std::fs::read_dir(folder).expect("is the folder of this file") {
        let name = file.expect("is readable").file_name().into_string().expect("is a name");
        let module = name.trim_end_matches(".rs");
        assert!(module == "main" || listed.contains(&format!("mod {module};")), "{name} is in no module");
    }
}
