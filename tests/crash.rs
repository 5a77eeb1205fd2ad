//! kill -9 of the built engine before and after every commit of a rollout and of its ways back, edge and engine apart
//! and under load: it ends as if nothing had been, one copy serves, nothing is orphaned, and no client notices.
//!
//! The engine has no hook for this: the kill comes from under it, between two system calls (`support/bad_disk.c`).

use std::collections::BTreeSet;
use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::support::apart::{Apart, wait_for_state};
use crate::support::bad_disk::{BadDisk, Deed, Scope};
use crate::support::shop::{Shop, id_of};
use crate::support::traffic::{Traffic, assert_nothing_lost};
use crate::support::wait_for;

/// A rollout is all machinery and hardly any waiting.
const QUICK: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "20ms"
step_max = "40ms"
warm = { probes = 1, interval = "20ms" }
abort_on = { p95_increase = false }
"#;
/// As above, of a service of which one copy may run.
const QUICK_SINGLE_WRITER: &str = r#"
[service.shop.move]
single_writer = true
stop_grace = "2s"
warm = { probes = 1, interval = "20ms" }
"#;
/// Installations side by side: a pass waits more than it works.
const INSTALLATIONS: u32 = 5;
/// No rollout has more commits.
const MAX_COMMITS: u32 = 200;

/// What the engine is killed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Story {
    /// A move, from the ask to the end.
    Move,
    /// The way back of a move that stands in its soak and is aborted.
    Abort,
    /// The way back of a move that stands in its soak and whose new copy gets unwell.
    Unwell,
    /// A move of a service of which one copy may run, from the ask to the end.
    SingleWriter,
}

impl Story {
    /// The whole of a move is under way while the engine is killed.
    const fn is_whole_move(self) -> bool {
        matches!(self, Self::Move | Self::SingleWriter)
    }

    /// How the shop is moved.
    const fn settings(self) -> &'static str {
        if matches!(self, Self::SingleWriter) { QUICK_SINGLE_WRITER } else { QUICK }
    }

    /// How it has to end, wherever the engine was killed.
    const fn end(self) -> &'static str {
        match self {
            Self::Move | Self::SingleWriter => "succeeded",
            Self::Abort => "aborted",
            Self::Unwell => "rolled_back",
        }
    }
}

/// An engine on a disk that kills it, an edge apart, the shop, and its clients.
struct Installation {
    apart: Apart,
    disk: BadDisk,
    traffic: Traffic,
    at: &'static str,
}

impl Installation {
    fn open(story: Story) -> Self {
        let mut apart = Apart::open(story.settings());
        apart.shop.server.kill();
        let disk = BadDisk::under(&mut apart.shop.server);
        apart.shop.server.start_again();
        wait_for_state(&apart.shop.server, "edge-1", "connected");
        disk.wait_until_it_counts_commits();
        let traffic = Traffic::start(apart.edge.http(), 60);
        Self { apart, disk, traffic, at: "host-a" }
    }

    /// One rollout with a kill at its N-th commit; whether it had so many.
    fn pass(&mut self, story: Story, deed: Deed, commit: u32) -> bool {
        let told = format!("{story:?}, {deed:?} {commit}");
        let to = if self.at == "host-a" { "host-b" } else { "host-a" };
        let before = self.moves();
        let (id, mut asking) = self.begin(story, deed, commit, to);
        let died = wait_for(&format!("{told}: the kill or the end"), || {
            if self.apart.shop.server.has_ended() {
                return Some(true);
            }
            let now = self.try_moves()?;
            let rollout = now.iter().find(|rollout| !before.iter().any(|old| old["id"] == rollout["id"]))?;
            let is_over = !matches!(rollout["state"].as_str(), Some("running" | "paused" | "rolling_back"));
            is_over.then_some(false)
        });
        self.disk.disarm();
        assert_eq!(self.disk.done(), u32::from(died), "{told}: only the disk kills");
        if let Some(asking) = &mut asking {
            // Its answer has died with the engine, for which it would wait.
            drop(asking.kill());
            drop(asking.wait());
        }
        if died {
            assert_eq!(self.apart.shop.server.wait(), None, "{told}: killed, and not ended");
            self.apart.shop.server.start_again();
        }
        // An ask that was not durable was not heard: then nothing has begun.
        let mine = |rollout: &Value| !before.iter().any(|old| old["id"] == rollout["id"]);
        let id = id.or_else(|| self.moves().into_iter().find(mine).map(|rollout| id_of(&rollout)));
        if let Some(id) = &id {
            let state = self.apart.shop.the_move(id)["state"].clone();
            if story == Story::Abort && state != "aborted" {
                drop(self.apart.shop.server.run(&["moves", "abort", id])); // it may be on its way back already
            }
            let ended = self.apart.shop.ended(id);
            assert_eq!(ended["state"], story.end(), "{told}: {ended:#}");
            if story.is_whole_move() {
                self.at = to;
            }
        }
        self.assert_tidy(&told);
        died
    }

