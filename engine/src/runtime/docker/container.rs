//! Making, starting, stopping and removing containers.
//!
//! No call is trusted to have failed: after an answer that leaves it open (a time-out, a broken connection, a
//! conflict) the engine is looked at again, and what is found decides what is done next.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bollard::errors::Error;
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder,
    RemoveContainerOptionsBuilder, StartContainerOptions, StopContainerOptionsBuilder,
};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::time::Instant;

use super::Engine;
use super::error::{Verdict, verdict, words};
use super::output;
use super::spec::{self, INSTALL_LABEL, INSTANCE_LABEL, SERVICE_LABEL};
use super::status::{self, Found, Life};
use crate::model::InstanceId;
use crate::runtime::{InstanceSpec, InstanceStatus, Run, RuntimeError};

/// Looks and deeds of one `ensure` go on for so long; then something keeps changing the container under our hands.
const SETTLE_TIMEOUT_MS: u64 = 30_000;
/// A new container is looked at for so long, in case it ends at once.
const EARLY_EXIT_WATCH_MS: u64 = 150;
/// Time between two looks at something that is about to change.
const POLL_INTERVAL_MS: u64 = 25;
/// From the end of the grace to the container's absence.
const REMOVE_TIMEOUT_MS: u64 = 60_000;
/// Inspections under way at once.
const MAX_INSPECTIONS: usize = 8;

/// See [`crate::runtime::Runtime::ensure`].
pub(super) async fn ensure(engine: &Engine, spec: &InstanceSpec) -> Result<SocketAddr, RuntimeError> {
    spec::container(spec, true)?; // a process is refused before anything is asked
    let mut init = true;
    let mut open_question = None;
    let deadline = Instant::now() + Duration::from_millis(SETTLE_TIMEOUT_MS);
    while Instant::now() < deadline {
        let deed = match look(engine, &spec.id).await? {
            None => {
                fence(engine, spec).await?;
                create(engine, spec, init).await
            }
            Some(found) => {
                check_owner(engine, spec, &found)?;
                match found.life {
                    Life::Running => match found.status.address {
                        Some(address) => return Ok(address),
                        None => return Err(engine.other("the container runs, but its port is not published")),
                    },
                    Life::Restarting => return Err(exited(engine, &found.status).await),
                    Life::Removing => {
                        tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
                        continue;
                    }
                    Life::Dead => discard(engine, &found.container).await,
                    Life::Created | Life::Exited | Life::Paused => {
                        fence(engine, spec).await?;
                        match start(engine, &found.container, found.life).await {
                            Ok(()) => return watch_start(engine, &spec.id).await,
                            Err(error) if init && lacks_init(&error) => {
                                init = false;
                                discard(engine, &found.container).await
                            }
                            Err(error) => Err(error),
                        }
                    }
                }
            }
        };
        match deed {
            Ok(()) => open_question = None,
            // Gone or taken since we looked, or no answer: look again, but give it a moment, because a name is
            // taken before its container can be seen.
            Err(error) if verdict(&error) != Verdict::Refused && !is_no_image(&error) => {
                open_question = Some(error);
                tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
            }
            Err(error) => return Err(refused(engine, spec, &error)),
        }
    }
    Err(match open_question {
        Some(error) => engine.translate(&error),
        None => engine.other(&format!("container {} does not stay as it is made", spec.id)),
    })
}

