//! What comes from the server, as text for people. Pure: types in, text out.

use peregrine_api::types::{Finding, Move, MoveKind, MoveState, Place, Plan, Receipt, Step};

use super::human;
use super::output::Output;
use super::table::{Table, clean};

/// `shop: host-a → host-b`, `shop: version 1 → 2`, `shop: 1 → 3 copies`.
pub(crate) fn what(of: &Move) -> String {
    let change = match of.kind {
        MoveKind::Move => format!("{} → {}", machines(&of.from), machines(&of.to)),
        MoveKind::Deploy | MoveKind::Rollback if of.from_version != Some(of.to_version) => {
            versions(of.from_version, of.to_version)
        }
        MoveKind::Deploy | MoveKind::Rollback => format!("to {}", machines(&of.to)),
        MoveKind::Scale => format!("{} more, {} fewer", of.to.len(), of.from.len()),
    };
    format!("{} {}: {change}", kind(of.kind), clean(&of.service))
}

/// A kind of change in one word.
pub(crate) const fn kind(kind: MoveKind) -> &'static str {
    match kind {
        MoveKind::Deploy => "deploy",
        MoveKind::Move => "move",
        MoveKind::Rollback => "rollback",
        MoveKind::Scale => "scale",
    }
}

/// A state of a move as it is on the wire.
pub(crate) const fn state(state: MoveState) -> &'static str {
    match state {
        MoveState::Running => "running",
        MoveState::Paused => "paused",
        MoveState::RollingBack => "rolling_back",
        MoveState::Succeeded => "succeeded",
        MoveState::RolledBack => "rolled_back",
        MoveState::Aborted => "aborted",
        MoveState::Failed => "failed",
        MoveState::NeedsOperator => "needs_operator",
    }
}

