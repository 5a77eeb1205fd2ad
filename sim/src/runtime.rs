//! The runtime of a simulated machine. What is asked of it goes over a network: it may come late, be executed
//! although nobody hears of it, or never arrive.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use peregrine_engine::model::InstanceId;
use peregrine_engine::runtime::{
    ImageInfo, InstanceSpec, InstanceStats, InstanceStatus, LogLine, LogOptions, Progress, Runtime,
    RuntimeError, RuntimeInfo,
};

use crate::life::Life;
use crate::world::{Placed, Started, Trouble, World};

/// Longest time by which a slow machine is late; shorter than the engine's grace for orphans.
pub(crate) const MAX_LATE_MS: u64 = 3_000;

pub(crate) struct SimRuntime {
    pub(crate) world: World,
    pub(crate) machine: usize,
    pub(crate) life: Arc<Life>,
}

impl SimRuntime {
    fn name(&self) -> String {
        machine_name(self.machine)
    }

    /// Asks the machine. `deed` is done there: whether the engine lives to hear of it or not.
    async fn ask<T: Send + 'static>(
        &self,
        verb: &'static str,
        deed: impl FnOnce(&World, u64) -> Result<T, RuntimeError> + Send + 'static,
    ) -> Result<T, RuntimeError> {
        self.life.go_on().await;
        let world = self.world.clone();
        let trouble = world.lock().troubles[self.machine];
        let asked_ms = world.elapsed_ms();
        let unheard =
            || RuntimeError::Unreachable { machine: self.name(), detail: format!("{verb}: no answer") };
        match trouble {
            Trouble::Unreachable => {
                world.sleep(1, 20).await;
                return Err(unheard());
            }
            Trouble::Fails => {
                world.sleep(1, 20).await;
                return Err(RuntimeError::Other { machine: self.name(), detail: format!("{verb} fails") });
            }
            Trouble::Hangs if world.one_in(2) => std::future::pending::<()>().await,
            _ => {}
        }
        let late_ms = match trouble {
            Trouble::Slow => world.between(200, MAX_LATE_MS),
            _ => world.between(1, 15),
        };
        world.explain(|| format!("{} is asked to {verb}, and does it in {late_ms} ms", self.name()));
        let there = world.clone();
        // On the machine, not in the engine: dropping the asker stops nothing.
        let done = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(late_ms)).await;
            deed(&there, asked_ms)
        });
        let answer = done.await.unwrap_or_else(|error| {
            Err(RuntimeError::Other { machine: "simulation".to_owned(), detail: error.to_string() })
        });
        match trouble {
            Trouble::Ambiguous if answer.is_ok() => Err(unheard()),
            Trouble::Hangs => std::future::pending().await,
            _ => {
                self.life.go_on().await;
                answer
            }
        }
    }
}

pub(crate) fn machine_name(machine: usize) -> String {
    format!("host-{machine}")
}

fn status(id: &InstanceId, copy: &Placed) -> InstanceStatus {
    InstanceStatus {
        id: id.clone(),
        service: copy.spec.service.clone(),
        epoch: copy.spec.epoch,
        running: copy.runs(),
        exit_code: copy.exit_code,
        out_of_memory: false,
        restarts: 0,
        address: copy.runs().then_some(copy.address),
    }
}

impl Runtime for SimRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        Box::pin(self.ask("info", |_, _| {
            let (architecture, os) = ("amd64".to_owned(), "linux".to_owned());
            Ok(RuntimeInfo { version: "simulated".to_owned(), architecture, os })
        }))
    }

    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        let (spec, machine) = (spec.clone(), self.machine);
        Box::pin(self.ask("ensure", move |world, asked_ms| {
            let started = world.start(machine, &spec, asked_ms);
            let machine = machine_name(machine);
            match started {
                Started::At(address) => {
                    world.note(format_args!("{} runs on {machine}", spec.id));
                    Ok(address)
                }
                Started::Exited => Err(RuntimeError::Exited {
                    code: Some(3),
                    out_of_memory: false,
                    last_output: "simulated".to_owned(),
                }),
                Started::Fenced(theirs) => Err(RuntimeError::Fenced { machine, ours: spec.epoch, theirs }),
            }
        }))
    }

    fn remove<'a>(&'a self, id: &'a InstanceId, _grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        let (id, machine) = (id.clone(), self.machine);
        // As with containers: a copy is looked up first, and what is late does nothing to one that came after it.
        let meant = self.world.lock().copies.get(&id).map(|copy| copy.address);
        Box::pin(self.ask("remove", move |world, _| {
            let there = world.lock().copies.get(&id).map(|copy| copy.address);
            if there.is_none() || meant.is_none() || there == meant {
                world.remove(machine, &id);
            }
            Ok(())
        }))
    }

    fn inspect<'a>(
        &'a self,
        id: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>> {
        let (id, machine) = (id.clone(), self.machine);
        Box::pin(self.ask("inspect", move |world, _| {
            let inner = world.lock();
            let found = inner.copies.get(&id).filter(|copy| copy.machine == machine);
            Ok(found.map(|copy| status(&id, copy)))
        }))
    }

    fn list<'a>(&'a self, install: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>> {
        let (install, machine) = (install.to_owned(), self.machine);
        Box::pin(self.ask("list", move |world, _| {
            let inner = world.lock();
            let here = inner.copies.iter().filter(|(_, c)| c.machine == machine && c.spec.install == install);
            Ok(here.map(|(id, copy)| status(id, copy)).collect())
        }))
    }

    fn logs(
        &self,
        id: &InstanceId,
        _options: LogOptions,
    ) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
        let text = format!("output of {id}");
        stream::iter([Ok(LogLine { at: 1, stderr: true, text })]).boxed()
    }

    fn stats<'a>(&'a self, _id: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>> {
        Box::pin(self.ask("stats", |_, _| Ok(InstanceStats::default())))
    }

    fn image<'a>(&'a self, _reference: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>> {
        Box::pin(self.ask("image", |_, _| Ok(None)))
    }

    fn pull<'a>(
        &'a self,
        _reference: &'a str,
        _progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        Box::pin(std::future::ready(Err(no_images())))
    }

    fn export(&self, _image: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        stream::iter([Err(no_images())]).boxed()
    }

    fn import<'a>(
        &'a self,
        _image: &'a str,
        _stream: BoxStream<'static, Result<Bytes, RuntimeError>>,
        _progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        Box::pin(std::future::ready(Err(no_images())))
    }
}

fn no_images() -> RuntimeError {
    RuntimeError::Unsupported("the simulated machines run commands, not images".to_owned())
}
