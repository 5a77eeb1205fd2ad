//! The runtime of a machine that cannot even be tried: its key file is missing, its certificate is broken.
//!
//! The machine stays in the list and every ask is answered with the reason, so that one wrong file does not
//! stop the start of everything else.

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{self, BoxStream, StreamExt};

use super::{
    ImageInfo, InstanceSpec, InstanceStats, InstanceStatus, LogLine, LogOptions, Progress, Runtime,
    RuntimeError, RuntimeInfo,
};
use crate::model::InstanceId;

/// Answers everything with the same refusal.
pub(super) struct RefusingRuntime {
    machine: String,
    detail: String,
}

impl RefusingRuntime {
    pub(super) fn new(machine: &str, error: &RuntimeError) -> Self {
        let detail = match error {
            RuntimeError::Refused { detail, .. } => detail.clone(),
            other => other.to_string(),
        };
        Self { machine: machine.to_owned(), detail }
    }

    fn error(&self) -> RuntimeError {
        RuntimeError::Unreachable { machine: self.machine.clone(), detail: self.detail.clone() }
    }

    fn refuse<T: Send + 'static>(&self) -> BoxFuture<'_, Result<T, RuntimeError>> {
        std::future::ready(Err(self.error())).boxed()
    }

    fn refuse_stream<T: Send + 'static>(&self) -> BoxStream<'static, Result<T, RuntimeError>> {
        stream::iter([Err(self.error())]).boxed()
    }
}

impl Runtime for RefusingRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        self.refuse()
    }

    fn ensure<'a>(&'a self, _: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        self.refuse()
    }

    fn remove<'a>(&'a self, _: &'a InstanceId, _: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        self.refuse()
    }

    fn inspect<'a>(
        &'a self,
        _: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>> {
        self.refuse()
    }

    fn list<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>> {
        self.refuse()
    }

    fn logs(&self, _: &InstanceId, _: LogOptions) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
        self.refuse_stream()
    }

    fn stats<'a>(&'a self, _: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>> {
        self.refuse()
    }

    fn image<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>> {
        self.refuse()
    }

    fn pull<'a>(&'a self, _: &'a str, _: Progress<'a>) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        self.refuse()
    }

    fn export(&self, _: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        self.refuse_stream()
    }

    fn import<'a>(
        &'a self,
        _: &'a str,
        _: BoxStream<'static, Result<Bytes, RuntimeError>>,
        _: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        self.refuse()
    }
}
