//! What was meant: the nearest known word, or what other tools call it.

/// Other tools' words, and ours.
const OTHER_WORDS: [(&str, &str); 22] = [
    ("backends", "upstreams"),
    ("bind", "listen"),
    ("cmd", "command"),
    ("cookie", "sticky"),
    ("count", "replicas"),
    ("cpus", "cpu"),
    ("domain", "hosts"),
    ("domains", "hosts"),
    ("env_vars", "env"),
    ("environment", "env"),
    ("guards", "abort_on"),
    ("healthcheck", "health"),
    ("health_check", "health"),
    ("instances", "replicas"),
    ("internal_port", "port"),
    ("limits", "resources"),
    ("listen", "http"),
    ("mem", "memory"),
    ("server_name", "hosts"),
    ("servers", "upstreams"),
    ("strategy", "balance"),
    ("working_dir", "directory"),
];

/// A hint for an unknown key in the table at `path`.
pub(crate) fn key(key: &str, path: &str, known: &[&str]) -> String {
    if path.is_empty() && ["edge", "api", "machine"].contains(&key) {
        return format!(
            "[{key}] belongs into the file of `peregrine serve`; a manifest has services only: take it out here"
        );
    }
    if let Some(word) = word(key, known) {
        return format!("did you mean `{word}`?");
    }
    let mut names = known.to_vec();
    names.sort_unstable();
    format!("known keys here: {}", names.join(", "))
}

/// The known word that was meant, if one is near enough.
pub(crate) fn word<'w>(said: &str, known: &[&'w str]) -> Option<&'w str> {
    let lower = said.to_lowercase().replace('-', "_");
    let other = OTHER_WORDS.iter().filter(|(word, _)| *word == lower).map(|(_, ours)| *ours);
    if let Some(ours) = other.into_iter().find_map(|ours| known.iter().copied().find(|k| *k == ours)) {
        return Some(ours);
    }
    let allowed = 1 + said.chars().count() / 4; // one slip, and one more for every four letters
    known
        .iter()
        .map(|word| (strsim::osa_distance(&lower, &word.to_lowercase()), *word))
        .filter(|(distance, word)| *distance <= allowed && *distance < word.chars().count())
        .min()
        .map(|(_, word)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_and_other_tools_words_are_understood() {
        let known = ["hosts", "port", "replicas", "env", "health", "upstreams"];
        for (said, meant) in [
            ("host", "hosts"),
            ("Hosts", "hosts"),
            ("prot", "port"),
            ("replica", "replicas"),
            ("environment", "env"),
            ("health-check", "health"),
            ("upstream", "upstreams"),
        ] {
            assert_eq!(word(said, &known), Some(meant), "{said}");
        }
        for said in ["", "x", "colour", "zzzz"] {
            assert_eq!(word(said, &known), None, "{said}");
        }
    }
}