/// A word of the wire (`rolling_back`) of any enumeration that is one.
pub(crate) fn word(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

fn versions(from: Option<u32>, to: u32) -> String {
    from.map_or_else(|| format!("version {to}"), |from| format!("version {from} → {to}"))
}

/// The machines of places, each once: `host-a, host-b`.
pub(crate) fn machines(places: &[Place]) -> String {
    let mut names: Vec<&str> = places.iter().map(|place| place.machine.as_deref().unwrap_or("?")).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { "nowhere".to_owned() } else { clean(&names.join(", ")) }
}

/// What a plan would do.
pub(crate) fn plan(planned: &Plan, out: &Output) -> String {
    let Plan { service, kind: of, from_version, to_version, add, retire, keep, settings, estimate, .. } =
        planned;
    let mut text = format!("{} {}\n", kind(*of), clean(service));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {:<9} {value}\n", out.dim(name)));
    line("version", versions(from_version.filter(|from| from != to_version), *to_version));
    for new in add {
        line("start", format!("{} on {} (version {})", new.id, clean(&new.machine), new.version));
    }
    for id in retire {
        line("retire", id.clone());
    }
    if !keep.is_empty() {
        line("keep", human::plural(keep.len() as u64, "copy", "copies"));
    }
    line("steps", planned.steps.iter().map(step).collect::<Vec<_>>().join(", "));
    if settings.soak_ms > 0 {
        line("soak", human::millis(settings.soak_ms));
    }
    let mut takes = format!(
        "about {} besides image and start, pause {}",
        human::millis(estimate.duration_ms),
        human::millis(estimate.pause_ms)
    );
    if let Some(bytes) = estimate.transfer_bytes {
        takes.push_str(&format!(", image {}", human::bytes(bytes)));
    }
    line("takes", takes);
    line("hash", planned.hash.clone());
    for warning in &planned.warnings {
        line("warning", finding(warning));
    }
    for blocker in &planned.blockers {
        line("blocked", finding(blocker));
    }
    text
}

fn step(step: &Step) -> String {
    match step {
        Step::Claim => "claim".into(),
        Step::Prepare { machine } => format!("prepare {}", clean(machine)),
        Step::Hold => "hold".into(),
        Step::Stop { .. } => "stop".into(),
        Step::Start { .. } => "start".into(),
        Step::Warm => "warm".into(),
        Step::Shift { percent } => format!("shift {percent} %"),
        Step::Drain => "drain".into(),
        Step::Soak => "soak".into(),
        Step::Switch => "switch".into(),
        Step::Release { .. } => "release".into(),
    }
}

/// A finding with its way out.
pub(crate) fn finding(finding: &Finding) -> String {
    let mut text = clean(&finding.message);
    if !finding.hint.is_empty() {
        text.push_str(&format!(" ({})", clean(&finding.hint)));
    }
    text
}

/// A receipt: what was lost (nothing, one hopes), then the rest.
pub(crate) fn receipt(receipt: &Receipt, out: &Output) -> String {
    let mut text = format!(
        "{} failed of {} requests, longest extra wait {}, {} in all\n",
        human::count(receipt.failed),
        human::count(receipt.requests),
        human::millis(receipt.longest_extra_wait_ms),
        human::millis(receipt.duration_ms),
    );
    let mut line = |name: &str, value: String| text.push_str(&format!("  {:<9} {value}\n", out.dim(name)));
    let phases: Vec<_> = receipt
        .phases
        .iter()
        .map(|part| format!("{} {}", part.phase.name(), human::millis(part.duration_ms)))
        .collect();
    line("phases", phases.join(", "));
    if receipt.pause_ms > 0 {
        line("pause", format!("{}, requests waited", human::millis(receipt.pause_ms)));
    }
    line("retried", format!("{}, held {}", human::count(receipt.retried), human::count(receipt.held)));
    line(
        "bytes",
        format!(
            "{} to copies, {} to clients, image {}",
            human::bytes(receipt.bytes_to_upstream),
            human::bytes(receipt.bytes_to_client),
            human::bytes(receipt.transferred_bytes),
        ),
    );
    if let Some(mirror) = &receipt.mirror {
        line("mirror", format!("{}: {}", clean(&mirror.verdict), clean(&mirror.message)));
    }
    for part in &receipt.instances {
        let side = if part.new { "new" } else { "old" };
        let drained = if part.drained { ", drained to the last request" } else { "" };
        let soft: u64 = class_counts(&part.soft_closed).iter().map(|(_, count)| count).sum();
        let closed =
            if soft > 0 { format!(", {} closed politely", human::count(soft)) } else { String::new() };
        let classes: Vec<_> = class_counts(&part.completed)
            .iter()
            .filter(|(name, count)| *count > 0 && *name != "request")
            .map(|(name, count)| format!(", {} {name}", human::count(*count)))
            .collect();
        line(
            side,
            format!(
                "{} on {}: {} requests{}{drained}{closed}",
                part.instance,
                clean(&part.machine),
                human::count(part.started),
                classes.concat(),
            ),
        );
    }
    if !receipt.hard_cut.is_empty() {
        line(
            "cut",
            format!(
                "{}: {}",
                human::plural(receipt.hard_cut.len() as u64, "request", "requests"),
                clean(&receipt.hard_cut.join(", "))
            ),
        );
    }
    for note in &receipt.notes {
        line("note", clean(note));
    }
    text
}

fn class_counts(counts: &peregrine_api::types::ClassCounts) -> [(&'static str, u64); 6] {
    [
        ("request", counts.request),
        ("uploads/downloads", counts.transfer),
        ("event streams", counts.sse),
        ("gRPC streams", counts.grpc_stream),
        ("WebSockets", counts.websocket),
        ("held", counts.held),
    ]
}

/// Moves, newest first.
pub(crate) fn moves(moves: &[Move], out: &Output) -> String {
    let mut table =
        Table::new(&["id", "what", "state", "phase", "weight", "failed", "started", "took"]).numeric(&[4, 5]);
    for of in moves {
        let took = of
            .ended_at
            .map_or_else(|| "-".to_owned(), |end| human::millis(human::millis_between(of.started_at, end)));
        let failed = of.totals.as_ref().map_or_else(|| "-".to_owned(), |totals| human::count(totals.failed));
        let phase = if of.state.is_terminal() { "-" } else { of.phase.name() };
        table.row(vec![
            of.id.clone(),
            what(of),
            state(of.state).to_owned(),
            phase.to_owned(),
            format!("{} %", of.weight_percent),
            failed,
            human::ago(of.started_at),
            took,
        ]);
    }
    table.render(out)
}

/// One move in full.
pub(crate) fn one_move(of: &Move, out: &Output) -> String {
    let mut text = format!("{}\n", what(of));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {:<9} {value}\n", out.dim(name)));
    line("id", of.id.clone());
    line(
        "state",
        format!(
            "{}, phase {}, step {} of {}, {} % on the new copies",
            state(of.state),
            of.phase.name(),
            of.step.index + 1,
            of.step.total,
            of.weight_percent
        ),
    );
    line("reason", clean(&of.reason));
    line("started", human::moment(of.started_at));
    if let Some(end) = of.ended_at {
        line(
            "ended",
            format!(
                "{} (after {})",
                human::moment(end),
                human::millis(human::millis_between(of.started_at, end))
            ),
        );
    }
    let phases: Vec<_> = of
        .phases
        .iter()
        .map(|part| {
            format!(
                "{} {}",
                part.phase.name(),
                part.duration_ms.map_or_else(|| "…".to_owned(), human::millis)
            )
        })
        .collect();
    line("phases", phases.join(", "));
    for (name, places) in [("old", &of.from), ("new", &of.to)] {
        for place in places {
            line(name, format!("{} on {}", place.instance, clean(place.machine.as_deref().unwrap_or("?"))));
        }
    }
    if let Some(totals) = &of.totals {
        line(
            "requests",
            format!("{}, failed {}", human::count(totals.requests), human::count(totals.failed)),
        );
    }
    if let Some(waiting) = &of.waiting_for {
        line("waits for", clean(waiting));
    }
    if let Some(problem) = &of.problem {
        line("problem", format!("{} [{}]", finding(problem), problem.code));
    }
    for left in &of.leftovers {
        line("left", clean(left));
    }
    let actions: Vec<_> = of.actions.iter().map(word).collect();
    if !actions.is_empty() {
        line("you may", format!("{} (peregrine moves … {})", actions.join(", "), of.id));
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::output::Surroundings;

    /// A move as the server tells it.
    pub(crate) fn a_move(state: &str) -> Move {
        serde_json::from_value(json!({
            "id": "mov_1", "service": "shop", "kind": "move", "state": state, "phase": "shift",
            "phases": [
                {"phase": "start", "started_at": "2026-01-31T12:00:00Z", "duration_ms": 1200},
                {"phase": "shift", "started_at": "2026-01-31T12:00:01.2Z", "duration_ms": null}
            ],
            "step": {"index": 4, "total": 9}, "weight_percent": 50, "from_version": 1, "to_version": 1,
            "from": [{"instance": "ins_1", "machine": "host-a"}], "to": [{"instance": "ins_2", "machine": "host-b"}],
            "control": "run", "reason": "", "started_at": "2026-01-31T12:00:00Z", "ended_at": null,
            "waiting_for": null, "guards": [], "totals": null, "sample": null, "transferred_bytes": 0,
            "estimate": {"duration_ms": 2000, "pause_ms": 0, "transfer_bytes": null}, "plan_hash": "ab",
            "problem": null, "leftovers": [], "_actions": ["pause", "abort"],
            "_links": {"self": "/api/v1/moves/mov_1", "events": "/api/v1/moves/mov_1/events", "receipt": null}
        }))
        .expect("a move")
    }

    /// A receipt as the server tells it.
    pub(crate) fn a_receipt() -> Receipt {
        let none =
            json!({"request": 0, "transfer": 0, "sse": 0, "grpc_stream": 0, "websocket": 0, "held": 0});
        let some =
            json!({"request": 31000, "transfer": 0, "sse": 0, "grpc_stream": 0, "websocket": 3, "held": 0});
        serde_json::from_value(json!({
            "move": "mov_1", "service": "shop", "time": "2026-01-31T12:00:03Z", "duration_ms": 2950,
            "phases": [{"phase": "start", "duration_ms": 1200}, {"phase": "shift", "duration_ms": 900}],
            "requests": 31204, "failed": 0, "retried": 2, "held": 0, "longest_extra_wait_ms": 38,
            "bytes_to_upstream": 1024, "bytes_to_client": 2048, "transferred_bytes": 190840832,
            "instances": [{"instance": "ins_1", "machine": "host-a", "new": false, "drained": true,
                           "started": 31003, "completed": some, "soft_closed": none}],
            "hard_cut": [], "notes": []
        }))
        .expect("a receipt")
    }

    fn plain() -> Output {
        Output::new(&[], Surroundings::default())
    }

    #[test]
    fn a_receipt_begins_with_what_was_lost() {
        let text = receipt(&a_receipt(), &plain());
        assert!(
            text.starts_with("0 failed of 31,204 requests, longest extra wait 38 ms, 2.95 s in all\n"),
            "{text}"
        );
        assert!(text.contains("phases    start 1.20 s, shift 900 ms"), "{text}");
        assert!(
            text.contains("ins_1 on host-a: 31,003 requests, 3 WebSockets, drained to the last request"),
            "{text}"
        );
        assert!(text.contains("image 182 MiB"), "{text}");
        assert!(!text.contains("cut"), "{text}");
    }

    #[test]
    fn a_receipt_lists_every_request_that_was_cut() {
        let mut of = a_receipt();
        of.hard_cut = vec!["r-1".into(), "r-2".into()];
        assert!(receipt(&of, &plain()).contains("cut       2 requests: r-1, r-2"));
    }

    #[test]
    fn a_list_of_moves_says_what_moved_where() {
        let text = moves(&[a_move("running")], &plain());
        let row: Vec<_> = text.lines().nth(1).expect("a row").split('\t').collect();
        assert_eq!(row[..6], ["mov_1", "move shop: host-a → host-b", "running", "shift", "50 %", "-"]);
    }

    #[test]
    fn a_move_says_what_may_be_asked_of_it() {
        let text = one_move(&a_move("running"), &plain());
        assert!(text.contains("step 5 of 9, 50 % on the new copies"), "{text}");
        assert!(text.contains("pause, abort (peregrine moves … mov_1)"), "{text}");
    }
}
