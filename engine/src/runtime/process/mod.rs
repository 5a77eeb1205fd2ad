//! Plain child processes of this machine: the demo without Docker, fast tests, and programs without an image.
//!
//! A process outlives Peregrine (also `kill -9`) and is found again at the next start: everything needed for
//! that is in its state folder, see `folder.rs`. Nothing is ever signalled by a bare number: a process is known
//! by pid, start time and boot, or by a random mark in its environment.
//!
//! Limits on memory, CPU and pids hold as far as the kernel lets us, see `limits.rs`; [`Runtime::info`] says how
//! far. What this runtime never does: it isolates nothing. Instances share the file system, the user and the
//! network of Peregrine.
//!
//! Under systemd the unit needs `KillMode=process`, or else a restart of Peregrine takes the instances along.

mod folder;
mod limits;
mod output;
mod ports;
pub(super) mod procfs;
mod spawn;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{self, BoxStream, StreamExt};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use self::folder::{Ending, Folder, Record};
use self::limits::Limits;
use self::output::Times;
use self::procfs::{ProcessKey, ProcessStat};
use super::{
    ImageInfo, InstanceSpec, InstanceStats, InstanceStatus, LogLine, LogOptions, Progress, Run, Runtime,
    RuntimeError, RuntimeInfo,
};
use crate::model::{InstanceId, MachineSpec};

/// `ensure` looks on for so long whether the process ends at once; it returns earlier when it listens.
const EARLY_EXIT_WATCH_MS: u64 = 500;
/// Time between two looks at a process that is starting or ending.
const POLL_INTERVAL_MS: u64 = 10;
/// After SIGKILL the kernel needs so long at most, or something is wrong (a process stuck in the kernel).
const KILL_TIMEOUT_MS: u64 = 5_000;

/// Plain processes on one machine.
#[derive(Debug)]
pub struct ProcessRuntime {
    inner: Arc<Inner>,
    watching: OnceLock<()>,
}

#[derive(Debug)]
struct Inner {
    machine: String,
    root: PathBuf,
    /// One verb at a time for each instance.
    locks: Mutex<HashMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
    /// Held from the choice of a port until it is written down.
    ports: Mutex<()>,
    times: Arc<Times>,
    limits: OnceLock<Limits>,
}

/// A process that was just started, and the news of its end.
struct Started {
    key: ProcessKey,
    address: SocketAddr,
    ended: watch::Receiver<Option<Ending>>,
}

enum Ensured {
    Running(SocketAddr),
    Started(Started),
}

impl ProcessRuntime {
    /// The processes of `machine`, with their state under `data_dir`. Nothing is touched before the first use.
    #[must_use]
    pub fn new(machine: &MachineSpec, data_dir: &Path) -> Self {
        let inner = Inner {
            machine: machine.name.clone(),
            root: data_dir.join("processes").join(&machine.name),
            locks: Mutex::default(),
            ports: Mutex::default(),
            times: Arc::default(),
            limits: OnceLock::new(),
        };
        Self { inner: Arc::new(inner), watching: OnceLock::new() }
    }

    /// Looks after the output files for as long as this runtime lives.
    fn watch_output(&self) {
        self.watching.get_or_init(|| {
            let inner = Arc::downgrade(&self.inner);
            tokio::spawn(async move {
                let mut interval = tokio::time::interval(Duration::from_millis(output::WATCH_INTERVAL_MS));
                interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    interval.tick().await;
                    let Some(inner) = inner.upgrade() else { return };
                    let looked = blocking(move || inner.look_at_output()).await;
                    if let Err(error) = looked {
                        tracing::warn!(%error, "output files of processes");
                    }
                }
            });
        });
    }
}

