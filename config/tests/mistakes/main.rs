//! Every kind of mistake, and exactly what is said about it.

mod domain;
mod file;
mod server;
mod traffic;
mod workload;

use peregrine_config::{Manifest, Mistakes, ServerConfig, Source};

fn source(text: &str) -> Source {
    Source::new("peregrine.toml", "/etc/peregrine", text)
}

fn manifest(text: &str) -> Mistakes {
    Manifest::parse(&source(text)).expect_err("this manifest has a mistake")
}

fn server(text: &str) -> Mistakes {
    ServerConfig::parse(&source(text)).expect_err("this file has a mistake")
}

#[track_caller]
fn told(mistakes: &Mistakes, words: &str) {
    let told = mistakes.to_string();
    assert!(told == words, "this is told:\n{told}\nand not:\n{words}");
}
