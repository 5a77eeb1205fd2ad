//! What the edge makes of answers for the client's sake: smaller ones, and pages of the operator's own.

use std::sync::Arc;

/// A content coding (RFC 9110 §8.4.1; zstd: RFC 8878, br: RFC 7932, gzip: RFC 1952).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coding {
    /// `zstd`.
    Zstd,
    /// `br`.
    Brotli,
    /// `gzip`.
    Gzip,
}

impl Coding {
    /// Every one, the one that gives most for its time first.
    pub const ALL: [Self; 3] = [Self::Zstd, Self::Brotli, Self::Gzip];

    /// As it is in `Content-Encoding`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Brotli => "br",
            Self::Gzip => "gzip",
        }
    }
}

/// Which answers are compressed on their way, if the client takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compression {
    /// What may be used; where a client likes several as much, the first.
    pub codings: Vec<Coding>,
    /// Media types in lower case, without parameters: `text/html`, or `text/*` for all that begin so.
    pub types: Vec<Arc<str>>,
    /// Answers of which it is known that they have fewer bytes go on as they are.
    pub min_bytes: u64,
}

/// A page for answers that the edge makes itself: for one status, or for all of its hundred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorPage {
    /// 400–599, or 4 or 5 for all of them.
    pub status: u16,
    /// HTML, with `{status}`, `{reason}` and `{request_id}` where these belong.
    pub html: Arc<str>,
}

impl ErrorPage {
    /// The page for a status, if there is one: its own before that of its hundred.
    #[must_use]
    pub fn of(pages: &[Self], status: u16) -> Option<&Self> {
        let find = |wanted: u16| pages.iter().find(|page| page.status == wanted);
        find(status).or_else(|| find(status / 100))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_a_status_goes_before_the_page_of_its_hundred() {
        let page = |status| ErrorPage { status, html: format!("{status}").into() };
        let pages = [page(5), page(503), page(404)];
        for (status, found) in [(503, Some("503")), (502, Some("5")), (404, Some("404")), (403, None)] {
            assert_eq!(ErrorPage::of(&pages, status).map(|page| &*page.html), found, "{status}");
        }
    }
}
