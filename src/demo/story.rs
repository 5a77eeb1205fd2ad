//! One move as the demo shows it, the receipt behind it, and the shop itself.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use peregrine_bench::origin::{Origin, OriginOptions};
use peregrine_engine::model::{Event, EventBody, Phase, Receipt, Rollout, RolloutId, RolloutState, Sample};
use peregrine_engine::{Ask, EngineHandle, MoveOverrides};

use super::screen::Screen;
use super::traffic::Traffic;
use super::{SHOP, failed_text, hosts, refused};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};

/// Between two drawings of the live lines.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// Width of the bar that shows a weight, in characters.
const BAR_CHARS: usize = 20;

/// Moves the shop and shows it, from the first phase to the receipt, which is the answer.
pub(super) async fn show_move(
    engine: &EngineHandle,
    traffic: &Traffic,
    screen: &Screen,
    (number, of): (u32, u32),
    to: &str,
) -> Result<peregrine_api::types::Receipt> {
    let from = if to == hosts::HOST_A { hosts::HOST_B } else { hosts::HOST_A };
    let ask = Ask::Move {
        service: SHOP.to_owned(),
        to: to.to_owned(),
        from: None,
        overrides: MoveOverrides::default(),
    };
    let failed_before = traffic.failed();
    let after = engine.last_event();
    let started = engine.start(ask, "demo".to_owned(), None, None).await.map_err(|error| refused(&error))?;
    let rollout = started.ok_or_else(|| failed_text("the move was not started"))?;
    screen.say(&format!("\nmove {number} of {of}   {SHOP}   {from} → {to}   {}", rollout.id));
    let mut view = View::new(from, to);
    follow(engine, &rollout.id, after, traffic, screen, &mut view).await?;
    screen.clear();
    let ended = engine.ended(&rollout.id).await.map_err(|error| refused(&error))?;
    if ended.state != RolloutState::Succeeded {
        return Err(went_wrong(&ended));
    }
    let receipt = engine.receipt(&rollout.id).await.map_err(|error| refused(&error))?;
    print_receipt(screen, &receipt, traffic.failed() - failed_before, view.longest_us);
    Ok(peregrine_api::types::Receipt::of(&rollout.id, SHOP, &receipt))
}

async fn follow(
    engine: &EngineHandle,
    id: &RolloutId,
    after: u64,
    traffic: &Traffic,
    screen: &Screen,
    view: &mut View<'_>,
) -> Result {
    let mut events =
        engine.events(after).filter(|event| std::future::ready(event.rollout.as_ref() == Some(id)));
    let mut draw = tokio::time::interval(DRAW_EVERY);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => if view.take(&event, screen) { return Ok(()) },
                None => return Err(failed_text("the stream of events has ended")),
            },
            _ = draw.tick() => {
                view.longest_us = view.longest_us.max(traffic.longest_us());
                screen.draw(&view.lines(traffic));
            }
        }
    }
}

/// What the live lines show.
struct View<'a> {
    from: &'a str,
    to: &'a str,
    begin: Instant,
    phase: Option<(Phase, Instant)>,
    done: Vec<String>,
    weight_percent: u8,
    sample: Option<Sample>,
    progress: String,
    longest_us: u64,
}

impl<'a> View<'a> {
    fn new(from: &'a str, to: &'a str) -> Self {
        Self {
            from,
            to,
            begin: Instant::now(),
            phase: None,
            done: Vec::new(),
            weight_percent: 0,
            sample: None,
            progress: String::new(),
            longest_us: 0,
        }
    }

    /// Takes an event in; true at the end of the move.
    fn take(&mut self, event: &Event, screen: &Screen) -> bool {
        match &event.body {
            EventBody::Phase { phase } => {
                self.close_phase(screen);
                self.phase = Some((*phase, Instant::now()));
                self.progress.clear();
            }
            EventBody::Weight { percent } => {
                self.weight_percent = *percent;
                self.plainly(screen, &format!("weight   {percent} % on {}", self.to));
            }
            EventBody::Progress { message, bytes_done, bytes_total } => {
                self.progress = progress(message, *bytes_done, *bytes_total);
            }
            EventBody::Guard { verdict, message } => {
                self.progress = format!("{verdict}: {message}");
                self.plainly(screen, &format!("verdict  {verdict}: {message}"));
            }
            EventBody::Sample(sample) => {
                self.plainly(screen, &self.sides(sample));
                self.sample = Some(sample.clone());
            }
            EventBody::TurnedBack { problem } => screen.say(&format!("  turns back: {}", problem.message)),
            EventBody::Done { .. } => {
                self.close_phase(screen);
                return true;
            }
            _ => {}
        }
        false
    }

