//! Edges in other processes, as rollouts see them: hand-made ones, which say what they are told to.

use std::sync::{Arc, Mutex};

use peregrine_engine::model::{Phase, Receipt};
use peregrine_routing::{EdgeId, Generation, PerClass, Publication, RemoteEdge, Tally, TrafficClass};
use tokio::task::JoinHandle;

use crate::support::{Bench, move_to, slow_move_to, until};

/// An edge that uses every table at once.
struct Elsewhere {
    edge: Arc<RemoteEdge>,
    /// What it says that it is still inside of.
    open: Arc<Mutex<Vec<Generation>>>,
    follows: JoinHandle<()>,
}

impl Elsewhere {
    fn join(bench: &Bench, id: u64, open: &[u64]) -> Self {
        let name: Arc<str> = format!("edge-{id}").into();
        let edge = Arc::new(bench.edge.reader().join(EdgeId(id), &name, 1));
        let open = Arc::new(Mutex::new(open.iter().copied().map(Generation).collect::<Vec<_>>()));
        let (own, inside) = (Arc::clone(&edge), Arc::clone(&open));
        let follows = tokio::spawn(async move {
            let turn = own.start_over();
            loop {
                let version = match own.next(turn).await {
                    Publication::Changes(version, _) => version,
                    Publication::Whole(table) => table.version(),
                };
                let open = inside.lock().expect("a lock").clone();
                own.acknowledge(version, &open);
            }
        });
        Self { edge, open, follows }
    }

    /// A request of it is inside.
    fn enter(&self, generation: u64) {
        let mut in_flight = PerClass::default();
        in_flight[TrafficClass::Request] = 1;
        let tally = Tally { started: 1, in_flight, ..Tally::default() };
        self.edge.report(Generation(generation), tally, false);
        self.open.lock().expect("a lock").push(Generation(generation));
    }

    /// As the end of its lease.
    async fn give_up(self) {
        self.follows.abort();
        drop(self.follows.await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_comes_back_in_the_soak_is_waited_for_before_its_old_copy_goes() {
    let bench = Bench::with_shop().await;
    let old = bench.serving()[0].clone();
    let edge = Elsewhere::join(&bench, 7, &[]);
    edge.enter(old.generation);
    let started = bench.start(slow_move_to("host-b", 600_000)).await;
    until("the drain to wait for it", || (!edge.edge.draining().is_empty()).then_some(())).await;
    edge.give_up().await;
    let soaks = |rollout: &peregrine_engine::model::Rollout| {
        rollout.phase == Phase::Soak && rollout.waiting_for.as_ref().is_some_and(|what| what.contains("soak"))
    };
    bench.until(&started, "the soak", soaks).await;
    let back = Elsewhere::join(&bench, 7, &[old.generation]);
    bench.engine.promote(&started.id).await.expect("it goes on");
    let waits = |rollout: &peregrine_engine::model::Rollout| {
        rollout.waiting_for.as_ref().is_some_and(|what| what.contains("requests to finish"))
    };
    bench.until(&started, "what is inside to be waited for", waits).await;
    assert!(bench.world.runs(&old.machine, &old.id));
    back.edge.let_go(Generation(old.generation));
    let receipt = bench.end_of(&started).await.receipt.expect("a receipt");
    assert!(!bench.world.runs(&old.machine, &old.id));
    assert!(tells_of(&receipt, "edge-7").is_empty(), "it is back: {:?}", receipt.notes);
}

fn tells_of(receipt: &Receipt, edge: &str) -> Vec<String> {
    receipt.notes.iter().filter(|note| note.contains(edge)).cloned().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_was_lost_before_a_move_is_not_in_its_receipt_and_one_that_is_lost_in_it_is() {
    let bench = Bench::with_shop().await;
    let copy = bench.serving()[0].clone();
    let before = Elsewhere::join(&bench, 7, &[]);
    before.enter(copy.generation);
    before.give_up().await;
    let receipt = bench.done(move_to("host-b")).await.receipt.expect("a receipt");
    assert!(tells_of(&receipt, "edge-7").is_empty(), "{:?}", receipt.notes);

    let copy = bench.serving()[0].clone();
    let in_it = Elsewhere::join(&bench, 8, &[]);
    in_it.enter(copy.generation);
    let started = bench.start(slow_move_to("host-a", 600_000)).await;
    until("the drain to wait for it", || (!in_it.edge.draining().is_empty()).then_some(())).await;
    in_it.give_up().await;
    bench.until(&started, "the soak", |rollout| rollout.phase == Phase::Soak).await;
    bench.engine.promote(&started.id).await.expect("it goes on");
    let receipt = bench.end_of(&started).await.receipt.expect("a receipt");
    let told = tells_of(&receipt, "edge-8");
    assert!(told.len() == 1 && told[0].contains(" 1 requests were under way"), "{:?}", receipt.notes);
    assert!(tells_of(&receipt, "edge-7").is_empty(), "{:?}", receipt.notes);
}
