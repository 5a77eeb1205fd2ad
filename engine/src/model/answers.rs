//! What edges make of answers: compressed ones, and pages in place of their own.

use serde::{Deserialize, Serialize};

use super::rules::{RulesSpec, Unfit, unfit};

/// A content coding, by its name in `Content-Encoding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodingSpec {
    /// RFC 8878.
    Zstd,
    /// RFC 7932.
    Br,
    /// RFC 1952.
    Gzip,
}

impl CodingSpec {
    /// Every one with its name, the best first.
    pub const ALL: [(&'static str, Self); 3] = [("zstd", Self::Zstd), ("br", Self::Br), ("gzip", Self::Gzip)];

    pub(crate) const fn rendered(self) -> peregrine_routing::Coding {
        match self {
            Self::Zstd => peregrine_routing::Coding::Zstd,
            Self::Br => peregrine_routing::Coding::Brotli,
            Self::Gzip => peregrine_routing::Coding::Gzip,
        }
    }
}

/// Which answers are compressed on their way to a client that takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompressionSpec {
    /// What may be used; where a client likes several as much, the first.
    pub codings: Vec<CodingSpec>,
    /// Media types: `text/html`, or `text/*` for all that begin so.
    pub types: Vec<String>,
    /// Answers of which it is known that they are smaller go on as they are.
    pub min_bytes: u64,
}

impl Default for CompressionSpec {
    fn default() -> Self {
        Self {
            codings: CodingSpec::ALL.map(|(_, coding)| coding).to_vec(),
            types: Self::TYPES.map(str::to_owned).to_vec(),
            min_bytes: Self::MIN_BYTES,
        }
    }
}

impl CompressionSpec {
    /// What is text in one way or another, and does not come compressed by itself.
    pub const TYPES: [&'static str; 14] = [
        "text/*",
        "application/atom+xml",
        "application/javascript",
        "application/json",
        "application/ld+json",
        "application/manifest+json",
        "application/problem+json",
        "application/rss+xml",
        "application/wasm",
        "application/xhtml+xml",
        "application/xml",
        "font/otf",
        "font/ttf",
        "image/svg+xml",
    ];
    /// Less fits into one packet with its head.
    pub const MIN_BYTES: u64 = 1_024;
    /// Types of one service: each is looked at for each answer.
    pub const MAX_TYPES: usize = 64;
    /// Longest type.
    pub const MAX_TYPE_BYTES: usize = 128;
    /// Beyond it nothing would be compressed.
    pub const MAX_MIN_BYTES: u64 = 1 << 30;

    /// Whether an edge could follow it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unfit> {
        let twice = |at: usize| self.codings[..at].contains(&self.codings[at]);
        if self.codings.is_empty() || (0..self.codings.len()).any(twice) {
            let message = "compression has no codings, or one twice";
            return Err(unfit(
                message,
                "Write some of zstd, br and gzip, the one to use first at the front.",
            ));
        }
        if self.types.is_empty() || self.types.len() > Self::MAX_TYPES {
            let message = format!("compression is for {} media types", self.types.len());
            let hint = format!("Write 1 to {}, such as text/*, or leave types out.", Self::MAX_TYPES);
            return Err(unfit(message, hint));
        }
        for name in &self.types {
            if !is_media_type(name) {
                return Err(unfit(
                    format!("{name:?} is no media type"),
                    "Write it without parameters, such as text/html or application/json, or text/* for all of a kind.",
                ));
            }
        }
        if self.min_bytes > Self::MAX_MIN_BYTES {
            let message = format!("compression begins at {} bytes", self.min_bytes);
            return Err(unfit(message, format!("Write at most {} bytes.", Self::MAX_MIN_BYTES)));
        }
        Ok(())
    }

    pub(crate) fn rendered(&self) -> peregrine_routing::Compression {
        peregrine_routing::Compression {
            codings: self.codings.iter().map(|coding| coding.rendered()).collect(),
            types: self.types.iter().map(|name| name.to_ascii_lowercase().into()).collect(),
            min_bytes: self.min_bytes,
        }
    }
}

/// `type/subtype` (RFC 9110 §8.3.1), with a subtype that may end in `*`.
fn is_media_type(text: &str) -> bool {
    let token = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$&^_.+-".contains(&b))
    };
    let Some((kind, subtype)) = text.split_once('/') else { return false };
    let stem = subtype.strip_suffix('*').unwrap_or(subtype);
    text.len() <= CompressionSpec::MAX_TYPE_BYTES && token(kind) && (subtype == "*" || token(stem))
}

