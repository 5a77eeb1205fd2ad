//! A runtime that acts only for an engine that leads.
//!
//! A process that stood still (a paused machine, SIGSTOP) does not know that it was replaced. Its first deed after it
//! must not be one at a machine: whatever changes something there waits until the lead has been shown anew. If it was
//! lost, the process ends before that. A deed of several calls (look, make, start) is held between any two of them: it gets
//! no further than the call that was on its way. Looking is always allowed.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

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

    /// Does something at the machine, and takes each step of it only while this process is certain to lead.
    async fn act<T>(&self, deed: impl Future<Output = T>) -> T {
        let mut deed = pin!(deed);
        loop {
            self.leads().await;
            let done = poll_fn(|context| {
                if Instant::now() >= *self.until.borrow() {
                    return Poll::Ready(None);
                }
                deed.as_mut().poll(context).map(Some)
            });
            if let Some(done) = done.await {
                return done;
            }
        }
    }
}

impl Runtime for LeadingRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        self.runtime.info()
    }

    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        Box::pin(self.act(self.runtime.ensure(spec)))
    }

    fn remove<'a>(&'a self, id: &'a InstanceId, grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(self.act(self.runtime.remove(id, grace_ms)))
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
        Box::pin(self.act(self.runtime.pull(reference, progress)))
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
        Box::pin(self.act(self.runtime.import(image, stream, progress)))
    }

    fn remove_image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(self.act(self.runtime.remove_image(reference)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;
    use crate::runtime::refusing::RefusingRuntime;

    fn leading(until: LeadUntil) -> LeadingRuntime {
        let error = RuntimeError::Unsupported("nothing here".to_owned());
        LeadingRuntime { runtime: Arc::new(RefusingRuntime::new("host-a", &error)), until }
    }

    #[tokio::test]
    async fn a_deed_of_a_process_that_stood_still_in_the_middle_of_it_goes_no_further_until_the_lead_is_shown_anew()
     {
        let long = Duration::from_secs(3_600);
        let (lead, until) = watch::channel(Instant::now() + long);
        let runtime = leading(until);
        let (made, answer) = (Mutex::new(Vec::new()), tokio::sync::Notify::new());
        let mut deed = pin!(runtime.act(async {
            made.lock().expect("a lock").push("created");
            answer.notified().await;
            made.lock().expect("a lock").push("started");
        }));
        assert!(deed.as_mut().now_or_never().is_none());
        // The process stands still; meanwhile the lead has run out and the machine has answered.
        lead.send_replace(Instant::now());
        answer.notify_one();
        assert!(deed.as_mut().now_or_never().is_none());
        assert_eq!(*made.lock().expect("a lock"), ["created"], "nothing after the call that was on its way");
        lead.send_replace(Instant::now() + long);
        deed.await;
        assert_eq!(*made.lock().expect("a lock"), ["created", "started"]);
    }

    #[tokio::test]
    async fn a_process_that_has_lost_the_lead_does_nothing_more() {
        let (lead, until) = watch::channel(Instant::now());
        drop(lead);
        let runtime = leading(until);
        let mut deed = pin!(runtime.act(async { panic!("it acts") }));
        for _ in 0..3 {
            let looked: Option<()> = deed.as_mut().now_or_never();
            assert!(looked.is_none());
        }
    }
}
