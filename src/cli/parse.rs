//! Values on the command line: durations, weights, guards, labels.
//!
//! Each parser says what it found wrong and shows a value that works. Nothing is guessed: a number without
//! its unit is refused.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// Longest duration that is accepted, so that a slip (`10000h`) is told instead of obeyed.
const MAX_DURATION_DAYS: u64 = 365;
/// Looking more often tells nothing more.
const MIN_INTERVAL_MS: u64 = 100;

/// A duration with its unit: `500ms`, `30s`, `10m`, `1h30m`; a bare `0` is fine.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("`{text}` has no unit: write {text}s, {text}m or {text}ms"));
    }
    let parsed: SignedDuration =
        text.parse().map_err(|_| "not a duration: write 500ms, 30s, 10m or 1h30m".to_owned())?;
    let duration = Duration::try_from(parsed).map_err(|_| "a duration cannot be negative".to_owned())?;
    if duration > Duration::from_secs(MAX_DURATION_DAYS * 24 * 3600) {
        return Err(format!("longer than {MAX_DURATION_DAYS} days"));
    }
    Ok(duration)
}

/// The same in whole milliseconds.
pub(crate) fn duration_ms(text: &str) -> Result<u64, String> {
    let duration = duration(text)?;
    u64::try_from(duration.as_millis()).map_err(|_| "too long".to_owned())
}

/// Weights of the new copies in percent: rising, the last one 100.
pub(crate) fn steps(text: &str) -> Result<Steps, String> {
    let mut steps = Vec::new();
    for part in text.split(',') {
        let part = part.trim().trim_end_matches('%');
        let percent: u8 =
            part.parse().map_err(|_| format!("`{part}` is not a percentage: write 1,10,50,100"))?;
        if percent == 0 || percent > 100 {
            return Err(format!("{percent} is not between 1 and 100"));
        }
        if steps.last().is_some_and(|last| *last >= percent) {
            return Err(format!("{percent} does not rise: write 1,10,50,100"));
        }
        steps.push(percent);
    }
    if steps.last() != Some(&100) {
        return Err("the last step must be 100".to_owned());
    }
    Ok(Steps(steps))
}

/// Weights of the new copies in percent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Steps(pub(crate) Vec<u8>);

/// When a rollout turns back by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct AbortOn {
    /// Errors of the new copies above those of the old ones, as a ratio: 0.01 is 1 %.
    pub(crate) error_ratio_increase: Option<f64>,
    /// p95 of the new copies above that of the old ones, as a share: 0.5 is +50 %. `Some(None)` is off.
    pub(crate) p95_increase: Option<Option<f64>>,
}

/// Guards: `error-rate=1%,p95=+50%`; `p95=off` switches that one off.
pub(crate) fn abort_on(text: &str) -> Result<AbortOn, String> {
    const EXAMPLE: &str = "write error-rate=1%,p95=+50% (or p95=off)";
    let mut guards = AbortOn::default();
    for part in text.split(',') {
        let (name, value) =
            part.split_once('=').ok_or_else(|| format!("`{part}` has no value: {EXAMPLE}"))?;
        let (name, value) = (name.trim(), value.trim());
        match name {
            "error-rate" if guards.error_ratio_increase.is_some() => {
                return Err("error-rate is given twice".into());
            }
            "p95" if guards.p95_increase.is_some() => return Err("p95 is given twice".into()),
            "error-rate" => {
                let ratio = percent(value)?;
                if ratio > 1.0 {
                    return Err(format!("error-rate={value}: more than 100 % of the requests cannot fail"));
                }
                guards.error_ratio_increase = Some(ratio);
            }
            "p95" if value == "off" => guards.p95_increase = Some(None),
            "p95" => guards.p95_increase = Some(Some(percent(value)?)),
            other => return Err(format!("no guard is called `{other}`: {EXAMPLE}")),
        }
    }
    Ok(guards)
}