    /// Brings the story to where the commits begin that count; the rollout, if it is known, and who asks.
    fn begin(
        &self,
        story: Story,
        deed: Deed,
        commit: u32,
        to: &'static str,
    ) -> (Option<String>, Option<Child>) {
        let shop = &self.apart.shop;
        if story.is_whole_move() {
            self.disk.arm(Scope::Commits, deed, commit);
            return (None, Some(shop.server.spawn(&["move", "shop", "--to", to, "--detach"])));
        }
        let id = id_of(&shop.server.ok(&["move", "shop", "--to", to, "--soak", "1h", "--detach"]));
        wait_for("the soak", || {
            let now = shop.the_move(&id);
            (now["phase"] == "soak" && now["state"] == "running").then_some(())
        });
        // While it is still there to be asked.
        let copy = shop.address_of(&shop.instance_of(&id, "to"));
        self.disk.arm(Scope::Commits, deed, commit);
        let asking = if story == Story::Abort {
            Some(shop.server.spawn(&["moves", "abort", &id]))
        } else {
            Shop::fault_at(copy, r#"{"healthy": false}"#);
            None
        };
        (Some(id), asking)
    }

    /// One copy, where it has to be, as a process too; nothing else runs and nothing is left over.
    fn assert_tidy(&self, told: &str) {
        let shop = &self.apart.shop;
        let copies = shop.instances();
        assert_eq!(copies.len(), 1, "{told}: {copies:#?}");
        assert_eq!(
            (&copies[0]["machine"], &copies[0]["state"]),
            (&self.at.into(), &"serving".into()),
            "{told}"
        );
        let processes = wait_for(&format!("{told}: one process and no other"), || {
            Some(shop.server.pids_of("")).filter(|pids| pids.len() == 1)
        });
        let own = shop.server.pids_of(copies[0]["id"].as_str().expect("id"));
        assert_eq!(processes, own, "{told}: the process is that of the copy");
        for rollout in self.moves() {
            let left = rollout["leftovers"].as_array().map_or(0, Vec::len);
            assert_eq!(left, 0, "{told}: {rollout:#}");
        }
        wait_for_state(&shop.server, "edge-1", "connected");
        assert_eq!(self.traffic.failed(), 0, "{told}: a client has noticed");
    }

    fn moves(&self) -> Vec<Value> {
        self.try_moves().expect("the engine answers")
    }

    /// `None` while nobody answers.
    fn try_moves(&self) -> Option<Vec<Value>> {
        let said = self.apart.shop.server.run(&["moves", "list"]);
        said.json.get("data")?["items"].as_array().cloned()
    }

    /// Nothing was lost in all of it, and the audit is whole.
    fn close(self, story: Story) {
        assert_nothing_lost(&self.traffic.stop(), &self.apart.shop.records());
        assert_eq!(self.apart.shop.server.ok(&["audit", "verify"])["verified"], true);
        if story == Story::SingleWriter {
            self.apart.shop.assert_one_copy_at_a_time();
        }
    }
}

/// Kills the engine before and after every commit of a story; how many it has.
fn killed_at_every_commit(story: Story) -> u32 {
    let (next, died_at) = (AtomicU32::new(1), Mutex::new(BTreeSet::new()));
    let one_installation = || {
        let mut installation = Installation::open(story);
        loop {
            let commit = next.fetch_add(1, Ordering::SeqCst);
            assert!(commit < MAX_COMMITS, "{story:?} ends");
            let died = [Deed::DieBefore, Deed::DieAfter].map(|deed| installation.pass(story, deed, commit));
            if died == [false, false] {
                break;
            }
            died_at.lock().expect("no panic").insert((commit, died));
        }
        installation.close(story);
    };
    std::thread::scope(|scope| {
        for _ in 0..INSTALLATIONS {
            scope.spawn(one_installation);
        }
    });
    let died_at = died_at.into_inner().expect("no panic");
    let commits = u32::try_from(died_at.len()).expect("a few");
    assert!(died_at.iter().map(|(commit, _)| *commit).eq(1..=commits), "none is skipped: {died_at:?}");
    let kills: usize = died_at.iter().map(|(_, died)| died.iter().filter(|died| **died).count()).sum();
    println!(
        "| {story:?}: engine killed before and after each of {commits} commits | {kills} | {kills} | 0 |"
    );
    commits
}

#[test]
fn a_move_ends_well_wherever_the_built_engine_is_killed_and_no_client_notices() {
    let commits = killed_at_every_commit(Story::Move);
    assert!(commits >= 16, "a move has more commits than {commits}");
}

#[test]
fn an_aborted_move_goes_back_wherever_the_built_engine_is_killed_and_no_client_notices() {
    let commits = killed_at_every_commit(Story::Abort);
    assert!(commits >= 6, "a way back has more commits than {commits}");
}

#[test]
fn a_move_whose_new_copy_is_bad_goes_back_wherever_the_built_engine_is_killed_and_no_client_notices() {
    let commits = killed_at_every_commit(Story::Unwell);
    assert!(commits >= 6, "a way back has more commits than {commits}");
}

#[test]
fn a_move_of_a_single_writer_ends_well_wherever_the_built_engine_is_killed_and_never_two_are_asked() {
    let commits = killed_at_every_commit(Story::SingleWriter);
    assert!(commits >= 14, "a move of a single writer has more commits than {commits}");
}