    /// Without a terminal every change is a line of its own.
    fn plainly(&self, screen: &Screen, text: &str) {
        if !screen.is_live() {
            screen.say(&format!("  {:>6.2} s  {text}", self.begin.elapsed().as_secs_f64()));
        }
    }

    fn close_phase(&mut self, screen: &Screen) {
        if let Some((phase, begin)) = self.phase.take() {
            let took = begin.elapsed().as_secs_f64();
            self.plainly(screen, &format!("phase    {} took {took:.2} s   {}", name(phase), self.progress));
            self.done.push(format!("✔ {} {took:.1} s", name(phase)));
        }
    }

    fn sides(&self, sample: &Sample) -> String {
        let p95 = |us: Option<u64>| us.map_or_else(|| "–".to_owned(), |us| format!("{:.1} ms", ms(us)));
        format!(
            "{} {:.0} req/s p95 {}   {} {:.0} req/s p95 {}   failed {}   longest extra wait {:.1} ms",
            self.from,
            sample.from.requests_per_s,
            p95(sample.from.p95_us),
            self.to,
            sample.to.requests_per_s,
            p95(sample.to.p95_us),
            sample.totals.failed,
            ms(sample.totals.longest_extra_us()),
        )
    }

    /// As the receipt will have it: the slowest answer of the move so far, less the typical one.
    fn longest_extra_wait(&self) -> String {
        let told = |sample: &Sample| format!("{:.1} ms", ms(sample.totals.longest_extra_us()));
        self.sample.as_ref().map_or_else(|| "–".to_owned(), told)
    }

    fn lines(&self, traffic: &Traffic) -> Vec<String> {
        let phase = self.phase.map_or_else(String::new, |(phase, _)| name(phase).to_owned());
        let side = |host: &str, percent: u8, rate: f64, in_flight: u64, p95: Option<u64>| {
            let full = usize::from(percent) * BAR_CHARS / 100;
            let bar = format!("{}{}", "█".repeat(full), "░".repeat(BAR_CHARS - full));
            let p95 = p95.map_or_else(|| "     –".to_owned(), |us| format!("{:>6.1}", ms(us)));
            format!("{host}  {bar} {percent:>3} %  {rate:>6.0} req/s  p95 {p95} ms  in flight {in_flight}")
        };
        let empty = Default::default();
        let (from, to) = self.sample.as_ref().map_or((&empty, &empty), |sample| (&sample.from, &sample.to));
        vec![
            format!("{}  {phase} {}", self.done.join("  "), self.progress),
            side(
                self.from,
                100 - self.weight_percent.min(100),
                from.requests_per_s,
                from.in_flight,
                from.p95_us,
            ),
            side(self.to, self.weight_percent, to.requests_per_s, to.in_flight, to.p95_us),
            format!(
                "clients {:.0} req/s   requests {}   failed {}   longest extra wait {}   {:.1} s",
                traffic.per_second(),
                traffic.sent(),
                traffic.failed(),
                self.longest_extra_wait(),
                self.begin.elapsed().as_secs_f64()
            ),
        ]
    }
}

fn progress(message: &str, done: Option<u64>, total: Option<u64>) -> String {
    let mib = |bytes: u64| {
        #[expect(clippy::cast_precision_loss)]
        let bytes = bytes as f64;
        bytes / f64::from(1 << 20)
    };
    match (done, total) {
        (Some(done), Some(total)) => format!("{message} {:.1} of {:.1} MiB", mib(done), mib(total)),
        (Some(done), None) => format!("{message} {:.1} MiB", mib(done)),
        _ => message.to_owned(),
    }
}

