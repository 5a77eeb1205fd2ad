//! Path prefixes of one host: the longest that ends on a segment border wins.

use std::sync::{Arc, LazyLock};

use crate::canonical_path::{CanonicalPath, canonical_path};

/// Why a path prefix is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Does not begin with `/`.
    #[error("a path prefix begins with /")]
    NotAbsolute,
    /// Contains `?`, `#`, a space or a control character, as such or escaped NUL.
    #[error("a path prefix has no ?, # or spaces")]
    BadCharacter,
    /// A `%` without two hexadecimal digits.
    #[error("a % in a path is followed by two hexadecimal digits")]
    BadEscape,
    /// A backslash, which some take for a slash.
    #[error("a path has no backslash: write %5C, or / if that is meant")]
    Backslash,
    /// `..` beyond the root.
    #[error("a path does not lead above its root")]
    AboveRoot,
    /// `.` or `..` that only shows when `%2F`, `%5C`, parameters or escaped escapes are taken off.
    #[error("a path has no hidden dot segments")]
    HiddenDots,
    /// A prefix with `;`, `%2F`, `%5C` or an escaped escape: some origins read another path in it.
    #[error("a path prefix has no ;, %2F, %5C or %25, which origins read in different ways")]
    Ambiguous,
}

/// Up to this many prefixes a scan is faster than anything clever.
const SCAN_UP_TO: usize = 12;

/// The prefix of nearly every route: one for all of them.
pub(crate) static ROOT: LazyLock<Arc<str>> = LazyLock::new(|| "/".into());

/// The routes of one host. Nearly every host has just one, which then needs no memory of its own.
#[derive(Clone, Debug)]
pub(crate) enum PathRoutes {
    One(PathRoute),
    /// Sorted by prefix.
    Many(Box<[PathRoute]>),
}

/// No prefix but `/` ends with a slash.
#[derive(Clone, Debug)]
pub(crate) struct PathRoute {
    prefix: Arc<str>,
    slot: u32,
}

impl Default for PathRoutes {
    fn default() -> Self {
        Self::Many(Box::default())
    }
}

impl PathRoutes {
    pub(crate) fn get(&self, prefix: &str) -> Option<u32> {
        let routes = self.as_slice();
        routes.binary_search_by(|have| (*have.prefix).cmp(prefix)).ok().map(|at| routes[at].slot)
    }

    /// Applies edits, which are sorted by prefix: `None` takes a route away, `Some` puts one in. Of two
    /// edits of one prefix the one that puts wins.
    pub(crate) fn edit<'a>(&mut self, edits: impl Iterator<Item = (&'a Arc<str>, Option<u32>)> + Clone) {
        let touched: Vec<&Arc<str>> = edits.clone().map(|(prefix, _)| prefix).collect();
        let untouched = |route: &&PathRoute| touched.binary_search(&&route.prefix).is_err();
        let mut routes: Vec<PathRoute> = self.as_slice().iter().filter(untouched).cloned().collect();
        routes.extend(
            edits.filter_map(|(prefix, slot)| Some(PathRoute { prefix: Arc::clone(prefix), slot: slot? })),
        );
        routes.sort_unstable_by(|a, b| a.prefix.cmp(&b.prefix));
        *self = match <[PathRoute; 1]>::try_from(routes) {
            Ok([route]) => Self::One(route),
            Err(routes) => Self::Many(routes.into_boxed_slice()),
        };
    }

    /// Whether there is but one route, which is for every path.
    pub(crate) fn is_root(&self) -> bool {
        matches!(self, Self::One(route) if &*route.prefix == "/")
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    /// The longest prefix of `path`, with its slot.
    pub(crate) fn longest(&self, path: &str) -> Option<(&Arc<str>, u32)> {
        let routes = self.as_slice();
        let route = if routes.len() <= SCAN_UP_TO {
            let fitting = routes.iter().filter(|route| is_prefix(&route.prefix, path));
            fitting.max_by_key(|route| route.prefix.len())
        } else {
            longest_by_search(routes, path)
        };
        route.map(|route| (&route.prefix, route.slot))
    }

    fn as_slice(&self) -> &[PathRoute] {
        match self {
            Self::One(route) => std::slice::from_ref(route),
            Self::Many(routes) => routes,
        }
    }
}

/// Every prefix of `path` sorts before it. So the greatest route not above the path either is a prefix of
/// it, or what the two have in common bounds the length of any that is. The steps are bounded by how deep
/// the routes nest, whatever path a client makes up.
fn longest_by_search<'a>(routes: &'a [PathRoute], path: &str) -> Option<&'a PathRoute> {
    let mut key = path.as_bytes();
    loop {
        let above = routes.partition_point(|route| route.prefix.as_bytes() <= key);
        let Some(route) = above.checked_sub(1).map(|at| &routes[at]) else { break };
        if is_prefix(&route.prefix, path) {
            return Some(route);
        }
        let common = route.prefix.bytes().zip(key).take_while(|(a, b)| a == *b).count();
        // A route that is in the path but ends inside a segment must not be found again.
        let inside = usize::from(common == route.prefix.len());
        key = &key[..common.saturating_sub(inside)];
    }
    // "*" of OPTIONS (RFC 9112 §3.2.4) does not begin with "/", which is everything all the same.
    routes.first().filter(|route| &*route.prefix == "/")
}

