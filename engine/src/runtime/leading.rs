//! A runtime that acts only for an engine that leads.
//!
//! A process that stood still (a paused machine, SIGSTOP) does not know that it was replaced. Its first deed after it
//! must not be one at a machine: whatever changes something there waits until the lead has been shown anew. If it was
//! lost, the process ends before that. Looking is always allowed.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{
    ImageInfo, InstanceSpec, InstanceStats, InstanceStatus, LogLine, LogOptions, Progress, Runtime,
    RuntimeError, RuntimeInfo,
};
use crate::model::InstanceId;

/// Until when this process is certain to lead. Told by whoever renews the lead.
pub type LeadUntil = watch::Receiver<Instant>;

/// Lets a runtime act only while this process is certain to lead.
#[must_use]
pub fn while_leading(runtime: Arc<dyn Runtime>, until: LeadUntil) -> Arc<dyn Runtime> {
    Arc::new(LeadingRuntime { runtime, until })
}

struct LeadingRuntime {
    runtime: Arc<dyn Runtime>,
    until: LeadUntil,
}

impl LeadingRuntime {
    async fn leads(&self) {
        let mut until = self.until.clone();
        loop {
            if Instant::now() < *until.borrow_and_update() {
                return;
            }
            if until.changed().await.is_err() {
                // Nobody renews any more: this process is ending, and does nothing more at a machine.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Runtime for LeadingRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        self.runtime.info()
    }

    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        Box::pin(async move {
            self.leads().await;
            self.runtime.ensure(spec).await
        })
    }

    fn remove<'a>(&'a self, id: &'a InstanceId, grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            self.leads().await;
            self.runtime.remove(id, grace_ms).await
        })
    }

    fn inspect<'a>(
        &'a self,
        id: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>> {
        self.runtime.inspect(id)
    }

    fn list<'a>(&'a self, install: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>> {
        self.runtime.list(install)
    }

    fn logs(
        &self,
        id: &InstanceId,
        options: LogOptions,
    ) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
        self.runtime.logs(id, options)
    }

    fn stats<'a>(&'a self, id: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>> {
        self.runtime.stats(id)
    }

    fn image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>> {
        self.runtime.image(reference)
    }

    fn pull<'a>(
        &'a self,
        reference: &'a str,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        Box::pin(async move {
            self.leads().await;
            self.runtime.pull(reference, progress).await
        })
    }

    fn export(&self, image: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        self.runtime.export(image)
    }

    fn import<'a>(
        &'a self,
        image: &'a str,
        stream: BoxStream<'static, Result<Bytes, RuntimeError>>,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        Box::pin(async move {
            self.leads().await;
            self.runtime.import(image, stream, progress).await
        })
    }

    fn remove_image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            self.leads().await;
            self.runtime.remove_image(reference).await
        })
    }
}