fn print_receipt(screen: &Screen, receipt: &Receipt, client_failed: u64, longest_us: u64) {
    let phases: Vec<String> = receipt
        .phases
        .iter()
        .map(|phase| format!("{} {:.2} s", name(phase.phase), seconds(phase.duration_ms)))
        .collect();
    screen.say("  receipt");
    screen.say(&format!(
        "    took                 {:.2} s   ({})",
        seconds(receipt.duration_ms),
        phases.join(", ")
    ));
    screen.say(&format!(
        "    requests             {}   failed {}   retried {}",
        receipt.requests, receipt.failed, receipt.retried
    ));
    for instance in &receipt.instances {
        let side = if instance.new { "new" } else { "old" };
        let end = if instance.new {
            "serving"
        } else if instance.drained {
            "drained to the last one"
        } else {
            "not drained"
        };
        screen
            .say(&format!("    {side} copy on {:<9} {} requests, {end}", instance.machine, instance.started));
    }
    screen.say(&format!("    cut                  {}", receipt.hard_cut.len()));
    screen.say(&format!("    longest extra wait   {} ms", receipt.longest_extra_wait_ms));
    if receipt.transferred_bytes > 0 {
        screen.say(&format!(
            "    image                {}",
            progress("", Some(receipt.transferred_bytes), None).trim()
        ));
    }
    for note in &receipt.notes {
        screen.say(&format!("    note                 {note}"));
    }
    screen.say(&format!(
        "    the clients say      {client_failed} failed, longest wait {:.1} ms",
        ms(longest_us)
    ));
}

/// What to type next, for `--stay`. Every line works as it is typed, in this order.
pub(super) fn next_commands(screen: &Screen, api: SocketAddr, data: &Path, edge: SocketAddr, to: &str) {
    let program =
        std::env::current_exe().map_or_else(|_| "peregrine".to_owned(), |path| path.display().to_string());
    screen.say("\neverything stays up until Ctrl-C. In another terminal:");
    screen.say(&format!("  export PEREGRINE_API=http://{api} PEREGRINE_DATA={}", data.display()));
    screen.say(&format!("  curl http://{edge}/"));
    let to_there = format!("move {SHOP} --to {to}");
    for command in ["status", &to_there, "moves list", "scale shop 2", "logs shop -f", "events -f --after 0"]
    {
        screen.say(&format!("  {program} {command}"));
    }
}

/// Why a move of the demo did not succeed.
pub(super) fn went_wrong(rollout: &Rollout) -> Failure {
    let state = serde_json::to_value(rollout.state)
        .ok()
        .and_then(|v| v.as_str().map(str::to_owned))
        .unwrap_or_default();
    let failure = Failure::new(Exit::Failed, "demo.move", format!("{} ended as {state}", rollout.id));
    match &rollout.problem {
        Some(problem) => failure.why(problem.message.clone()).hint(problem.hint.clone()),
        None => failure,
    }
}

/// The sample shop: the recording origin, until SIGTERM.
pub(super) fn run_shop() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let run = async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let address = |name| std::env::var(name).ok();
        let host = address("HOST")
            .and_then(|host| host.parse().ok())
            .unwrap_or(std::net::Ipv4Addr::UNSPECIFIED.into());
        let port = address("PORT").and_then(|port| port.parse().ok()).unwrap_or(hosts::SHOP_PORT);
        let instance = address("PEREGRINE_INSTANCE");
        let origin = Origin::bind(OriginOptions {
            listen: SocketAddr::new(host, port),
            instance,
            ..OriginOptions::default()
        })
        .await?;
        println!("{SHOP} listens on {}", origin.addr()); // what `peregrine logs shop` shows
        terminate.recv().await;
        origin.shutdown().await;
        std::io::Result::Ok(())
    };
    match runtime.and_then(|runtime| runtime.block_on(run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", super::SHOP_COMMAND);
            ExitCode::FAILURE
        }
    }
}

const fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Plan => "plan",
        Phase::Provision => "provision",
        Phase::Prepare => "prepare",
        Phase::Copy => "copy",
        Phase::Start => "start",
        Phase::Warm => "warm",
        Phase::Shift => "shift",
        Phase::Drain => "drain",
        Phase::Soak => "soak",
        Phase::Release => "release",
    }
}

fn ms(us: u64) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let us = us as f64;
    us / 1_000.0
}

fn seconds(ms: u64) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let ms = ms as f64;
    ms / 1_000.0
}
