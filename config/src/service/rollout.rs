//! `[service.NAME.move]`: how a rollout goes about a service.

use peregrine_engine::model::{
    CutoverSettings, DrainDeadlines, Guards, HoldThen, MirrorSettings, MoveSettings, WarmSettings,
};

use crate::names;
use crate::raw::Node;

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
/// Most steps of one shift.
const MAX_STEPS: usize = 20;
/// Most paths of one warm-up.
const MAX_WARM_PATHS: usize = 100;

pub(super) fn move_settings(node: &Node<'_>) -> MoveSettings {
    let mut settings = MoveSettings::default();
    let Some(mut fields) = node.fields() else { return settings };
    fields.set("steps", &mut settings.steps, steps);
    fields.set_duration("step_hold", &mut settings.step_hold_ms, 0..=DAY_MS);
    fields.set_integer("step_min_samples", &mut settings.step_min_samples, 0..=1_000_000);
    let step_max = fields.take("step_max");
    if let Some(ms) = step_max.as_ref().and_then(|node| node.duration_ms(0..=DAY_MS)) {
        settings.step_max_ms = u32::try_from(ms).unwrap_or(u32::MAX);
    } else {
        // Who asks for longer holds does not have to think of this one too.
        settings.step_max_ms = settings.step_max_ms.max(settings.step_hold_ms);
    }
    if let Some(node) = step_max.filter(|_| settings.step_max_ms < settings.step_hold_ms) {
        node.bad(
            format_args!("{} is shorter than step_hold", node.path),
            "a step is held at least for step_hold and waits at most for step_max: write a longer step_max",
        );
    }
    fields.set_duration("hold_max", &mut settings.hold_max_ms, 0..=DAY_MS);
    fields.set("hold_then", &mut settings.hold_then, hold_then);
    fields.set_duration("start_timeout", &mut settings.start_timeout_ms, 1..=DAY_MS);
    fields.set_duration("soak", &mut settings.soak_ms, 0..=30 * DAY_MS);
    fields.set_duration("stop_grace", &mut settings.stop_grace_ms, 0..=HOUR_MS);
    fields.set("single_writer", &mut settings.single_writer, Node::boolean);
    fields.set("cutover", &mut settings.cutover, cutover);
    fields.set("abort_on", &mut settings.guards, guards);
    fields.set("warm", &mut settings.warm, warm);
    fields.set("drain", &mut settings.drain, drain);
    settings
}

fn steps(node: &Node<'_>) -> Option<Vec<u8>> {
    let items = node.list("[1, 10, 50, 100]")?;
    let count = items.len();
    let steps: Vec<u8> = items
        .iter()
        .filter_map(|item| item.integer(1..=100).and_then(|step| u8::try_from(step).ok()))
        .collect();
    if steps.len() != count {
        return None;
    }
    let problem = if !steps.windows(2).all(|pair| pair[0] < pair[1]) {
        "do not rise"
    } else if steps.last() != Some(&100) {
        "do not end at 100"
    } else if count > MAX_STEPS {
        "are more than 20"
    } else {
        return Some(steps);
    };
    node.bad(
        format_args!("{} {problem}", node.path),
        "write percentages that rise, the last one 100, such as [1, 10, 50, 100]",
    );
    None
}

fn hold_then(node: &Node<'_>) -> Option<HoldThen> {
    node.word(&[("pause", HoldThen::Pause), ("go_on", HoldThen::GoOn), ("go_back", HoldThen::GoBack)])
}

fn guards(node: &Node<'_>) -> Option<Guards> {
    const MAX_INCREASE: f64 = 100.0;
    let mut guards = Guards::default();
    let mut fields = node.fields()?;
    fields.set("error_rate", &mut guards.error_ratio_increase, |node| node.share(1.0));
    fields.set("p95_increase", &mut guards.p95_increase, |node| match node.as_boolean() {
        Some(false) => Some(None),
        _ => node.share(MAX_INCREASE).map(Some),
    });
    Some(guards)
}