impl RulesSpec {
    /// Pages of one service.
    pub const MAX_ERROR_PAGES: usize = 16;
    /// Longest page: it travels with the table.
    pub const MAX_ERROR_PAGE_BYTES: usize = 32 * 1024;

    /// Whether edges could give these pages.
    pub(super) fn check_error_pages(&self) -> Result<(), Unfit> {
        if self.error_pages.len() > Self::MAX_ERROR_PAGES {
            let message = format!("there are {} error pages", self.error_pages.len());
            let hint =
                format!("Write at most {}: 5xx stands for all from 500 to 599.", Self::MAX_ERROR_PAGES);
            return Err(unfit(message, hint));
        }
        for (key, html) in &self.error_pages {
            if error_status(key).is_none() {
                return Err(unfit(
                    format!("{key:?} is no status that a page is for"),
                    "Write one from 400 to 599, or 4xx or 5xx for all of them.",
                ));
            }
            if html.trim().is_empty() || html.len() > Self::MAX_ERROR_PAGE_BYTES {
                return Err(unfit(
                    format!("the error page for {key} has {} bytes", html.len()),
                    format!(
                        "Write 1 to {} bytes of HTML; pictures and styles can be at another address.",
                        Self::MAX_ERROR_PAGE_BYTES
                    ),
                ));
            }
        }
        Ok(())
    }

    pub(crate) fn rendered_error_pages(&self) -> Vec<peregrine_routing::ErrorPage> {
        let page = |(key, html): (&String, &String)| {
            Some(peregrine_routing::ErrorPage { status: error_status(key)?, html: html.as_str().into() })
        };
        self.error_pages.iter().filter_map(page).collect()
    }
}

/// A status, or the first digit of a hundred.
fn error_status(key: &str) -> Option<u16> {
    match key {
        "4xx" => Some(4),
        "5xx" => Some(5),
        _ => key.parse().ok().filter(|status| key.len() == 3 && (400..600).contains(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_has_codings_and_media_types() {
        assert_eq!(CompressionSpec::default().check(), Ok(()));
        let of = |codings: &[CodingSpec], types: &[&str]| CompressionSpec {
            codings: codings.to_vec(),
            types: types.iter().map(ToString::to_string).collect(),
            min_bytes: 0,
        };
        let all = CodingSpec::ALL.map(|(_, coding)| coding);
        for types in [&["text/html"][..], &["text/*"], &["application/vnd.a+json", "Text/X-*"]] {
            assert_eq!(of(&all, types).check(), Ok(()), "{types:?}");
        }
        for types in
            [&[][..], &["html"], &["*/*"], &["text/"], &["/x"], &["text/html; charset=utf-8"], &["a/b/c"]]
        {
            assert!(of(&all, types).check().is_err(), "{types:?}");
        }
        assert!(of(&[], &["text/*"]).check().is_err());
        assert!(of(&[CodingSpec::Br, CodingSpec::Br], &["text/*"]).check().is_err());
        let late = CompressionSpec { min_bytes: CompressionSpec::MAX_MIN_BYTES + 1, ..Default::default() };
        assert!(late.check().is_err());
    }

    #[test]
    fn pages_are_for_statuses_of_errors() {
        let of = |pages: &[(&str, &str)]| RulesSpec {
            error_pages: pages.iter().map(|(key, html)| (key.to_string(), html.to_string())).collect(),
            ..Default::default()
        };
        let good = of(&[("503", "<h1>{status}</h1>"), ("5xx", "x"), ("404", "y")]);
        assert_eq!(good.check_error_pages(), Ok(()));
        let mut statuses: Vec<u16> = good.rendered_error_pages().iter().map(|page| page.status).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [5, 404, 503]);
        for key in ["", "200", "399", "600", "3xx", "5XX", "0503", "+50", "any"] {
            assert!(of(&[(key, "x")]).check_error_pages().is_err(), "{key}");
        }
        assert!(of(&[("503", " \n")]).check_error_pages().is_err());
        let long = "x".repeat(RulesSpec::MAX_ERROR_PAGE_BYTES + 1);
        assert!(of(&[("503", &long)]).check_error_pages().is_err());
    }
}
