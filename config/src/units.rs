//! Amounts as people write them: `30s`, `512MiB`, `1%`.

const MILLIS: [(&str, f64); 5] =
    [("ms", 1.0), ("s", 1_000.0), ("m", 60_000.0), ("h", 3_600_000.0), ("d", 86_400_000.0)];
const BYTES: [(&str, f64); 9] = [
    ("B", 1.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
];
/// Beyond this not every integer is a float, so an amount could be changed in silence.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// A duration in milliseconds: `200ms`, `1.5s`, `1m30s`, `2h`, `1d`.
pub(crate) fn duration_ms(text: &str) -> Option<u64> {
    let mut rest = text;
    let mut total = 0.0;
    let mut last_unit = f64::INFINITY;
    while !rest.is_empty() {
        let (number, after) = split_number(rest)?;
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let unit = MILLIS.iter().find(|(name, _)| *name == &after[..letters])?.1;
        if unit >= last_unit {
            return None; // "1s30m" is a slip, not a duration
        }
        last_unit = unit;
        total += number * unit;
        rest = &after[letters..];
    }
    if text.is_empty() { None } else { whole(total) }
}

/// A size in bytes: `512MiB`, `10MB`, `64KiB`, `100B`.
pub(crate) fn size_bytes(text: &str) -> Option<u64> {
    let (number, unit) = split_number(text)?;
    let unit = BYTES.iter().find(|(name, _)| *name == unit.trim_start())?.1;
    whole(number * unit)
}

/// A share: `1%` is 0.01.
pub(crate) fn percent(text: &str) -> Option<f64> {
    let (number, unit) = split_number(text)?;
    (unit.trim_start() == "%").then_some(number / 100.0)
}

/// Milliseconds as people write them.
pub(crate) fn show_duration(ms: u64) -> String {
    let unit = MILLIS.iter().rev().find(|(_, unit)| ms > 0 && ms.is_multiple_of(*unit as u64));
    let (name, unit) = unit.unwrap_or(&("s", 1_000.0));
    format!("{}{name}", ms / *unit as u64)
}

/// Bytes as people write them.
pub(crate) fn show_size(bytes: u64) -> String {
    let binary = [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let unit = binary.iter().find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes}B"), |(name, unit)| format!("{}{name}", bytes / unit))
}

fn split_number(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let digits = &text[..end];
    if !digits.starts_with(|c: char| c.is_ascii_digit()) || digits.ends_with('.') {
        return None;
    }
    Some((digits.parse().ok()?, &text[end..]))
}

fn whole(number: f64) -> Option<u64> {
    let fits = number.fract() == 0.0 && number < MAX_EXACT;
    fits.then_some(number as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        let good = [
            ("0s", 0),
            ("200ms", 200),
            ("30s", 30_000),
            ("1.5s", 1_500),
            ("5m", 300_000),
            ("1m30s", 90_000),
            ("2h", 7_200_000),
            ("1d12h", 129_600_000),
        ];
        for (text, ms) in good {
            assert_eq!(duration_ms(text), Some(ms), "{text}");
        }
        let bad = [
            "", "30", "s", "30 s", "30S", "-1s", "1s30m", "1s2s", ".5s", "5.s", "1e3s", "0.5ms", "1.2.3s",
            "30sec",
        ];
        for text in bad {
            assert_eq!(duration_ms(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let good = [
            ("100B", 100),
            ("10MB", 10_000_000),
            ("512MiB", 536_870_912),
            ("1.5 GiB", 1_610_612_736),
            ("0B", 0),
        ];
        for (text, bytes) in good {
            assert_eq!(size_bytes(text), Some(bytes), "{text}");
        }
        for text in ["", "10", "10mb", "10M", "MiB", "-1B", "0.3B", "99999999TiB"] {
            assert_eq!(size_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn percentages_are_read_as_people_write_them() {
        assert_eq!(percent("1%"), Some(0.01));
        assert_eq!(percent("50 %"), Some(0.5));
        for text in ["", "1", "%", "-1%", "1%%"] {
            assert_eq!(percent(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read(amount in 0..1_u64 << 50) {
            prop_assert_eq!(duration_ms(&show_duration(amount)), Some(amount));
            prop_assert_eq!(size_bytes(&show_size(amount)), Some(amount));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = (duration_ms(&text), size_bytes(&text), percent(&text));
        }
    }
}