/// Checks a prefix and brings it into the form that paths are matched in: canonical (see [`canonical_path`]), with single
/// slashes and without one at its end: `/api/`, `/%61pi` and `/api` are the same border.
///
/// # Errors
/// [`PathError`] says why requests could not be matched with it.
pub fn canonical_prefix(prefix: &Arc<str>) -> Result<Arc<str>, PathError> {
    let CanonicalPath { path, other_reading } = canonical_path(prefix)?;
    let segments =
        |path: &str| path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let path = match other_reading {
        None => path,
        Some(merged) if segments(&merged) == segments(&path) => merged.into_string().into(),
        Some(_) => return Err(PathError::Ambiguous),
    };
    let trimmed = path.trim_end_matches('/');
    Ok(match trimmed.len() {
        0 => Arc::clone(&ROOT),
        _ if trimmed == &**prefix => Arc::clone(prefix),
        _ => trimmed.into(),
    })
}

fn is_prefix(prefix: &str, path: &str) -> bool {
    prefix == "/" || path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn routes(prefixes: &[&str]) -> PathRoutes {
        let canonical = prefixes
            .iter()
            .zip(0..)
            .map(|(prefix, slot)| (canonical_prefix(&Arc::from(*prefix)).expect("prefix"), Some(slot)));
        let edits: BTreeMap<Arc<str>, Option<u32>> = canonical.collect();
        let mut routes = PathRoutes::default();
        routes.edit(edits.iter().map(|(prefix, slot)| (prefix, *slot)));
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
            ("*", 0),
            ("", 0),
        ] {
            assert_eq!(few.longest(path).map(|(_, slot)| slot), Some(slot), "{path}");
        }
    }

    #[test]
    fn a_path_of_nothing_but_slashes_takes_few_steps() {
        let names: Vec<String> = (0..100).map(|i| format!("/s{i}")).collect();
        let many = routes(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let slashes = "/".repeat(60_000);
        // One step each, or this would take minutes.
        for _ in 0..100_000 {
            assert_eq!(many.longest(&slashes), None);
        }
    }

    #[test]
    fn edits_put_take_and_replace() {
        let mut edited = routes(&["/", "/a", "/b"]);
        let [root, a, c]: [Arc<str>; 3] = ["/".into(), "/a".into(), "/c".into()];
        edited.edit([(&root, None), (&a, None), (&a, Some(7)), (&c, Some(8))].into_iter());
        let have: Vec<_> = edited.as_slice().iter().map(|r| (&*r.prefix, r.slot)).collect();
        assert_eq!(have, [("/a", 7), ("/b", 2), ("/c", 8)]);
        assert_eq!(size_of::<PathRoutes>(), 24, "one route lies in its host's entry");
    }

    #[test]
    fn a_prefix_has_to_be_a_path() {
        assert_eq!(canonical_prefix(&"api".into()), Err(PathError::NotAbsolute));
        assert_eq!(canonical_prefix(&"".into()), Err(PathError::NotAbsolute));
        assert_eq!(canonical_prefix(&"/a?b".into()), Err(PathError::BadCharacter));
        assert_eq!(canonical_prefix(&"/a//".into()).as_deref(), Ok("/a"));
        assert_eq!(canonical_prefix(&"//".into()).as_deref(), Ok("/"));
        assert_eq!(canonical_prefix(&"//a//caf%c3%a9/".into()).as_deref(), Ok("/a/caf%C3%A9"));
        assert_eq!(canonical_prefix(&"/%61/./b".into()).as_deref(), Ok("/a/b"));
        for bad in ["/a;b", "/a%2Fb", "/a%5cb", "/a//b;c", "/a%2561"] {
            assert_eq!(canonical_prefix(&bad.into()), Err(PathError::Ambiguous), "{bad}");
        }
        assert_eq!(canonical_prefix(&"/a\\b".into()), Err(PathError::Backslash));
        assert_eq!(canonical_prefix(&"/../a".into()), Err(PathError::AboveRoot));
    }

    /// Paths over few letters, so that they share prefixes; `-` sorts before `/`, `~` behind everything.
    fn path() -> impl Strategy<Value = String> {
        "(/[ab\\-~]{0,2}){1,4}"
    }

    proptest! {
        #[test]
        fn many_prefixes_and_few_agree_on_every_path(
            prefixes in prop::collection::btree_set(path(), 13..60),
            paths in prop::collection::vec(prop_oneof![path(), "[/ab]{0,6}"], 1..40),
        ) {
            let table = routes(&prefixes.iter().map(String::as_str).collect::<Vec<_>>());
            for path in &paths {
                let scan = table.as_slice().iter().filter(|r| is_prefix(&r.prefix, path));
                let scan = scan.max_by_key(|r| r.prefix.len()).map(|r| &r.prefix);
                let found = longest_by_search(table.as_slice(), path).map(|r| &r.prefix);
                prop_assert_eq!(found, scan, "{:?}", path);
            }
        }
    }
}
