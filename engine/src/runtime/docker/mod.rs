//! Docker engines, on this machine or another: containers named by instance id and known by their labels.
//!
//! ```text
//!   container.rs ─┐                              ┌─ unix socket
//!   image.rs ─────┼─► Engine ─► bollard ─► connect.rs ─► tcp, tls.rs (mutual TLS)
//!   output.rs ────┘   (API version agreed once)  └─ ssh.rs (pinned host key, one session)
//! ```
//!
//! Nothing is connected before the first use, and every failure is followed by a new attempt at the next use.
//! A container without our labels is never touched.

mod connect;
mod container;
mod error;
mod image;
mod output;
mod spec;
mod ssh;
mod status;
mod tls;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::BoxStream;

use self::connect::Way;
use super::{
    ImageInfo, InstanceSpec, InstanceStats, InstanceStatus, LogLine, LogOptions, Progress, Runtime,
    RuntimeError, RuntimeInfo,
};
use crate::model::{DockerEndpoint, InstanceId, MachineSpec};

/// From a request to the head of its answer, for everything that the engine does at once.
const CALL_TIMEOUT_S: u64 = 30;
/// For the first call on an engine, which agrees on the version of its API.
const HELLO_TIMEOUT_S: u64 = 10;

/// The Docker engine of one machine.
#[derive(Debug)]
pub struct DockerRuntime {
    engine: Engine,
}

impl DockerRuntime {
    /// The engine at `endpoint`. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// The endpoint cannot be used as it is described: [`RuntimeError::Refused`] says why.
    pub fn new(machine: &MachineSpec, endpoint: &DockerEndpoint) -> Result<Self, RuntimeError> {
        let way = Way::to(endpoint)
            .map_err(|detail| RuntimeError::Refused { machine: machine.name.clone(), detail })?;
        let engine = Engine {
            machine: machine.name.clone(),
            address: machine.address,
            way: Arc::new(way),
            docker: Arc::default(),
        };
        Ok(Self { engine })
    }
}

impl Runtime for DockerRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        async {
            let docker = self.engine.docker().await?;
            let version = docker.version().await.map_err(|error| self.engine.translate(&error))?;
            let text = |value: Option<String>| value.unwrap_or_else(|| "?".to_owned());
            Ok(RuntimeInfo {
                version: format!("Docker {}, API {}", text(version.version), docker.client_version()),
                architecture: text(version.arch),
                os: text(version.os),
            })
        }
        .boxed()
    }

    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        container::ensure(&self.engine, spec).boxed()
    }

    fn remove<'a>(&'a self, id: &'a InstanceId, grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        container::remove(&self.engine, id, grace_ms).boxed()
    }

    fn inspect<'a>(
        &'a self,
        id: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>> {
        container::inspect(&self.engine, id).boxed()
    }

    fn list<'a>(&'a self, install: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>> {
        container::list(&self.engine, install).boxed()
    }

    fn logs(
        &self,
        id: &InstanceId,
        options: LogOptions,
    ) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
        output::logs(self.engine.clone(), id.clone(), options)
    }

    fn stats<'a>(&'a self, id: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>> {
        output::stats(&self.engine, id).boxed()
    }

    fn image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>> {
        image::find(&self.engine, reference).boxed()
    }

    fn pull<'a>(
        &'a self,
        reference: &'a str,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        image::pull(&self.engine, reference, progress).boxed()
    }

    fn export(&self, image: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        image::export(self.engine.clone(), image.to_owned())
    }

    fn import<'a>(
        &'a self,
        image: &'a str,
        stream: BoxStream<'static, Result<Bytes, RuntimeError>>,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        image::import(&self.engine, image, stream, progress).boxed()
    }

    fn remove_image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<(), RuntimeError>> {
        image::remove(&self.engine, reference).boxed()
    }
}

/// An engine and the way to it.
#[derive(Clone, Debug)]
struct Engine {
    machine: String,
    /// Where the edge reaches published ports.
    address: IpAddr,
    way: Arc<Way>,
    /// A client that has agreed on a version; forgotten when the engine does not answer.
    docker: Arc<Mutex<Option<Docker>>>,
}

impl Engine {
    async fn docker(&self) -> Result<Docker, RuntimeError> {
        self.docker_or_unknown().await.map_err(|error| self.translate(&error))
    }

    /// The client. An error is always one after which nothing has been done.
    async fn docker_or_unknown(&self) -> Result<Docker, Error> {
        if let Some(docker) = self.docker.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok(docker);
        }
        let mut docker = connect::client(&self.way, HELLO_TIMEOUT_S)?.negotiate_version().await?;
        docker.set_timeout(Duration::from_secs(CALL_TIMEOUT_S));
        *self.docker.lock().unwrap_or_else(PoisonError::into_inner) = Some(docker.clone());
        Ok(docker)
    }

    /// A client that waits longer for the head of an answer.
    async fn patient(&self, longer: Duration) -> Result<Docker, Error> {
        let mut docker = self.docker_or_unknown().await?;
        docker.set_timeout(longer + Duration::from_secs(CALL_TIMEOUT_S));
        Ok(docker)
    }

    fn translate(&self, error: &Error) -> RuntimeError {
        let error = error::translate(&self.machine, error);
        if matches!(error, RuntimeError::Unreachable { .. }) {
            // It may come back as another version.
            *self.docker.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        error
    }

    fn other(&self, detail: &str) -> RuntimeError {
        RuntimeError::Other { machine: self.machine.clone(), detail: detail.to_owned() }
    }
}