impl Runtime for ProcessRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        let inner = Arc::clone(&self.inner);
        async {
            blocking(move || {
                Ok(RuntimeInfo {
                    version: format!("plain processes ({})", inner.limits().words()),
                    architecture: match std::env::consts::ARCH {
                        "x86_64" => "amd64",
                        "aarch64" => "arm64",
                        other => other,
                    }
                    .to_owned(),
                    os: std::env::consts::OS.to_owned(),
                })
            })
            .await
        }
        .boxed()
    }

    /// Returns as soon as the process listens, or after half a second if it has not ended by then: waiting for
    /// slow starters is the warm-up's work. One that runs is left alone, whatever the epoch; one that is to be
    /// started must not be behind another instance of its service.
    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        async move {
            self.watch_output();
            let folder = self.inner.folder(&spec.id)?;
            let guard = self.inner.lock(&spec.id).await;
            let (inner, spec) = (Arc::clone(&self.inner), spec.clone());
            // On a thread of its own, lock included: a caller that gives up does not leave a half-made start.
            let ensured = blocking(move || {
                let ensured = inner.ensure(&spec);
                drop(guard);
                ensured
            });
            match ensured.await? {
                Ensured::Running(address) => Ok(address),
                Ensured::Started(started) => self.inner.watch_start(&folder, started).await,
            }
        }
        .boxed()
    }

    fn remove<'a>(&'a self, id: &'a InstanceId, grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        async move {
            let folder = self.inner.folder(id)?;
            let _guard = self.inner.lock(id).await;
            self.inner.end(&folder, grace_ms).await?;
            self.inner.times.forget(&folder);
            self.inner.forget(folder).await
        }
        .boxed()
    }

    fn inspect<'a>(
        &'a self,
        id: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>> {
        async move {
            let folder = self.inner.folder(id)?;
            let inner = Arc::clone(&self.inner);
            let status = blocking(move || inner.status(&folder)).await?;
            Ok(status.map(|(_, status)| status))
        }
        .boxed()
    }

    fn list<'a>(&'a self, install: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>> {
        async move {
            self.watch_output();
            let (inner, install) = (Arc::clone(&self.inner), install.to_owned());
            blocking(move || {
                let mut found = Vec::new();
                for folder in Folder::all(&inner.root).map_err(|error| inner.other(&error))? {
                    let status = inner.status(&folder)?;
                    found.extend(
                        status.filter(|(record, _)| record.install == install).map(|(_, status)| status),
                    );
                }
                found.sort_by(|a, b| a.id.cmp(&b.id));
                Ok(found)
            })
            .await
        }
        .boxed()
    }

    fn logs(
        &self,
        id: &InstanceId,
        options: LogOptions,
    ) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
        let folder = match self.inner.folder(id) {
            Ok(folder) if folder.exists() => folder,
            Ok(_) => {
                let error = self.inner.other(&format!("there is no instance {id}"));
                return stream::once(async { Err(error) }).boxed();
            }
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        let (sender, receiver) = output::channel();
        let (inner, times) = (Arc::clone(&self.inner), Arc::clone(&self.inner.times));
        let failed = {
            let inner = Arc::clone(&inner);
            move |error| inner.other(&error)
        };
        let ended = move |folder: &Folder| {
            !matches!(inner.status(folder), Ok(Some((_, InstanceStatus { running: true, .. }))))
        };
        let send = output::send(folder, times, options, ended, sender, failed);
        // The sender works only as the stream is read, and ends with it.
        let work = send.into_stream().filter_map(async |()| None);
        stream::select(ReceiverStream::new(receiver), work).boxed()
    }

    fn stats<'a>(&'a self, id: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>> {
        async move {
            let folder = self.inner.folder(id)?;
            let inner = Arc::clone(&self.inner);
            let id = id.clone();
            blocking(move || {
                let processes = inner.processes(&folder)?;
                if processes.is_empty() {
                    return Err(inner.other(&format!("instance {id} does not run")));
                }
                let sum = |of: fn(&ProcessStat) -> u64| processes.iter().map(of).sum::<u64>();
                Ok(InstanceStats {
                    cpu_seconds: sum(|process| process.cpu_ticks) as f64 / procfs::ticks_per_second() as f64,
                    memory_bytes: sum(|process| process.resident_pages) * procfs::page_bytes(),
                    pids: sum(|process| process.threads),
                })
            })
            .await
        }
        .boxed()
    }

    fn image<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>> {
        let error = self.inner.no_images();
        async { Err(error) }.boxed()
    }

    fn pull<'a>(&'a self, _: &'a str, _: Progress<'a>) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        let error = self.inner.no_images();
        async { Err(error) }.boxed()
    }

    fn export(&self, _: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        let error = self.inner.no_images();
        stream::once(async { Err(error) }).boxed()
    }

    fn import<'a>(
        &'a self,
        _: &'a str,
        _: BoxStream<'static, Result<Bytes, RuntimeError>>,
        _: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        let error = self.inner.no_images();
        async { Err(error) }.boxed()
    }
}