/// See [`crate::runtime::Runtime::remove`].
pub(super) async fn remove(engine: &Engine, id: &InstanceId, grace_ms: u32) -> Result<(), RuntimeError> {
    let grace = Duration::from_millis(u64::from(grace_ms));
    let deadline = Instant::now() + grace + Duration::from_millis(REMOVE_TIMEOUT_MS);
    let mut stopped = false;
    let mut meant: Option<String> = None;
    loop {
        let Some(found) = look(engine, id).await? else { return Ok(()) };
        // Who was asked to remove one container, and was late, leaves alone what another has made since.
        if *meant.get_or_insert_with(|| found.container.clone()) != found.container {
            return Ok(());
        }
        if found.install.is_none() {
            return Err(RuntimeError::Refused {
                machine: engine.machine.clone(),
                detail: format!("the container {id} is none of Peregrine's; it is left alone"),
            });
        }
        let deed = match found.life {
            Life::Removing => Ok(()),
            Life::Running | Life::Paused | Life::Restarting if !stopped => {
                stop(engine, &found.container, grace).await
            }
            _ => discard(engine, &found.container).await,
        };
        // A stop that got no answer may have worked; the grace is over in any case.
        stopped |= found.life != Life::Removing;
        match deed {
            Err(error) if verdict(&error) == Verdict::Refused => return Err(engine.translate(&error)),
            Err(error) if Instant::now() >= deadline => return Err(engine.translate(&error)),
            Ok(()) if Instant::now() >= deadline => {
                return Err(engine.other(&format!("container {id} is still there after its removal")));
            }
            Ok(()) | Err(_) => {}
        }
        if found.life == Life::Removing || deed_is_conflict(&deed) {
            tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
        }
    }
}

/// See [`crate::runtime::Runtime::inspect`].
pub(super) async fn inspect(
    engine: &Engine,
    id: &InstanceId,
) -> Result<Option<InstanceStatus>, RuntimeError> {
    Ok(look(engine, id).await?.filter(|found| found.install.is_some()).map(|found| found.status))
}

/// See [`crate::runtime::Runtime::list`].
pub(super) async fn list(engine: &Engine, install: &str) -> Result<Vec<InstanceStatus>, RuntimeError> {
    let labels = listed(engine, vec![format!("{INSTALL_LABEL}={install}")]).await?;
    let ids = labels.into_iter().filter_map(|mut labels| labels.remove(INSTANCE_LABEL)).map(InstanceId);
    let mut found: Vec<InstanceStatus> = stream::iter(ids)
        .map(|id| async move { inspect(engine, &id).await })
        .buffer_unordered(MAX_INSPECTIONS)
        .try_filter_map(|status| async move { Ok(status) })
        .try_collect()
        .await?;
    found.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(found)
}

async fn look(engine: &Engine, id: &InstanceId) -> Result<Option<Found>, RuntimeError> {
    let docker = engine.docker().await?;
    match docker.inspect_container(id.as_str(), None::<InspectContainerOptions>).await {
        Ok(container) => Ok(Some(status::read(id, engine.address, container))),
        Err(error) if verdict(&error) == Verdict::Missing => Ok(None),
        Err(error) => Err(engine.translate(&error)),
    }
}

fn check_owner(engine: &Engine, spec: &InstanceSpec, found: &Found) -> Result<(), RuntimeError> {
    if found.install.as_deref() == Some(&*spec.install) && found.status.service == spec.service {
        return Ok(());
    }
    let owner = match &found.install {
        Some(install) => format!("service {} of installation {install}", found.status.service),
        None => "somebody else".to_owned(),
    };
    Err(RuntimeError::Refused {
        machine: engine.machine.clone(),
        detail: format!("the name {} is taken by a container of {owner}", spec.id),
    })
}

/// A controller that was replaced makes and starts nothing.
async fn fence(engine: &Engine, spec: &InstanceSpec) -> Result<(), RuntimeError> {
    let filter =
        vec![format!("{INSTALL_LABEL}={}", spec.install), format!("{SERVICE_LABEL}={}", spec.service)];
    let theirs = listed(engine, filter).await?.iter().map(status::epoch).max();
    match theirs {
        Some(theirs) if theirs > spec.epoch => {
            Err(RuntimeError::Fenced { machine: engine.machine.clone(), ours: spec.epoch, theirs })
        }
        _ => Ok(()),
    }
}

