//! The latest value of something, for any number of followers. A new value wakes them in the order in which they
//! began to wait, so that a run can be repeated event by event; a `tokio::sync::watch` draws their order.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::Notify;

/// The value, and the way to change it.
#[derive(Debug, Default)]
pub(crate) struct Latest<T>(Arc<Shared<T>>);

#[derive(Debug, Default)]
struct Shared<T> {
    value: RwLock<T>,
    /// Changes so far.
    changes: AtomicU64,
    changed: Notify,
}

/// One follower: it has seen the value up to some change.
#[derive(Debug)]
pub(crate) struct Follower<T> {
    of: Arc<Shared<T>>,
    seen: u64,
}

/// The value, for a moment: not to be held over an `await`.
pub(crate) struct Seen<'a, T>(RwLockReadGuard<'a, T>);

impl<T> Deref for Seen<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Shared<T> {
    fn read(&self) -> Seen<'_, T> {
        Seen(self.value.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> Latest<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Arc::new(Shared {
            value: RwLock::new(value),
            changes: AtomicU64::new(0),
            changed: Notify::new(),
        }))
    }

    pub(crate) fn borrow(&self) -> Seen<'_, T> {
        self.0.read()
    }

    /// Changes the value; followers are woken if `change` says that it did.
    pub(crate) fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) {
        if change(&mut self.0.value.write().unwrap_or_else(PoisonError::into_inner)) {
            self.0.changes.fetch_add(1, Ordering::AcqRel);
            self.0.changed.notify_waiters();
        }
    }

    /// Sets the value and wakes the followers.
    pub(crate) fn send_replace(&self, value: T) {
        self.send_if_modified(|now| {
            *now = value;
            true
        });
    }

    /// Follows from the present value on.
    pub(crate) fn subscribe(&self) -> Follower<T> {
        Follower { of: Arc::clone(&self.0), seen: self.0.changes.load(Ordering::Acquire) }
    }
}

impl<T> Follower<T> {
    /// The present value, which counts as seen.
    pub(crate) fn borrow_and_update(&mut self) -> Seen<'_, T> {
        // Before the value is read: a change in between is seen twice rather than never.
        self.seen = self.of.changes.load(Ordering::Acquire);
        self.of.read()
    }

    /// Waits for a value that was not seen, and counts it as seen.
    pub(crate) async fn changed(&mut self) {
        loop {
            // Taken before the look: `notify_waiters` wakes it from here on.
            let changed = self.of.changed.notified();
            let now = self.of.changes.load(Ordering::Acquire);
            if now != self.seen {
                self.seen = now;
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn followers_are_woken_in_the_order_in_which_they_wait() {
        let latest = Latest::new(0);
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let followers: Vec<_> = (0..20)
            .map(|number| {
                let (mut follower, order) = (latest.subscribe(), Arc::clone(&order));
                tokio::spawn(async move {
                    follower.changed().await;
                    order.lock().unwrap().push(number);
                })
            })
            .collect();
        tokio::task::yield_now().await;
        latest.send_replace(1);
        for follower in followers {
            follower.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_change_before_the_wait_is_not_missed_and_one_that_is_none_wakes_nobody() {
        let latest = Latest::new(0);
        let mut follower = latest.subscribe();
        latest.send_if_modified(|_| false);
        assert!(futures_util::FutureExt::now_or_never(follower.changed()).is_none());
        latest.send_replace(5);
        follower.changed().await;
        assert_eq!(*follower.borrow_and_update(), 5);
        assert_eq!(*latest.borrow(), 5);
        assert!(futures_util::FutureExt::now_or_never(follower.changed()).is_none(), "it was seen");
    }
}
