//! A disk that fails under the built server, at its N-th durable system call: what was acknowledged is there afterwards,
//! what failed is told, and the edge serves all along.

use crate::support::apart::{Apart, wait_for_state};
use crate::support::bad_disk::{BadDisk, Deed, EIO, ENOSPC, Scope};
use crate::support::server::{Peregrine, http_get};
use crate::support::traffic::{Traffic, assert_nothing_lost};
use crate::support::wait_for;

/// Changes that are tried while a disk fails.
const MAX_CHANGES: usize = 12;
/// No commit of one machine has more durable calls.
const MAX_CALLS: u32 = 60;

/// An engine on a disk that does as it is told, its edge, and what was acknowledged.
struct Bad {
    apart: Apart,
    disk: BadDisk,
    names: usize,
    acknowledged: Vec<String>,
    /// What was not acknowledged and was found to be there all the same.
    found: usize,
}

impl Bad {
    fn open() -> Self {
        let mut apart = Apart::open("");
        apart.shop.server.stop();
        let disk = BadDisk::under(&mut apart.shop.server);
        apart.shop.server.start_again();
        wait_for_state(&apart.shop.server, "edge-1", "connected");
        disk.wait_until_it_counts_commits();
        Self { apart, disk, names: 0, acknowledged: Vec::new(), found: 0 }
    }

    /// Adds a machine; the code of the error, if there was one.
    fn add(&mut self) -> Option<String> {
        self.names += 1;
        let name = format!("spare-{}", self.names);
        let said =
            self.apart.shop.server.run(&["machines", "add", &name, "--process", "--address", "127.0.0.3"]);
        if said.code == 0 {
            self.acknowledged.push(name);
            return None;
        }
        Some(said.error()["code"].as_str().unwrap_or_else(|| panic!("a code in {said:?}")).to_owned())
    }

    const fn server(&mut self) -> &mut Peregrine {
        &mut self.apart.shop.server
    }

    /// Everything that was acknowledged is there; how much has come besides since the last look.
    fn assert_kept(&mut self, told: &str) -> usize {
        let listed = self.apart.shop.server.ok(&["machines", "list"]);
        let listed = listed.get("items").unwrap_or(&listed).as_array().expect("a list").clone();
        let names: Vec<&str> = listed.iter().filter_map(|machine| machine["name"].as_str()).collect();
        for name in &self.acknowledged {
            assert!(names.contains(&name.as_str()), "{told}: {name} was acknowledged; there are {names:?}");
        }
        assert_eq!(self.apart.shop.server.ok(&["audit", "verify"])["verified"], true, "{told}");
        let all = names.iter().filter(|name| name.starts_with("spare-")).count();
        let more = all - self.acknowledged.len() - self.found;
        self.found += more;
        more
    }
}

fn is_ready(server: &Peregrine) -> bool {
    http_get(server.api(), "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

#[test]
fn whichever_write_or_flush_fails_it_is_told_and_nothing_acknowledged_is_lost_while_the_edge_serves() {
    let mut bad = Bad::open();
    let traffic = Traffic::start(bad.apart.edge.http(), 100);
    let mut faults = 0;
    for (scope, errno, times) in [
        // A device that fails once: what the kernel says of a flush after a bad one is worth nothing.
        (Scope::Flushes, EIO, 1),
        (Scope::Calls, EIO, 1),
        (Scope::Calls, EIO, u32::MAX),
        (Scope::Calls, ENOSPC, 2),
        (Scope::Calls, ENOSPC, u32::MAX),
    ] {
        for at in 1..=5 {
            let told = format!("{scope:?} {at} with errno {errno}, {times} times");
            bad.disk.arm(scope, Deed::Fail { errno, times }, at);
            let refused = (0..MAX_CHANGES).find_map(|_| bad.add());
            wait_for(&format!("{told}: the fault"), || (bad.disk.done() > 0).then_some(()));
            faults += 1;
            let code = if errno == ENOSPC { "store.full" } else { "store.io" };
            // A little room was missing for a moment: what is in the log may be brought home, and then there is room.
            let may_pass = errno == ENOSPC && times < u32::MAX;
            assert!(
                refused.as_deref() == Some(code) || (may_pass && refused.is_none()),
                "{told}: {refused:?}"
            );
            if refused.is_some() && !may_pass {
                assert!(!is_ready(bad.server()), "{told}: it does as if nothing were");
                assert!(bad.server().log_text().contains("nothing new can be stored"), "{told}");
            }
            bad.disk.disarm();
            if errno == EIO {
                // It trusts that disk no more before a person has looked at it and has started it again.
                assert_eq!(bad.add().as_deref(), Some("store.io"), "{told}");
                bad.server().kill();
                bad.server().start_again();
            }
            wait_for(&format!("{told}: it is ready again"), || is_ready(bad.server()).then_some(()));
            let more = bad.assert_kept(&told);
            assert!(errno == EIO || more == 0, "{told}: {more} were refused and are there");
            assert_eq!(bad.add(), None, "{told}: it goes on");
        }
    }
    println!("| the disk fails (EIO, ENOSPC) at the N-th write or flush | {faults} | {faults} | 0 |");
    assert_nothing_lost(&traffic.stop(), &bad.apart.shop.records());
}

#[test]
fn wherever_a_commit_is_torn_or_the_server_killed_in_it_the_store_is_whole_and_nothing_acknowledged_is_lost()
{
    let mut bad = Bad::open();
    let mut faults = 0;
    for deed in [Deed::DieBefore, Deed::Tear, Deed::DieAfter] {
        for at in 1..MAX_CALLS {
            let told = format!("{deed:?} at call {at}");
            bad.disk.arm(Scope::Calls, deed, at);
            let refused = bad.add();
            let died = bad.disk.done() > 0;
            bad.disk.disarm();
            if !died {
                assert_eq!(refused, None, "{told}");
                assert!(at > 3, "a commit has more calls than {at}");
                break;
            }
            faults += 1;
            assert!(refused.is_some(), "{told}: who is dead acknowledges nothing");
            assert_eq!(bad.server().wait(), None, "{told}: killed, and not ended");
            bad.server().start_again();
            let more = bad.assert_kept(&told);
            bad.server().ok(&["services", "show", "shop"]);
            // The one that was under way is there as a whole, or not at all.
            assert!(more <= 1, "{told}");
        }
    }
    println!("| a commit torn, or its server killed, at the N-th durable call | {faults} | {faults} | 0 |");
}