/// The labels of every container that bears all of `wanted`.
async fn listed(engine: &Engine, wanted: Vec<String>) -> Result<Vec<HashMap<String, String>>, RuntimeError> {
    let filters: HashMap<String, Vec<String>> = [("label".to_owned(), wanted)].into();
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let docker = engine.docker().await?;
    let containers = docker.list_containers(Some(options)).await.map_err(|error| engine.translate(&error))?;
    Ok(containers.into_iter().filter_map(|container| container.labels).collect())
}

async fn create(engine: &Engine, spec: &InstanceSpec, init: bool) -> Result<(), Error> {
    let docker = engine.docker_or_unknown().await?;
    let options = CreateContainerOptionsBuilder::default().name(spec.id.as_str()).build();
    // Checked by the caller: the only way to fail is a specification that is no container's.
    let Ok(body) = spec::container(spec, init) else { return Ok(()) };
    let created = docker.create_container(Some(options), body).await?;
    for warning in created.warnings {
        tracing::warn!(machine = engine.machine, instance = %spec.id, warning, "the engine warns");
    }
    Ok(())
}

async fn start(engine: &Engine, container: &str, life: Life) -> Result<(), Error> {
    let docker = engine.docker_or_unknown().await?;
    if life == Life::Paused {
        return docker.unpause_container(container).await;
    }
    docker.start_container(container, None::<StartContainerOptions>).await
}

async fn stop(engine: &Engine, container: &str, grace: Duration) -> Result<(), Error> {
    let grace_s = grace.as_millis().div_ceil(1_000); // the engine counts in seconds
    let options =
        StopContainerOptionsBuilder::default().t(i32::try_from(grace_s).unwrap_or(i32::MAX)).build();
    let docker = engine.patient(grace).await?;
    docker.stop_container(container, Some(options)).await
}

async fn discard(engine: &Engine, container: &str) -> Result<(), Error> {
    let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    engine.docker_or_unknown().await?.remove_container(container, Some(options)).await
}

/// Sees whether a container that was just started ends at once. One that the engine has restarted already and
/// that runs now gets its chance: the warm-up decides.
async fn watch_start(engine: &Engine, id: &InstanceId) -> Result<SocketAddr, RuntimeError> {
    let deadline = Instant::now() + Duration::from_millis(EARLY_EXIT_WATCH_MS);
    loop {
        let Some(found) = look(engine, id).await? else {
            return Err(engine.other(&format!("somebody removed the container {id} as it started")));
        };
        if found.life != Life::Running {
            return Err(exited(engine, &found.status).await);
        }
        if Instant::now() >= deadline {
            return found
                .status
                .address
                .ok_or_else(|| engine.other("the container runs, but its port is not published"));
        }
        tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
    }
}

async fn exited(engine: &Engine, status: &InstanceStatus) -> RuntimeError {
    RuntimeError::Exited {
        code: status.exit_code,
        out_of_memory: status.out_of_memory,
        last_output: output::last_output(engine, &status.id).await,
    }
}

fn deed_is_conflict(deed: &Result<(), Error>) -> bool {
    deed.as_ref().is_err_and(|error| verdict(error) != Verdict::Refused)
}

/// The engine has no init process to put in front of ours.
fn lacks_init(error: &Error) -> bool {
    let said = words(error);
    said.contains("docker-init") || said.contains("init binary")
}

fn is_no_image(error: &Error) -> bool {
    verdict(error) == Verdict::Missing && words(error).to_ascii_lowercase().contains("no such image")
}

fn refused(engine: &Engine, spec: &InstanceSpec, error: &Error) -> RuntimeError {
    let machine = engine.machine.clone();
    match &spec.run {
        Run::Container { image, .. } if is_no_image(error) => RuntimeError::NoImage {
            image: image.clone(),
            machine,
            detail: "it has not been brought there".to_owned(),
        },
        _ => RuntimeError::Refused { machine, detail: words(error) },
    }
}
