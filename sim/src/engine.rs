//! The engine's process: opened on the store that outlives it, killed, opened again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use peregrine_engine::model::Rollout;
use peregrine_engine::{Connect, Connection, Dial, Dialled, Engine, EngineConfig, EngineHandle, Outside};
use peregrine_routing::table;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::book::Book;
use crate::edge::{Core, keep_holds};
use crate::life::{Life, MortalStore};
use crate::link::{self, Wires};
use crate::memory::MemoryStore;
use crate::runtime::SimRuntime;
use crate::store::SimStore;
use crate::world::World;

/// Between two comparisons of what is wanted with what runs.
const RECONCILE_INTERVAL_MS: u64 = 500;
/// Longer than any answer of a machine that is still under way.
const ORPHAN_GRACE_MS: u64 = 2 * crate::runtime::MAX_LATE_MS;
/// A probe that is answered at all is answered within this.
const MAX_PROBE_MS: u64 = 8;

/// One life of the engine.
pub(crate) struct Process {
    pub(crate) handle: EngineHandle,
    pub(crate) life: Arc<Life>,
    /// Cores in the same process; none if the edges are apart.
    pub(crate) cores: Vec<Core>,
    book: Option<Book>,
    tasks: Vec<AbortHandle>,
    stop: Option<oneshot::Sender<()>>,
}

/// What outlives it.
#[derive(Clone)]
pub(crate) struct Ground {
    pub(crate) world: World,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) full: Arc<AtomicBool>,
    /// Cores of the engine's own process; 0 if the edges are apart.
    pub(crate) cores: usize,
    /// Wires to edges elsewhere.
    pub(crate) wires: Vec<Arc<Wires>>,
    /// Clients for each core.
    pub(crate) clients: usize,
    pub(crate) strict: bool,
    pub(crate) clients_on: Arc<AtomicBool>,
}

impl Process {
    pub(crate) async fn open(ground: &Ground) -> Result<Self, String> {
        let world = ground.world.clone();
        let term = {
            let mut inner = world.lock();
            inner.term += 1;
            inner.term
        };
        let life = Life::new();
        let (writer, reader) = table();
        let book = Book::new(&world);
        let mut tasks = Vec::new();
        let mut cores = Vec::new();
        for _ in 0..ground.cores {
            let number = world.new_core();
            let core = Core {
                world: world.clone(),
                number,
                reader: reader.clone(),
                book: book.clone(),
                strict: ground.strict,
            };
            tasks.push(tokio::spawn(core.clone().follow(reader.register())).abort_handle());
            cores.push(core);
        }
        if !cores.is_empty() {
            tasks.push(tokio::spawn(keep_holds(world.clone(), reader.clone())).abort_handle());
        }
        for wires in &ground.wires {
            tasks.push(link::serve(&world, wires, &reader, &life));
        }
        let own_book = (ground.cores > 0).then(|| book.clone());
        let store = Arc::new(SimStore {
            world: world.clone(),
            inner: Arc::clone(&ground.store),
            ended: ended(&world, own_book.clone(), &life),
            full: Arc::clone(&ground.full),
        });
        let mortal = Arc::new(MortalStore::new(store, Arc::clone(&life)));
        let opened = Engine::open(config(&world), mortal, connect(&world, &life), writer).await;
        let (engine, handle) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // The process ends: its end of the wires must not offer a table that nobody has filled.
                life.end();
                tasks.iter().for_each(AbortHandle::abort);
                return Err(error.to_string());
            }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(engine.run(async {
            drop(stopped.await); // told, or let go of: both end it
        }));
        if ground.cores == 0 {
            let named = crate::edge::named(&reader.load());
            let first = named.first().copied().unwrap_or(handle.state().last_generation + 1);
            world.lock().first_generation = first;
        }
        let process = Self { handle, life, cores, book: own_book, tasks, stop: Some(stop) };
        world.note(format_args!("the engine begins its life {term}"));
        Ok(process)
    }

    pub(crate) fn start_clients(&mut self, ground: &Ground) {
        for core in &self.cores {
            for _ in 0..ground.clients {
                self.tasks.push(tokio::spawn(core.clone().client()).abort_handle());
            }
        }
    }

    /// kill -9: nothing of this life does anything any more.
    pub(crate) fn kill(&mut self, world: &World) {
        self.life.end();
        self.check();
        for task in self.tasks.drain(..) {
            task.abort();
        }
        for core in &self.cores {
            world.drop_idle(core.number, |_| true);
        }
        drop(self.stop.take());
        world.note(format_args!("the engine is dead"));
    }

    pub(crate) fn check(&self) {
        if let Some(book) = &self.book {
            book.check();
        }
    }
}

