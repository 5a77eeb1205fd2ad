//! Whatever a file says: no panic, every mistake is somewhere in it, and what is sound the edge takes.

use peregrine_config::{Manifest, Mistakes, ServerConfig, Source};
use proptest::prelude::*;

const FILES: [&str; 5] = [
    include_str!("../peregrine.toml"),
    include_str!("../examples/reverse-proxy.toml"),
    include_str!("../examples/two-docker-hosts.toml"),
    include_str!("../examples/ssh-host.toml"),
    include_str!("../examples/manifest.toml"),
];

fn is_somewhere(text: &str, mistakes: &Mistakes) {
    let lines: Vec<_> = text.split('\n').collect();
    assert!(!mistakes.list().is_empty());
    for mistake in mistakes.list() {
        assert!((1..=lines.len()).contains(&mistake.line), "{mistake:?}");
        let width = lines[mistake.line - 1].chars().count();
        assert!((1..=width + 1).contains(&mistake.column), "{mistake:?} in a line of {width}");
        assert!(mistake.hint.as_deref() != Some(""), "{mistake:?}");
        assert!(mistake.to_string().starts_with("error[config."), "{mistake}");
    }
}

fn read(text: &str) {
    let source = Source::new("f", "/", text);
    match ServerConfig::parse(&source) {
        Err(mistakes) => is_somewhere(text, &mistakes),
        Ok(config) => config.edge.check().expect("the edge takes what was checked"),
    }
    match Manifest::parse(&source) {
        Err(mistakes) => is_somewhere(text, &mistakes),
        Ok(manifest) => assert!(manifest.services.iter().all(|service| service.spec.replicas > 0)),
    }
}

/// A change of a text: what is at some place becomes something else.
#[derive(Clone, Debug)]
struct Edit {
    at: prop::sample::Index,
    length: usize,
    text: String,
}

fn any_edit() -> impl Strategy<Value = Edit> {
    let text = prop_oneof![
        "\\PC{0,6}",
        "[\\[\\]{}=\"'.,# \n\r\t0-9a-zé-]{0,8}",
        prop::sample::select(vec![
            "\"\"\"",
            "[[service]]",
            "[service.a.b.c]",
            "env",
            "\0",
            "1e999",
            "-",
            "\u{1b}["
        ])
        .prop_map(str::to_owned),
    ];
    (any::<prop::sample::Index>(), 0..30_usize, text).prop_map(|(at, length, text)| Edit { at, length, text })
}

fn edited(file: &str, edits: Vec<Edit>) -> String {
    let uncomment =
        |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line).to_owned();
    let mut text: Vec<char> =
        file.lines().map(|line| uncomment(line) + "\n").collect::<String>().chars().collect();
    for edit in edits {
        let at = edit.at.index(text.len() + 1);
        let end = (at + edit.length).min(text.len());
        drop(text.splice(at..end, edit.text.chars()));
    }
    text.into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn arbitrary_text_never_panics(text in "(?s).{0,400}") {
        read(&text);
    }

    #[test]
    fn a_sound_file_with_arbitrary_changes_never_panics(
        file in 0..FILES.len(),
        edits in prop::collection::vec(any_edit(), 1..8),
    ) {
        read(&edited(FILES[file], edits));
    }
}
