//! The codes of problems: a public, stable list. A code is never given another meaning.
//!
//! Those of the API itself are here in full. Those of the engine are listed by name in [`ENGINE`]; their
//! status follows from their kind, and their detail and hint are the engine's.

use crate::types::ProblemKind;

/// A code with all that is the same for every occurrence.
#[derive(Debug, PartialEq, Eq)]
pub struct Code {
    /// Code.
    pub code: &'static str,
    /// HTTP status.
    pub status: u16,
    /// Kind.
    pub kind: ProblemKind,
    /// The code in words.
    pub title: &'static str,
    /// What to do next, unless the occurrence says better.
    pub hint: &'static str,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

macro_rules! codes {
    ($($name:ident = $code:literal $status:literal $kind:ident $retryable:literal $title:literal $hint:literal;)*) => {
        $(
            #[doc = concat!("`", $code, "`: ", $title, ".")]
            pub const $name: Code = Code {
                code: $code,
                status: $status,
                kind: ProblemKind::$kind,
                title: $title,
                hint: $hint,
                retryable: $retryable,
            };
        )*
        /// Every code of the API itself.
        pub const OWN: &[&Code] = &[$(&$name),*];
    };
}

codes! {
    AUTH_MISSING = "auth.missing" 401 Auth false "A token is needed" "send the header `Authorization: Bearer TOKEN`; the token is in the file api-token of the server's data folder";
    AUTH_INVALID = "auth.invalid" 401 Auth false "The token is not valid" "use the token in the file api-token of the server's data folder";
    HOST_REFUSED = "auth.host_refused" 403 Auth false "The API is not asked under this name" "ask it by its IP address or as localhost, or add the name to `allowed_hosts`";
    ORIGIN_REFUSED = "auth.origin_refused" 403 Auth false "A page of another site may not use the API" "call the API from a page that it serves itself, or not from a browser";
    NO_ROUTE = "request.no_such_route" 404 NotFound false "There is no such route" "see /api/openapi.json for the routes";
    METHOD = "request.method_not_allowed" 405 Invalid false "The route does not know this method" "see the Allow header for the methods";
    MALFORMED_JSON = "request.malformed_json" 400 Invalid false "The body is not JSON" "send one JSON document (RFC 8259) in UTF-8";
    INVALID_FIELD = "request.invalid_field" 422 Invalid false "A field has a value that cannot be used" "correct the fields in `errors`; /api/openapi.json has the schema";
    UNKNOWN_FIELD = "request.unknown_field" 422 Invalid false "A field is not known" "correct or remove the fields in `errors`; /api/openapi.json has the schema";
    CONTENT_TYPE = "request.content_type" 415 Invalid false "The body is not declared as JSON" "send the header `Content-Type: application/json`";
    TOO_LARGE = "request.too_large" 413 Invalid false "The body is too large" "send less";
    QUERY = "request.invalid_query" 400 Invalid false "A query parameter cannot be used" "correct or remove the parameter; /api/openapi.json lists them";
    HEADER = "request.invalid_header" 400 Invalid false "A header cannot be used" "correct or remove the header";
    PATH = "request.invalid_path" 400 Invalid false "The path cannot be used" "escape the path as UTF-8 (RFC 3986)";
    CURSOR = "request.invalid_cursor" 400 Invalid false "The cursor is not one of ours" "use `next_cursor` of the page before, or begin without a cursor";
    BODY_TIMEOUT = "request.body_timeout" 408 Invalid true "The body did not come in time" "send it again";
    TIMEOUT = "request.timed_out" 504 Internal true "There was no answer in time" "what was asked may go on: look before you ask again, or ask again with the same Idempotency-Key";
    KEY_REUSED = "idempotency.mismatch" 422 Invalid false "The key was used for another request" "use a new Idempotency-Key for a new request";
    KEY_BUSY = "idempotency.in_progress" 409 Conflict true "A request with this key is under way" "wait for its answer, then ask again";
    NO_MACHINE = "machine.unknown" 404 NotFound false "There is no such machine" "list the machines: GET /api/v1/machines";
    NO_SERVICE = "service.unknown" 404 NotFound false "There is no such service" "list the services: GET /api/v1/services";
    NO_MOVE = "move.unknown" 404 NotFound false "There is no such move" "list the moves: GET /api/v1/moves";
    NO_INSTANCE = "instance.unknown" 404 NotFound false "There is no such instance" "list the instances: GET /api/v1/instances";
    NOTHING_TO_DO = "move.nothing_to_do" 409 Conflict false "Nothing would change" "look at where the service is: GET /api/v1/status";
    NO_LINK = "edge.no_link" 404 NotFound false "The server does not listen for edges" "add [link] to its configuration file and start it again; `peregrine engine` always listens";
    NO_EDGE = "edge.unknown" 404 NotFound false "There is no such edge" "`peregrine edges list` shows the edges";
    EDGE_NAME = "edge.bad_name" 400 Invalid false "That is no name for an edge" "use 1 to 63 of a-z, 0-9 and hyphens, such as edge-fra-1";
    NO_DOMAINS = "domain.none_kept" 404 NotFound false "The server keeps no domains" "ask the engine that leads";
    NO_DOMAIN = "domain.unknown" 404 NotFound false "There is no such domain" "`peregrine domains list` shows the domains; `peregrine domains add` adds one";
    DOMAIN_NAME = "domain.bad_name" 400 Invalid false "That is no name for a domain" "use a DNS name such as shop.example.com, or *.example.com for all names one label below";
    DOMAIN_CONFIGURED = "domain.configured" 409 Conflict false "The configuration file decides on the domain" "change [domain] in the server's configuration file and reload it";
    DOMAIN_BUSY = "domain.busy" 409 Conflict true "The domain is being worked on" "ask again in a moment";
    NO_AUTHORITY = "certificate.no_authority" 409 Conflict false "There is no authority to order from" "add [acme] to the server's configuration file, or import a certificate: `peregrine certs import`";
    NO_CERTIFICATE = "certificate.none" 404 NotFound false "The domain has no certificate yet" "`peregrine domains list` says what it waits for";
    BAD_CERTIFICATE = "certificate.invalid" 422 Invalid false "That is no certificate with its key" "bring the chain and its private key in PEM, the chain beginning with its own certificate";
    INTERNAL = "server.internal" 500 Internal true "The server failed" "look into the server's log for the request id";
}

/// Conflicts and failures of the engine that pass: the same request may succeed later.
pub const PASSING: &[&str] = &[
    "cleanup.incomplete",
    "move.going_back",
    "move.holding",
    "move.in_progress",
    "move.past_return",
    "move.running",
    "move.second",
    "store.conflict",
];

/// Every code that the engine refuses with, or names in the blockers, warnings and problems of plans and moves.
pub const ENGINE: &[&str] = &[
    "backup.exists",
    "backup.no_store",
    "claim.lost",
    "cleanup.incomplete",
    "cutover.too_long",
    "engine.defect",
    "engine.overtaken",
    "engine.stopped",
    "file.disk_full",
    "file.failed",
    "file.forbidden",
    "file.missing",
    "guard.failed",
    "health.no_path",
    "idempotency.mismatch",
    "image.architecture",
    "image.differs",
    "image.missing",
    "image.to_be_pulled",
    "image.too_slow",
    "instance.died",
    "instance.exited",
    "instance.never_healthy",
    "instance.not_removed",
    "instance.not_restarted",
    "instance.not_stopped",
    "instance.old_died",
    "instance.out_of_memory",
    "instance.start_timeout",
    "instance.unknown",
    "instance.unwell",
    "machine.in_use",
    "machine.needs_docker",
    "machine.needs_process",
    "machine.not_named",
    "machine.unknown",
    "machine.unreachable",
    "move.aborted",
    "move.ended",
    "move.going_back",
    "move.holding",
    "move.in_progress",
    "move.nothing_there",
    "move.past_return",
    "move.running",
    "move.same_place",
    "move.second",
    "move.unknown",
    "plan.blocked",
    "plan.changed",
    "plan.unknown_format",
    "replicas.single",
    "restore.checksum",
    "restore.not_empty",
    "rollback.nothing",
    "rollback.same_version",
    "rollback.unknown_version",
    "route.none",
    "route.refused",
    "route.taken",
    "runtime.failed",
    "runtime.fenced",
    "runtime.refused",
    "runtime.unsupported",
    "scale.out_of_range",
    "scale.same",
    "service.aside",
    "service.copy_left",
    "service.not_removed",
    "service.not_running",
    "service.single_writer",
    "service.unknown",
    "spec.invalid",
    "state.illegal",
    "store.compacted",
    "store.conflict",
    "store.corrupt",
    "store.damaged",
    "store.fenced",
    "store.full",
    "store.io",
    "store.locked",
    "store.newer",
    "store.record_aside",
    "store.too_large",
    "version.unknown",
    "warm.mirror_differs",
    "warm.path_failed",
    "warm.too_slow",
    "workload.fixed",
    "workload.kind_changed",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_code_is_listed_twice_and_each_says_what_to_do() {
        let mut names: Vec<_> = OWN.iter().map(|code| code.code).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
        for code in OWN {
            assert!(!code.hint.is_empty() && !code.title.ends_with('.'), "{code:?}");
            assert!(code.code.split('.').count() == 2, "{code:?}");
            assert!((400..600).contains(&code.status), "{code:?}");
        }
    }

    /// What looks like a code in the engine's sources and is none: files (also those of control groups), attributes of
    /// files, labels of containers, types of events.
    fn is_something_else(word: &str) -> bool {
        const ENDINGS: &[&str] = &[".json", ".log", ".db", ".lock", ".sock", ".tar", ".toml"];
        const EVENTS: &[&str] = &[
            "machine.added",
            "machine.removed",
            "engine.fenced",
            "service.changed",
            "service.removed",
            "move.created",
            "move.phase",
            "move.weight",
            "move.progress",
            "move.guard",
            "move.sample",
            "move.turned_back",
            "move.held",
            "move.done",
            "instance.changed",
        ];
        const FAMILIES: &[&str] =
            &["cgroup.", "cpu.", "docker.", "memory.", "peregrine.", "pids.", "trusted.", "user."];
        FAMILIES.iter().any(|family| word.starts_with(family))
            || ENDINGS.iter().any(|ending| word.ends_with(ending))
            || EVENTS.contains(&word)
    }

    fn words_with_a_dot(folder: &std::path::Path, words: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                words_with_a_dot(&path, words);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let shipped = text.split("#[cfg(test)]").next().unwrap_or_default();
                let quoted = shipped.split('"').skip(1);
                words.extend(quoted.filter(|word| is_a_code(word)).map(str::to_owned));
            }
        }
    }

    fn is_a_code(word: &str) -> bool {
        let plain =
            |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        word.split_once('.').is_some_and(|(family, name)| plain(family) && plain(name))
    }

    #[test]
    fn every_code_of_the_engine_is_listed_and_every_listed_one_is_used() {
        let sources = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/src");
        let mut words = BTreeSet::new();
        words_with_a_dot(&sources, &mut words);
        words.retain(|word| !is_something_else(word));
        let used: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(used, ENGINE, "left: what engine/src uses; right: what api/src/codes.rs lists");
    }

    #[test]
    fn the_api_and_the_engine_mean_the_same_by_a_code_that_both_use() {
        let shared = OWN.iter().filter(|code| ENGINE.contains(&code.code));
        for code in shared.filter(|code| **code != &KEY_REUSED) {
            assert!(code.code.ends_with(".unknown") && code.status == 404, "{code:?}");
        }
        for code in PASSING {
            assert!(ENGINE.contains(code), "{code}");
        }
    }

    #[test]
    fn every_code_is_in_the_manual() {
        let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md");
        let manual = std::fs::read_to_string(manual).unwrap();
        for code in OWN.iter().map(|code| code.code).chain(ENGINE.iter().copied()) {
            assert!(manual.contains(&format!("`{code}`")), "docs/api.md does not name {code}");
        }
    }
}
