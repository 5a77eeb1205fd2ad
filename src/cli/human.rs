//! Numbers as people read them: three significant digits, the unit beside it.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// `843 B`, `12.3 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `840 ms`, `12.3 s`, `4m 05s`, `3h 10m`.
pub(crate) fn millis(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..100_000 => format!("{} s", three_digits(ms as f64 / 1e3)),
        100_000..3_600_000 => format!("{}m {:02}s", ms / 60_000, ms / 1_000 % 60),
        3_600_000..172_800_000 => format!("{}h {:02}m", ms / 3_600_000, ms / 60_000 % 60),
        _ => format!("{}d {:02}h", ms / 86_400_000, ms / 3_600_000 % 24),
    }
}

/// A latency: `840 µs`, `4.20 ms`.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", three_digits(us as f64 / 1e3)),
        _ => format!("{} s", three_digits(us as f64 / 1e6)),
    }
}

/// A latency that may not have been measured.
pub(crate) fn micros_or_dash(us: Option<u64>) -> String {
    us.map_or_else(|| "-".to_owned(), micros)
}

/// `31,204`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Requests per second.
pub(crate) fn rate(per_second: f64) -> String {
    if per_second >= 9.95 || per_second == 0.0 {
        format!("{per_second:.0}/s")
    } else {
        format!("{per_second:.1}/s")
    }
}

/// A plural where one is due: `1 copy`, `2 copies`.
pub(crate) fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// A moment in the zone of this machine: `2026-01-31 12:40:00`.
pub(crate) fn moment(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// The same without the day.
pub(crate) fn clock(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%H:%M:%S").to_string()
}

/// In UTC with milliseconds (RFC 3339), for logs.
pub(crate) fn stamp(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// How long ago: `3 min ago`.
pub(crate) fn ago(time: Timestamp) -> String {
    let seconds = millis_between(time, Timestamp::now()) / 1_000;
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// Milliseconds from one moment to a later one; 0 if it is not later.
pub(crate) fn millis_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.duration_since(from).as_millis()).unwrap_or(0)
}

/// A share in percent with as many digits as it needs: `50 %`, `0.25 %`.
pub(crate) fn percent(value: f64) -> String {
    if (value - value.round()).abs() < 0.005 { format!("{value:.0} %") } else { format!("{value:.2} %") }
}

fn three_digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_carry_three_digits_and_a_unit() {
        assert_eq!(bytes(843), "843 B");
        assert_eq!(bytes(1_536), "1.50 KiB");
        assert_eq!(bytes(190_840_832), "182 MiB");
        assert_eq!(bytes(1_048_575), "1.00 MiB");
        assert_eq!(millis(840), "840 ms");
        assert_eq!(millis(2_345), "2.35 s");
        assert_eq!(millis(130_000), "2m 10s");
        assert_eq!(micros(48_000), "48.0 ms");
        assert_eq!(rate(3.25), "3.2/s");
        assert_eq!(rate(118.4), "118/s");
    }

    #[test]
    fn large_counts_have_separators() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(31_204), "31,204");
        assert_eq!(count(1_000_000), "1,000,000");
        assert_eq!(plural(1, "copy", "copies"), "1 copy");
        assert_eq!(plural(2, "copy", "copies"), "2 copies");
    }

    #[test]
    fn stamps_are_utc_with_milliseconds() {
        let time = Timestamp::from_millisecond(1_769_859_600_123).unwrap();
        assert_eq!(stamp(time), "2026-01-31T11:40:00.123Z");
        assert_eq!(stamp(Timestamp::from_second(0).unwrap()), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn shares_show_the_digits_that_they_need() {
        assert_eq!(percent(50.0), "50 %");
        assert_eq!(percent(0.25), "0.25 %");
    }
}
