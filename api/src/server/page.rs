//! Pages of lists: an opaque cursor names the last item of the page before, so that items that come and go
//! in between neither repeat nor hide others.

use super::error::ApiError;
use crate::codes;
use crate::types::Page;

/// Items of a page unless told otherwise.
pub(crate) const DEFAULT_PAGE_ITEMS: usize = 50;
/// Most items of a page.
pub(crate) const MAX_PAGE_ITEMS: usize = 500;

/// Begin of every cursor; another one would mean another form.
const FORM: &str = "1";

/// The page after the item that `cursor` names, of `items` in their order by `key`: rising, or falling if
/// `newest_first`.
pub(crate) fn page<I, T>(
    items: impl Iterator<Item = I>,
    key: impl Fn(&I) -> String,
    newest_first: bool,
    limit: Option<usize>,
    cursor: Option<&str>,
    told: impl FnMut(I) -> T,
) -> Result<Page<T>, ApiError> {
    let limit = limit.unwrap_or(DEFAULT_PAGE_ITEMS);
    if !(1..=MAX_PAGE_ITEMS).contains(&limit) {
        return Err(ApiError::new(&codes::QUERY, format!("limit must be 1 to {MAX_PAGE_ITEMS}")).at("limit"));
    }
    let after = cursor.map(opened).transpose()?;
    let is_later = |item: &I| match &after {
        None => true,
        Some(after) if newest_first => key(item) < *after,
        Some(after) => key(item) > *after,
    };
    let mut rest: Vec<I> = items.filter(is_later).take(limit + 1).collect();
    let more = rest.len() > limit;
    rest.truncate(limit);
    let next_cursor = if more { rest.last().map(|item| closed(&key(item))) } else { None };
    Ok(Page { items: rest.into_iter().map(told).collect(), next_cursor })
}

fn closed(key: &str) -> String {
    key.bytes().fold(FORM.to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

fn opened(cursor: &str) -> Result<String, ApiError> {
    let wrong = || ApiError::new(&codes::CURSOR, "the cursor was not given by this list").at("cursor");
    let digits = cursor
        .strip_prefix(FORM)
        .filter(|digits| digits.is_ascii() && digits.len() % 2 == 0)
        .ok_or_else(wrong)?;
    let bytes = (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16))
        .collect::<Result<Vec<u8>, _>>()
        .map_err(|_| wrong())?;
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str], newest_first: bool, limit: usize, cursor: Option<&str>) -> Page<String> {
        page(list.iter(), ToString::to_string, newest_first, Some(limit), cursor, ToString::to_string)
            .unwrap()
    }

    #[test]
    fn pages_cover_a_list_once_in_either_order_and_the_last_one_says_so() {
        for (list, newest_first) in [(["a", "b", "c", "d", "é"], false), (["é", "d", "c", "b", "a"], true)]
        {
            let mut seen = Vec::new();
            let mut cursor = None;
            loop {
                let page = names(&list, newest_first, 2, cursor.as_deref());
                seen.extend(page.items);
                cursor = page.next_cursor;
                if cursor.is_none() {
                    break;
                }
            }
            assert_eq!(seen, list);
        }
        assert_eq!(names(&["a", "b"], false, 2, None).next_cursor, None);
    }

    #[test]
    fn an_item_that_goes_or_comes_between_two_pages_hides_no_other() {
        let first = names(&["b", "d", "f"], false, 2, None);
        let second = names(&["a", "b", "e", "f"], false, 2, first.next_cursor.as_deref());
        assert_eq!(second.items, ["e", "f"]);
    }

    #[test]
    fn a_cursor_or_limit_that_cannot_be_is_refused() {
        for cursor in ["", "x", "1zz", "161a0", "2ab", "1f", "1ff", "1é"] {
            let refused = page([1].iter(), ToString::to_string, false, None, Some(cursor), |n| *n);
            assert_eq!(refused.unwrap_err().code(), "request.invalid_cursor", "{cursor}");
        }
        for limit in [0, MAX_PAGE_ITEMS + 1] {
            let refused = page([1].iter(), ToString::to_string, false, Some(limit), None, |n| *n);
            assert_eq!(refused.unwrap_err().code(), "request.invalid_query");
        }
    }
}