/// A share of requests in thousandths: `20%`, `0.5%`; `off` is none.
pub(crate) fn sample(text: &str) -> Result<u16, String> {
    if text == "off" {
        return Ok(0);
    }
    let share = percent(text)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small number, not below 0"
    )]
    let permille = (share.min(2.0) * 1_000.0).round() as u16;
    if (1..=1_000).contains(&permille) {
        return Ok(permille);
    }
    Err(format!("`{text}`: write a share from 0.1% to 100%, or off"))
}

/// `1%`, `+50%` or `0.5%` as a share of one.
fn percent(text: &str) -> Result<f64, String> {
    let number = text
        .strip_suffix('%')
        .ok_or_else(|| format!("`{text}` is not a percentage: write {}%", text.trim_start_matches('+')))?;
    let value: f64 =
        number.trim_start_matches('+').trim().parse().map_err(|_| format!("`{text}` is not a percentage"))?;
    if !value.is_finite() || value < 0.0 {
        return Err(format!("`{text}` is not a percentage of 0 or more"));
    }
    Ok(value / 100.0)
}

/// `key=value`.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err("write key=value".to_owned()),
    }
}

/// Time between two looks: a duration of at least 100 ms.
pub(crate) fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    if interval < Duration::from_millis(MIN_INTERVAL_MS) {
        return Err(format!("shorter than {MIN_INTERVAL_MS} ms"));
    }
    Ok(interval)
}

/// A moment: a duration back from now (`10m`) or an RFC 3339 time.
pub(crate) fn since(text: &str) -> Result<Timestamp, String> {
    since_at(text, Timestamp::now())
}

fn since_at(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let back = duration(text)
        .map_err(|_| "neither a duration (10m) nor a time (2026-01-31T12:00:00Z)".to_owned())?;
    now.checked_sub(back).map_err(|_| "too long ago".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration_ms("10m"), Ok(600_000));
        assert_eq!(duration_ms("1h30m"), Ok(5_400_000));
        assert_eq!(duration_ms("250ms"), Ok(250));
        assert_eq!(duration_ms("1.5s"), Ok(1_500));
        assert_eq!(duration_ms("0"), Ok(0));
        let refused = duration_ms("10").unwrap_err();
        assert!(refused.contains("10s"), "{refused}");
        for bad in ["", "ten minutes", "-5s", "m", "9999999h"] {
            assert!(duration_ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn steps_rise_to_a_hundred() {
        assert_eq!(steps("1,10,50,100"), Ok(Steps(vec![1, 10, 50, 100])));
        assert_eq!(steps("50%, 100%"), Ok(Steps(vec![50, 100])));
        assert_eq!(steps("100"), Ok(Steps(vec![100])));
        for bad in ["", "0,100", "50,10,100", "10,10,100", "1,50", "1,101", "1;100", "a"] {
            assert!(steps(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn guards_are_percentages() {
        let both = AbortOn { error_ratio_increase: Some(0.01), p95_increase: Some(Some(0.5)) };
        assert_eq!(abort_on("error-rate=1%,p95=+50%"), Ok(both));
        assert_eq!(abort_on("p95=50%, error-rate=1%"), Ok(both));
        assert_eq!(abort_on("p95=off").unwrap().p95_increase, Some(None));
        assert_eq!(abort_on("p95=+150%").unwrap().p95_increase, Some(Some(1.5)));
        for bad in [
            "",
            "error-rate",
            "error-rate=1",
            "error-rate=150%",
            "p99=+5%",
            "p95=-5%",
            "p95=NaN%",
            "p95=1%,p95=2%",
        ] {
            assert!(abort_on(bad).is_err(), "{bad}");
        }
        assert!(abort_on("latency=5%").unwrap_err().contains("error-rate=1%"));
    }

    #[test]
    fn since_is_a_duration_back_or_a_time() {
        let now: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!(since_at("10m", now), Ok(at("2026-01-31T11:50:00Z")));
        assert_eq!(since_at("2026-01-31T11:40:00Z", now), Ok(at("2026-01-31T11:40:00Z")));
        assert!(since_at("yesterday", now).unwrap_err().contains("10m"));
    }

    #[test]
    fn labels_have_a_key() {
        assert_eq!(label("zone=a=b"), Ok(("zone".into(), "a=b".into())));
        assert!(label("=x").is_err() && label("x").is_err());
    }
}
