//! Instants.

use jiff::Timestamp;

/// An instant of the engine (Unix milliseconds) as it goes over the wire. One beyond the calendar (year
/// 9999) becomes the calendar's end.
#[must_use]
pub fn instant(unix_ms: u64) -> Timestamp {
    i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_is_written_as_rfc_3339_in_utc() {
        let text = serde_json::to_string(&instant(1_700_000_000_123)).unwrap();
        assert_eq!(text, "\"2023-11-14T22:13:20.123Z\"");
    }

    #[test]
    fn an_instant_beyond_the_calendar_is_its_end() {
        assert_eq!(instant(u64::MAX), Timestamp::MAX);
    }
}