impl Inner {
    fn folder(&self, id: &InstanceId) -> Result<Folder, RuntimeError> {
        Folder::of(&self.root, id)
            .map_err(|detail| RuntimeError::Refused { machine: self.machine.clone(), detail })
    }

    fn other(&self, error: &dyn std::fmt::Display) -> RuntimeError {
        RuntimeError::Other { machine: self.machine.clone(), detail: error.to_string() }
    }

    fn no_images(&self) -> RuntimeError {
        RuntimeError::Unsupported(format!(
            "{} runs plain processes and has no images: give the service a command, or use a Docker machine",
            self.machine
        ))
    }

    async fn lock(&self, id: &InstanceId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(id.clone()).or_default())
        };
        lock.lock_owned().await
    }

    fn look_at_output(&self) -> Result<(), RuntimeError> {
        for folder in Folder::all(&self.root).map_err(|error| self.other(&error))? {
            for file in [folder.stdout(), folder.stderr()] {
                self.times
                    .look(&file)
                    .map_err(|error| self.other(&format_args!("{}: {error}", file.display())))?;
            }
        }
        Ok(())
    }

    fn ensure(&self, spec: &InstanceSpec) -> Result<Ensured, RuntimeError> {
        let Run::Process { command, directory } = &spec.run else { return Err(self.no_images()) };
        let folder = self.folder(&spec.id)?;
        let record = folder.record().map_err(|error| self.other(&error))?;
        if let Some(record) = &record {
            if record.install != spec.install {
                let detail = format!("{} belongs to another installation ({})", spec.id, record.install);
                return Err(RuntimeError::Refused { machine: self.machine.clone(), detail });
            }
            if folder.main_process(record).map_err(|error| self.other(&error))?.is_some() {
                return Ok(Ensured::Running(record.address));
            }
        } else {
            Folder::sweep(&self.root);
        }
        self.fence(spec)?;
        let record = self.intend(&folder, spec, record.as_ref())?;
        let refused = |detail: String| RuntimeError::Refused { machine: self.machine.clone(), detail };
        let limits = self.limits();
        limits
            .prepare(&record.groups, &spec.resources)
            .map_err(|error| refused(format!("its limits cannot be set: {error}")))?;
        let mut child = spawn::spawn(&folder, &record, spec, command, directory.as_ref()).map_err(refused)?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        let all = || folder.processes(&record);
        if let Err(error) = limits.hold(&record.groups, &spec.resources, pid, all) {
            drop(child.start_kill()); // an error: it has ended, which is what is wanted
            return Err(refused(format!("it cannot be put under its limits: {error}")));
        }
        self.started(&folder, &record, child).map(Ensured::Started)
    }

    fn limits(&self) -> &Limits {
        self.limits.get_or_init(Limits::find)
    }

    /// Takes an instance without processes away: its control groups, then its folder.
    async fn forget(self: &Arc<Self>, folder: Folder) -> Result<(), RuntimeError> {
        let deadline = Instant::now() + Duration::from_millis(KILL_TIMEOUT_MS);
        loop {
            let (inner, place) = (Arc::clone(self), folder.clone());
            let busy = blocking(move || inner.remove_groups(&place)).await?;
            if busy.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                return Err(self.other(&format!("control groups {busy:?} do not get empty")));
            }
            tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
        }
        let inner = Arc::clone(self);
        blocking(move || folder.remove().map_err(|error| inner.other(&error))).await
    }

    fn remove_groups(&self, folder: &Folder) -> Result<Vec<PathBuf>, RuntimeError> {
        let failed = |error: io::Error| self.other(&error);
        let Some(record) = folder.record().map_err(failed)? else { return Ok(Vec::new()) };
        limits::remove(&[record.groups, record.old_groups].concat()).map_err(failed)
    }

    /// A controller that was replaced starts nothing.
    fn fence(&self, spec: &InstanceSpec) -> Result<(), RuntimeError> {
        let theirs = self
            .records()?
            .into_iter()
            .filter(|record| record.install == spec.install && record.service == spec.service)
            .map(|record| record.epoch)
            .max();
        match theirs {
            Some(theirs) if theirs > spec.epoch => {
                Err(RuntimeError::Fenced { machine: self.machine.clone(), ours: spec.epoch, theirs })
            }
            _ => Ok(()),
        }
    }

    /// Writes down what is about to be started, with a port and a mark of its own.
    fn intend(
        &self,
        folder: &Folder,
        spec: &InstanceSpec,
        before: Option<&Record>,
    ) -> Result<Record, RuntimeError> {
        let _ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error: io::Error| self.other(&error);
        folder.create().map_err(failed)?;
        if let Some(before) = before {
            // What a crashed main process left behind would hold its port, or do its work twice.
            for process in folder.processes(before).map_err(failed)? {
                signal(&process, Signal::KILL);
            }
        }
        let address = match before.map(|record| record.address) {
            Some(address) if address.ip() == spec.publish && ports::is_free(address) => address,
            _ => {
                let taken: BTreeSet<u16> =
                    self.records()?.iter().map(|record| record.address.port()).collect();
                let port = ports::choose(spec.publish, &taken).map_err(|error| RuntimeError::Refused {
                    machine: self.machine.clone(),
                    detail: format!(
                        "no port to listen on at {}: {error}; is that an address of this machine?",
                        spec.publish
                    ),
                })?;
                SocketAddr::new(spec.publish, port)
            }
        };
        let starts = before.map_or(0, |record| record.starts) + 1;
        let old_groups = match before {
            Some(before) => {
                let groups = [&before.groups[..], &before.old_groups].concat();
                limits::remove(&groups).map_err(failed)?
            }
            None => Vec::new(),
        };
        let record = Record {
            install: spec.install.clone(),
            id: spec.id.clone(),
            service: spec.service.clone(),
            version: spec.version,
            epoch: spec.epoch,
            address,
            mark: uuid::Uuid::new_v4().simple().to_string(),
            starts,
            groups: self.limits().groups(&spec.id, starts),
            old_groups,
        };
        folder.write_record(&record).map_err(failed)?;
        folder.forget_process().map_err(failed)?;
        Ok(record)
    }

    /// Writes down what was started, and sees to its end.
    fn started(
        &self,
        folder: &Folder,
        record: &Record,
        mut child: tokio::process::Child,
    ) -> Result<Started, RuntimeError> {
        // Nobody reaps it before the task below, so its entry in /proc is there, if only as a zombie.
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let key = pid
            .and_then(procfs::key)
            .ok_or_else(|| self.other(&"the process that was started is not in /proc; is it mounted?"))?;
        folder.write_process(&key).map_err(|error| self.other(&error))?;
        let (sender, ended) = watch::channel(None);
        let (reaped, place) = (key.clone(), folder.clone());
        tokio::spawn(async move {
            let code = child.wait().await.ok().and_then(exit_code);
            let ending = Ending { process: reaped, code };
            let written = ending.clone();
            let place = tokio::task::spawn_blocking(move || place.write_ending(&written)).await;
            if let Ok(Err(error)) = place
                && error.kind() != io::ErrorKind::NotFound
            // removed meanwhile
            {
                tracing::warn!(%error, "the exit code of a process is not written down");
            }
            sender.send_replace(Some(ending));
        });
        Ok(Started { key, address: record.address, ended })
    }

    /// Waits until the process listens, ends, or has lived for a while.
    async fn watch_start(
        self: &Arc<Self>,
        folder: &Folder,
        mut started: Started,
    ) -> Result<SocketAddr, RuntimeError> {
        let deadline = Instant::now() + Duration::from_millis(EARLY_EXIT_WATCH_MS);
        let address = started.address;
        let ending = loop {
            let look = tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS));
            tokio::select! {
                ended = started.ended.wait_for(Option::is_some) => break ended.ok().and_then(|ending| ending.clone()),
                () = look => {}
            }
            let listens = blocking(move || Ok(procfs::listens(address))).await?;
            // Somebody else's listener (it took the port first) says nothing of ours: its own end comes soon.
            if (listens || Instant::now() >= deadline) && procfs::find(&started.key).is_some() {
                return Ok(address);
            }
        };
        let (folder, times) = (folder.clone(), Arc::clone(&self.times));
        let inner = Arc::clone(self);
        let (last_output, out_of_memory) = blocking(move || {
            let status = inner.status(&folder)?;
            Ok((output::last_output(&folder, &times), status.is_some_and(|(_, status)| status.out_of_memory)))
        })
        .await?;
        Err(RuntimeError::Exited { code: ending.and_then(|ending| ending.code), out_of_memory, last_output })
    }

    fn records(&self) -> Result<Vec<Record>, RuntimeError> {
        let failed = |error: io::Error| self.other(&error);
        let mut records = Vec::new();
        for folder in Folder::all(&self.root).map_err(failed)? {
            records.extend(folder.record().map_err(failed)?);
        }
        Ok(records)
    }

    fn status(&self, folder: &Folder) -> Result<Option<(Record, InstanceStatus)>, RuntimeError> {
        let failed = |error: io::Error| self.other(&error);
        let Some(record) = folder.record().map_err(failed)? else { return Ok(None) };
        let running = folder.main_process(&record).map_err(failed)?.is_some();
        let exit_code = match folder.ending().map_err(failed)? {
            Some(ending) if folder.process().map_err(failed)?.as_ref() == Some(&ending.process) => {
                ending.code
            }
            _ => None,
        };
        let status = InstanceStatus {
            id: record.id.clone(),
            service: record.service.clone(),
            epoch: record.epoch,
            running,
            exit_code: exit_code.filter(|_| !running),
            out_of_memory: !running && limits::ran_out_of_memory(&record.groups),
            restarts: record.starts.saturating_sub(1),
            address: running.then_some(record.address),
        };
        Ok(Some((record, status)))
    }

    fn processes(&self, folder: &Folder) -> Result<Vec<ProcessStat>, RuntimeError> {
        let failed = |error: io::Error| self.other(&error);
        match folder.record().map_err(failed)? {
            Some(record) => {
                folder.main_process(&record).map_err(failed)?; // finds one that was not written down
                folder.processes(&record).map_err(failed)
            }
            None => Ok(Vec::new()),
        }
    }

    /// Ends every process of the instance: SIGTERM, `grace_ms`, SIGKILL; returns when none is left.
    async fn end(self: &Arc<Self>, folder: &Folder, grace_ms: u32) -> Result<(), RuntimeError> {
        let started = Instant::now();
        let kill_at = started + Duration::from_millis(u64::from(grace_ms));
        let give_up_at = kill_at + Duration::from_millis(KILL_TIMEOUT_MS);
        let mut known: Vec<ProcessStat> = Vec::new();
        loop {
            let (inner, folder, seen) = (Arc::clone(self), folder.clone(), known);
            let kill = Instant::now() >= kill_at;
            known = blocking(move || {
                let mut left = inner.processes(&folder)?;
                // Those seen before whose leader is gone by now, and who hide their environment.
                left.extend(seen.iter().filter_map(|before| {
                    procfs::stat(before.pid)
                        .filter(|now| now.start_ticks == before.start_ticks && now.alive())
                }));
                left.sort_by_key(|process| process.pid);
                left.dedup_by_key(|process| process.pid);
                for process in &left {
                    let is_new = seen.iter().all(|before| before.pid != process.pid);
                    if kill {
                        signal(process, Signal::KILL);
                    } else if is_new {
                        signal(process, Signal::TERM);
                    }
                }
                Ok(left)
            })
            .await?;
            if known.is_empty() {
                return Ok(());
            }
            if Instant::now() >= give_up_at {
                let pids: Vec<i32> = known.iter().map(|process| process.pid).collect();
                return Err(self.other(&format!("processes {pids:?} do not end, not even by SIGKILL")));
            }
            tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
        }
    }
}

/// Signals exactly this process: the file descriptor is opened first and its start time compared then.
fn signal(process: &ProcessStat, signal: Signal) {
    let Some(pid) = Pid::from_raw(process.pid) else { return };
    let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if procfs::stat(process.pid).is_some_and(|now| now.start_ticks == process.start_ticks) {
        let _ = pidfd_send_signal(&descriptor, signal); // it has just ended: what was wanted
    }
}

fn exit_code(status: std::process::ExitStatus) -> Option<i64> {
    use std::os::unix::process::ExitStatusExt;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).map(i64::from)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RuntimeError> + Send + 'static,
) -> Result<T, RuntimeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(RuntimeError::Other {
            machine: "this machine".to_owned(),
            detail: format!("Peregrine is stopping: {error}"),
        }),
    }
}