fn warm(node: &Node<'_>) -> Option<WarmSettings> {
    let mut warm = WarmSettings::default();
    let mut fields = node.fields()?;
    fields.set_integer("probes", &mut warm.probes, 1..=1_000);
    fields.set_duration("interval", &mut warm.probe_interval_ms, 1..=MINUTE_MS);
    fields.set("paths", &mut warm.paths, |node| {
        let items = node.list("[\"/\"]")?;
        if items.len() > MAX_WARM_PATHS {
            node.bad(format_args!("{} has {} paths", node.path, items.len()), "write at most 100");
            return None;
        }
        Some(items.iter().filter_map(|item| names::request_path(item, "/products?page=1")).collect())
    });
    fields.set("mirror", &mut warm.mirror, |node| match node.as_boolean() {
        Some(true) => Some(Some(MirrorSettings::default())),
        Some(false) => Some(None),
        None => mirror(node).map(Some),
    });
    Some(warm)
}

fn cutover(node: &Node<'_>) -> Option<CutoverSettings> {
    let mut cutover = CutoverSettings::default();
    let mut fields = node.fields()?;
    // The engine refuses the same from the API; here it is told with the line.
    let longest_ms = u64::from(CutoverSettings::MAX_MS);
    let shortest_ms = u64::from(CutoverSettings::MIN_HOLD_DEADLINE_MS);
    let (most, fastest) = (CutoverSettings::MAX_HOLD_REQUESTS, CutoverSettings::MAX_HOLD_RELEASE_PER_S);
    let bytes = CutoverSettings::MIN_HOLD_BYTES..=CutoverSettings::MAX_HOLD_BYTES;
    fields.set_duration("hold_deadline", &mut cutover.hold_deadline_ms, shortest_ms..=longest_ms);
    fields.set_integer("hold_max_requests", &mut cutover.hold_max_requests, 1..=i64::from(most));
    fields.set_size("hold_max_bytes", &mut cutover.hold_max_bytes, bytes);
    fields.set_duration("hold_max_age", &mut cutover.hold_max_age_ms, 1..=longest_ms);
    fields.set_integer("hold_release_per_s", &mut cutover.hold_release_per_s, 1..=i64::from(fastest));
    fields.set_duration("drain_max", &mut cutover.drain_max_ms, 0..=longest_ms);
    Some(cutover)
}

fn mirror(node: &Node<'_>) -> Option<MirrorSettings> {
    let mut mirror = MirrorSettings::default();
    let mut fields = node.fields()?;
    fields.set("sample", &mut mirror.sample_permille, permille);
    fields.set_integer("min_samples", &mut mirror.min_samples, 0..=1_000_000);
    fields.set_duration("max", &mut mirror.max_ms, 1..=HOUR_MS);
    fields.set("differing", &mut mirror.differing_ratio, |node| node.share(1.0));
    fields.set("with_credentials", &mut mirror.with_credentials, Node::boolean);
    fields.set_integer("max_requests_per_s", &mut mirror.max_requests_per_s, 1..=1_000_000);
    fields.set_integer("max_concurrent", &mut mirror.max_concurrent, 1..=10_000);
    fields.set_duration("timeout", &mut mirror.timeout_ms, 1..=MINUTE_MS);
    Some(mirror)
}

/// A share as so many of a thousand, at least one.
fn permille(node: &Node<'_>) -> Option<u16> {
    let share = node.share(1.0)?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is from 0 to 1000")]
    let permille = (share * 1_000.0).round() as u16;
    if permille == 0 {
        node.bad(
            format_args!("{} copies nothing", node.path),
            "write a share from \"0.1%\" to \"100%\", or mirror = false",
        );
        return None;
    }
    Some(permille)
}

fn drain(node: &Node<'_>) -> Option<DrainDeadlines> {
    let mut drain = DrainDeadlines::default();
    let mut fields = node.fields()?;
    fields.set_duration("request", &mut drain.request_ms, 0..=DAY_MS);
    fields.set_duration("transfer", &mut drain.transfer_ms, 0..=DAY_MS);
    fields.set_duration("sse", &mut drain.sse_ms, 0..=DAY_MS);
    fields.set_duration("grpc_stream", &mut drain.grpc_stream_ms, 0..=DAY_MS);
    fields.set_duration("websocket", &mut drain.websocket_ms, 0..=DAY_MS);
    Some(drain)
}
