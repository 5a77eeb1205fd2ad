//! Path prefixes of one host: the longest that ends on a segment border wins.

use std::sync::Arc;

/// Why a path prefix is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Does not begin with `/`.
    #[error("a path prefix begins with /")]
    NotAbsolute,
    /// Contains `?`, `#`, a space or a control character.
    #[error("a path prefix has no ?, # or spaces")]
    BadCharacter,
}

/// Up to this many prefixes a scan is faster than anything clever.
const SCAN_UP_TO: usize = 12;

/// The routes of one host.
#[derive(Clone, Debug, Default)]
pub(crate) struct PathRoutes {
    /// Sorted by prefix; no prefix but `/` ends with a slash.
    routes: Vec<(Arc<str>, u32)>,
}

impl PathRoutes {
    pub(crate) fn get(&self, prefix: &str) -> Option<u32> {
        self.routes.binary_search_by(|(have, _)| (**have).cmp(prefix)).ok().map(|at| self.routes[at].1)
    }

    pub(crate) fn insert(&mut self, prefix: Arc<str>, slot: u32) {
        match self.routes.binary_search_by(|(have, _)| have.cmp(&prefix)) {
            Ok(at) => self.routes[at].1 = slot,
            Err(at) => {
                self.routes.insert(at, (prefix, slot));
                self.routes.shrink_to_fit();
            }
        }
    }

    pub(crate) fn remove(&mut self, prefix: &str) {
        self.routes.retain(|(have, _)| &**have != prefix);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// The longest prefix of `path`, with its slot.
    pub(crate) fn longest(&self, path: &str) -> Option<(&Arc<str>, u32)> {
        if self.routes.len() <= SCAN_UP_TO {
            let fitting = self.routes.iter().filter(|(prefix, _)| is_prefix(prefix, path));
            return fitting.max_by_key(|(prefix, _)| prefix.len()).map(|(prefix, slot)| (prefix, *slot));
        }
        let mut candidate = path;
        loop {
            let key = if candidate.is_empty() { "/" } else { candidate };
            if let Ok(at) = self.routes.binary_search_by(|(have, _)| (**have).cmp(key)) {
                return Some((&self.routes[at].0, self.routes[at].1));
            }
            if key == "/" {
                return None;
            }
            candidate = &candidate[..candidate.rfind('/').unwrap_or(0)];
        }
    }
}

/// Checks a prefix and takes a trailing slash off: `/api/` and `/api` are the same border.
pub(crate) fn canonical_prefix(prefix: &str) -> Result<Arc<str>, PathError> {
    if !prefix.starts_with('/') {
        return Err(PathError::NotAbsolute);
    }
    if prefix.bytes().any(|b| b <= b' ' || b == 0x7f || b == b'?' || b == b'#') {
        return Err(PathError::BadCharacter);
    }
    let trimmed = prefix.trim_end_matches('/');
    Ok(if trimmed.is_empty() { "/".into() } else { trimmed.into() })
}

fn is_prefix(prefix: &str, path: &str) -> bool {
    prefix == "/" || path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(prefixes: &[&str]) -> PathRoutes {
        let mut routes = PathRoutes::default();
        for (slot, prefix) in prefixes.iter().enumerate() {
            routes.insert(canonical_prefix(prefix).expect("prefix"), slot as u32);
        }
        routes
    }

    #[test]
    fn the_longest_prefix_on_a_segment_border_wins() {
        let few = routes(&["/", "/api", "/api/v1/"]);
        for (path, slot) in [
            ("/", 0),
            ("/apis", 0),
            ("/api", 1),
            ("/api/", 1),
            ("/api/v1", 2),
            ("/api/v1/x", 2),
            ("/api/v12", 1),
        ] {
            assert_eq!(few.longest(path).map(|(_, slot)| slot), Some(slot), "{path}");
        }
    }

    #[test]
    fn many_prefixes_and_few_agree() {
        let names: Vec<String> =
            (0..40).map(|i| format!("/s{i}/deep")).chain(["/".into(), "/s3".into()]).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let many = routes(&names);
        for path in ["/s3/deep/x", "/s3/deepx", "/s3", "/s39/deep", "/s4", "/zzz", "/s3//deep"] {
            let scan = many
                .routes
                .iter()
                .filter(|(p, _)| is_prefix(p, path))
                .max_by_key(|(p, _)| p.len())
                .map(|(_, s)| *s);
            assert_eq!(many.longest(path).map(|(_, slot)| slot), scan, "{path}");
        }
        assert_eq!(routes(&names[..40]).longest("/other"), None);
    }

    #[test]
    fn a_prefix_has_to_be_a_path() {
        assert_eq!(canonical_prefix("api"), Err(PathError::NotAbsolute));
        assert_eq!(canonical_prefix("/a?b"), Err(PathError::BadCharacter));
        assert_eq!(canonical_prefix("/a//").as_deref(), Ok("/a"));
    }
}
