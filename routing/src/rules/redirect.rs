//! Paths that lead elsewhere: by an answer of the edge, or under another name at the origin.

use std::sync::Arc;

/// A path that is answered with another address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// The path, in its canonical form; empty with `below` is every path.
    pub from: Arc<str>,
    /// Whether it is also for what is below that path, and keeps the rest of it.
    pub below: bool,
    /// A path, or an address with `http` or `https`.
    pub to: Arc<str>,
    /// 301, 302, 307 or 308.
    pub status: u16,
}

impl Redirect {
    /// Where a request with this canonical path is sent; `None` if this redirect is not for it.
    #[must_use]
    pub fn location(&self, path: &str, query: Option<&str>) -> Option<String> {
        let rest = path.strip_prefix(&*self.from)?;
        let fits = rest.is_empty() || (self.below && rest.starts_with('/'));
        if !fits {
            return None;
        }
        let mut location = if rest.is_empty() {
            self.to.to_string()
        } else {
            match self.to.strip_suffix('/').unwrap_or(&self.to) {
                // "//host" would be another site (RFC 3986 §4.2).
                "" => format!("/{}", rest.trim_start_matches('/')),
                to => format!("{to}{rest}"),
            }
        };
        if let Some(query) = query.filter(|query| !query.is_empty()) {
            location.push(if location.contains('?') { '&' } else { '?' });
            location.push_str(query);
        }
        Some(location)
    }
}

/// How a path is changed before it goes on. What decides on the route is the path before that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Taken off where a path begins with it, on a segment border; a path that does not goes on with it.
    pub strip_prefix: Option<Arc<str>>,
    /// Put before it.
    pub add_prefix: Option<Arc<str>>,
}

impl Rewrite {
    /// The path that goes on for this canonical one, which is canonical too; `None` if it stays as it is.
    #[must_use]
    pub fn apply(&self, path: &str) -> Option<String> {
        let stripped = self.strip_prefix.as_deref().and_then(|prefix| path.strip_prefix(prefix));
        let stripped = stripped.filter(|rest| rest.is_empty() || rest.starts_with('/'));
        if (stripped.is_none() && self.add_prefix.is_none()) || !path.starts_with('/') {
            return None;
        }
        let rest = stripped.unwrap_or(path);
        Some(match self.add_prefix.as_deref() {
            Some(prefix) => format!("{prefix}{rest}"),
            // "//x" would be read as a host by some (RFC 3986 §4.2).
            None => format!("/{}", rest.trim_start_matches('/')),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canonical_path;

    fn redirect(from: &str, below: bool, to: &str) -> Redirect {
        Redirect { from: from.into(), below, to: to.into(), status: 308 }
    }

    #[test]
    fn the_rest_of_a_path_and_its_query_are_kept() {
        let exact = redirect("/old", false, "/new");
        for (path, query, to) in [
            ("/old", None, Some("/new")),
            ("/old", Some("a=b&c"), Some("/new?a=b&c")),
            ("/old", Some(""), Some("/new")),
            ("/old/x", None, None),
            ("/older", None, None),
            ("/", None, None),
        ] {
            assert_eq!(exact.location(path, query).as_deref(), to, "{path}");
        }
        let below = redirect("/old", true, "https://new.test/shop/");
        for (path, to) in [
            ("/old", Some("https://new.test/shop/")),
            ("/old/x/y", Some("https://new.test/shop/x/y")),
            ("/old/", Some("https://new.test/shop/")),
            ("/older", None),
        ] {
            assert_eq!(below.location(path, None).as_deref(), to, "{path}");
        }
        let all = redirect("", true, "https://new.test");
        assert_eq!(all.location("/x", Some("q")).as_deref(), Some("https://new.test/x?q"));
        assert_eq!(redirect("/a", false, "/b?c=d").location("/a", Some("e")).as_deref(), Some("/b?c=d&e"));
    }

    #[test]
    fn no_path_leads_to_another_site() {
        let below = redirect("/old", true, "/");
        for path in ["/old//evil.test", "/old///evil.test/x", "/old/"] {
            let location = below.location(path, None).expect("fits");
            assert!(location.starts_with('/') && !location.starts_with("//"), "{location}");
        }
        let host = redirect("", true, "https://new.test");
        assert_eq!(host.location("//evil.test", None).as_deref(), Some("https://new.test//evil.test"));
        assert_eq!(host.location(".evil.test", None), None);
    }

    #[test]
    fn a_rewritten_path_is_canonical() {
        let of = |strip: Option<&str>, add: Option<&str>| Rewrite {
            strip_prefix: strip.map(Into::into),
            add_prefix: add.map(Into::into),
        };
        for (strip, add, path, on) in [
            (Some("/api"), None, "/api/x", Some("/x")),
            (Some("/api"), None, "/api", Some("/")),
            (Some("/api"), None, "/api//x", Some("/x")),
            (Some("/api"), None, "/apis", None),
            (Some("/api"), Some("/v2"), "/api/x", Some("/v2/x")),
            (Some("/api"), Some("/v2"), "/api", Some("/v2")),
            (Some("/api"), Some("/v2"), "/other", Some("/v2/other")),
            (None, Some("/v2"), "/", Some("/v2/")),
            (None, Some("/v2"), "/a%2Fb", Some("/v2/a%2Fb")),
            (Some("/a"), Some("/v2"), "*", None),
            (None, None, "/a", None),
        ] {
            let rewritten = of(strip, add).apply(path);
            assert_eq!(rewritten.as_deref(), on, "{strip:?} {add:?} {path}");
            if let Some(rewritten) = rewritten {
                assert_eq!(canonical_path(&rewritten).expect("a path").path, rewritten, "{path}");
            }
        }
    }
}
