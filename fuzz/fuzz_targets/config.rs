//! The text of a server file and of a manifest: no panic, every mistake is somewhere in the text, and what is
//! accepted is accepted by the edge too.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_config::{Manifest, Mistakes, ServerConfig, Source};

fuzz_target!(|text: &str| {
    let source = Source::new("peregrine.toml", "/etc/peregrine", text);
    match ServerConfig::parse(&source) {
        Ok(config) => config.edge.check().expect("the edge takes what was checked"),
        Err(mistakes) => are_somewhere(text, &mistakes),
    }
    if let Err(mistakes) = Manifest::parse(&source) {
        are_somewhere(text, &mistakes);
    }
});

fn are_somewhere(text: &str, mistakes: &Mistakes) {
    let lines: Vec<_> = text.split('\n').collect();
    assert!(!mistakes.list().is_empty(), "refused without a word");
    for mistake in mistakes.list() {
        let line = lines.get(mistake.line.wrapping_sub(1)).expect("the line is in the text");
        assert!((1..=line.chars().count() + 1).contains(&mistake.column), "{mistake:?} in {line:?}");
        assert!(!mistake.to_string().contains('\u{1b}'), "an escape of the file reaches the terminal");
    }
}
