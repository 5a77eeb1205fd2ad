//! The faults of a seed, one after the other, each for a while.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::life::End;
use crate::link::LEASE_MS;
use crate::report::Faults;
use crate::scenario::Sim;
use crate::world::{Trouble, World};

/// An hour.
const HOUR_MS: i64 = 3_600_000;
/// An engine that is to die at a commit dies at one of the next so many.
const MAX_COMMITS_AHEAD: u64 = 40;

/// Makes trouble until it is stopped.
pub(crate) async fn trouble(sim: Arc<Sim>) {
    let world = sim.world().clone();
    loop {
        world.sleep(20, 1_200).await;
        revive(&sim).await;
        match world.below(12) {
            0..=2 => engine_dies_at_a_commit(&sim),
            3 => {
                world.fault(Faults::EngineKilled);
                sim.kill_engine();
            }
            4..=6 => runtime_in_trouble(&sim),
            7 => {
                world.fault(Faults::ClockJump);
                let by_ms = world.between(0, 2 * HOUR_MS.unsigned_abs());
                world.jump(i64::try_from(by_ms).unwrap_or(0) - HOUR_MS);
            }
            8 => store_is_full(&sim),
            9 => bad_version(&sim),
            10 if sim.is_apart() => link_is_cut(&sim),
            _ if sim.ground.strict => {}
            _ => something_dies(&sim),
        }
    }
}

/// An engine that has died, by now or at a commit, is started again after a while.
async fn revive(sim: &Arc<Sim>) {
    match sim.with_engine(|process| process.life.is_over()) {
        Some(false) => return,
        Some(true) => {
            sim.world().fault(Faults::EngineKilledAtCommit);
            sim.kill_engine();
        }
        None => {}
    }
    if sim.world().one_in(2) {
        sim.world().sleep(1, 1_500).await;
    }
    sim.open_engine().await;
}

fn engine_dies_at_a_commit(sim: &Sim) {
    let world = sim.world();
    let commit = usize::try_from(world.below(MAX_COMMITS_AHEAD)).unwrap_or(0);
    let after = world.one_in(2);
    world.note(format_args!("the engine dies at commit {commit} from now, after it: {after}"));
    sim.with_engine(|process| process.life.end_at(End { commit, after }));
}

fn machine(sim: &Sim) -> usize {
    usize::try_from(sim.world().below(sim.machines as u64)).unwrap_or(0)
}

fn later(sim: &Arc<Sim>, from_ms: u64, to_ms: u64, what: impl FnOnce(&Sim) + Send + 'static) {
    let sim = Arc::clone(sim);
    let time = sim.world().between(from_ms, to_ms);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(time)).await;
        what(&sim);
    });
}

fn runtime_in_trouble(sim: &Arc<Sim>) {
    let world = sim.world();
    let machine = machine(sim);
    let (trouble, fault) = match world.below(5) {
        0 => (Trouble::Unreachable, Faults::RuntimeUnreachable),
        1 => (Trouble::Ambiguous, Faults::RuntimeAmbiguous),
        2 => (Trouble::Hangs, Faults::RuntimeHangs),
        3 => (Trouble::Slow, Faults::RuntimeSlow),
        _ => (Trouble::Fails, Faults::RuntimeFails),
    };
    world.fault(fault);
    world.note(format_args!("host-{machine}: {trouble:?}"));
    world.lock().troubles[machine] = trouble;
    later(sim, 50, 4_000, move |sim| sim.world().lock().troubles[machine] = Trouble::None);
}

fn store_is_full(sim: &Arc<Sim>) {
    sim.world().fault(Faults::StoreFull);
    sim.world().note(format_args!("the store is full"));
    sim.ground.full.store(true, Ordering::SeqCst);
    later(sim, 20, 2_000, |sim| sim.ground.full.store(false, Ordering::SeqCst));
}

fn bad_version(sim: &Arc<Sim>) {
    let world = sim.world();
    world.fault(Faults::BadVersion);
    let exits = world.one_in(2);
    world.note(format_args!("new versions are bad; they exit: {exits}"));
    world.lock().bad_version = Some(exits);
    later(sim, 200, 3_000, |sim| sim.world().lock().bad_version = None);
}

fn link_is_cut(sim: &Arc<Sim>) {
    let world = sim.world();
    let edge = usize::try_from(world.below(sim.ground.wires.len() as u64)).unwrap_or(0);
    let (wires, now_ms) = (&sim.ground.wires[edge], world.elapsed_ms());
    // Where nobody may notice anything, one cut does not follow on another: together they would be a long one.
    if sim.ground.strict && now_ms < wires.cut_ms.load(Ordering::SeqCst) + 2 * LEASE_MS {
        return;
    }
    wires.cut_ms.store(now_ms, Ordering::SeqCst);
    world.fault(Faults::LinkCut);
    world.note(format_args!("edge {edge} is cut off from the engine"));
    sim.ground.wires[edge].cut.store(true, Ordering::SeqCst);
    // Where nobody may notice anything, not for longer than the engine waits for it.
    let longest_ms = if sim.ground.strict { LEASE_MS / 2 } else { 2 * LEASE_MS };
    later(sim, 50, longest_ms, move |sim| sim.ground.wires[edge].cut.store(false, Ordering::SeqCst));
}

fn something_dies(sim: &Arc<Sim>) {
    let world = sim.world();
    match world.below(6) {
        0..=2 => {
            let running = world.running();
            if running.is_empty() {
                return;
            }
            let id = &running[usize::try_from(world.below(running.len() as u64)).unwrap_or(0)];
            world.fault(Faults::CopyKilled);
            world.note(format_args!("{id} dies"));
            world.kill(id);
        }
        3 => reboot(world, machine(sim)),
        4 if sim.is_apart() => {
            let edge = usize::try_from(world.below(sim.ground.wires.len() as u64)).unwrap_or(0);
            if sim.edge_is_up(edge) {
                world.fault(Faults::EdgeKilled);
                world.note(format_args!("edge {edge} dies"));
                sim.kill_edge(edge);
                later(sim, 1, 3_000, move |sim| {
                    if !sim.edge_is_up(edge) {
                        sim.open_edge(edge);
                    }
                });
            }
        }
        _ => {
            let machine = machine(sim);
            world.fault(Faults::EdgeCutOff);
            world.note(format_args!("host-{machine} is cut off from the edges"));
            world.lock().cut_off.insert(machine);
            later(sim, 50, 2_000, move |sim| {
                sim.world().lock().cut_off.remove(&machine);
            });
        }
    }
}

fn reboot(world: &World, machine: usize) {
    world.fault(Faults::MachineRebooted);
    world.note(format_args!("host-{machine} reboots"));
    let there: Vec<_> =
        world.lock().copies.iter().filter(|(_, c)| c.machine == machine).map(|(id, _)| id.clone()).collect();
    for id in there {
        world.kill(&id);
    }
}