fn config(world: &World) -> EngineConfig {
    let (clock, wall, ids, dial) = (world.clone(), world.clone(), world.clone(), world.clone());
    EngineConfig {
        install: Some("pg_simulated".to_owned()),
        edge_clock: Arc::new(move || clock.edge_now_ms()),
        reconcile_interval_ms: RECONCILE_INTERVAL_MS,
        orphan_grace_ms: ORPHAN_GRACE_MS,
        outside: Outside {
            wall_clock: Arc::new(move || wall.wall_ms()),
            ids: Arc::new(move || ids.uuid()),
            dial: Dial::new(move |address| Box::pin(probe(dial.clone(), address))),
        },
        ..EngineConfig::default()
    }
}

fn connect(world: &World, life: &Arc<Life>) -> Connect {
    let (world, life) = (world.clone(), Arc::clone(life));
    Arc::new(move |machine| {
        let number = machine.spec.name.rsplit('-').next().and_then(|number| number.parse().ok());
        Arc::new(SimRuntime { world: world.clone(), machine: number.unwrap_or(0), life: Arc::clone(&life) })
    })
}

/// A probe's connection, with a copy at its other end that answers every GET.
async fn probe(world: World, address: SocketAddr) -> Dialled {
    world.sleep(0, MAX_PROBE_MS).await;
    let Some(sick) = world.listens(address) else {
        return Err(std::io::ErrorKind::ConnectionRefused.into());
    };
    let (near, mut far) = tokio::io::duplex(1_024);
    tokio::spawn(async move {
        let mut head = [0; 512];
        let status = if sick { "500 Internal Server Error" } else { "200 OK" };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        // It ends with the probe's connection.
        while far.read(&mut head).await.is_ok_and(|read| read > 0) {
            world.sleep(0, MAX_PROBE_MS).await;
            if far.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    Ok(Box::new(near) as Box<dyn Connection>)
}

/// Looks at what is written of a rollout at its end.
fn ended(world: &World, book: Option<Book>, life: &Arc<Life>) -> crate::store::Ended {
    let (world, life) = (world.clone(), Arc::clone(life));
    Arc::new(move |rollout: &Rollout| {
        // Later, what is left over is taken off the record: the counts were those of its end.
        if life.is_over() || rollout.ended_at != Some(world.wall_ms()) {
            return;
        }
        world.note(format_args!(
            "{} ends: {:?} {:?}",
            rollout.id,
            rollout.state,
            rollout.problem.as_ref().map(|p| &p.code)
        ));
        let (Some(book), Some(receipt)) = (&book, &rollout.receipt) else { return };
        book.check();
        if receipt.notes.iter().any(|note| note.contains("restarted")) {
            return; // the counts of before are lost, and it says so
        }
        for entry in receipt.instances.iter().filter(|entry| entry.new) {
            let started = book.started(&entry.instance);
            if started != entry.started {
                world.violated(format_args!(
                    "the receipt of {} gives {} requests to {}, which was sent {started}",
                    rollout.id, entry.started, entry.instance
                ));
            }
        }
    })
}

impl Ground {
    pub(crate) fn clients_are_on(&self) -> bool {
        self.clients_on.load(Ordering::SeqCst)
    }
}
