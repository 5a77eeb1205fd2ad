//! Keys of session tickets, for all edges of an installation: made by the engine that leads, replaced in time, sealed in its
//! store, told to every edge. A session is resumed at any of them, and after a restart of any of them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use peregrine_certs::{Expected, SealKey, Vault, Write};
use peregrine_link::Secret;
use peregrine_proxy::{TICKET_KEY_LIFE_MS, TicketKeys, Tickets};
use tokio::sync::watch;

/// The record of the vault. It is sealed under its own name.
const RECORD: &str = "sealed/tickets";
/// Pause after keys that could not be made or kept.
const RETRY_MS: u64 = 60_000;

/// The keys of the installation.
pub(crate) struct InstallationKeys {
    vault: Arc<dyn Vault>,
    seal: SealKey,
    now: watch::Sender<TicketKeys>,
    told: watch::Sender<Secret>,
}

impl InstallationKeys {
    /// Opens those that are in the vault, or makes the first ones.
    ///
    /// # Errors
    /// The vault or the key file cannot be used.
    pub(crate) async fn open(vault: Arc<dyn Vault>, key_file: &Path) -> anyhow::Result<Self> {
        let seal = SealKey::open_or_create(key_file)?;
        let kept = vault.get(RECORD).await?;
        let kept = kept.and_then(|record| read(&seal, &record.bytes));
        let (keys, is_new) = match kept {
            Some(keys) => (keys, false),
            None => (TicketKeys::generate(unix_ms())?, true),
        };
        let (now, told) = (watch::Sender::new(keys.clone()), watch::Sender::new(secret(&keys)));
        let keys_of_all = Self { vault, seal, now, told };
        if is_new {
            keys_of_all.keep(&keys).await?;
        }
        Ok(keys_of_all)
    }

    /// What edges in other processes are told.
    pub(crate) fn told(&self) -> watch::Receiver<Secret> {
        self.told.subscribe()
    }

    /// Has the edge of this process use them.
    pub(crate) fn have(&self, edge: &Tickets) {
        edge.replace(&self.now.borrow().clone());
    }

    /// Replaces them in time, for ever, there and at every edge.
    pub(crate) async fn run(&self, edge: &Tickets) {
        loop {
            let left_ms = left_ms(&self.now.borrow());
            tokio::time::sleep(Duration::from_millis(left_ms)).await;
            if let Err(error) = self.replace(edge).await {
                tracing::error!(%error, "session tickets keep their keys for longer than they should");
                tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
            }
        }
    }

    /// Kept before they are used: a ticket must not need a key that a restart has lost.
    async fn replace(&self, edge: &Tickets) -> anyhow::Result<()> {
        let next = self.now.borrow().rotated(unix_ms())?;
        self.keep(&next).await?;
        edge.replace(&next);
        self.told.send_replace(secret(&next));
        self.now.send_replace(next);
        tracing::info!("session tickets have a new key");
        Ok(())
    }

    async fn keep(&self, keys: &TicketKeys) -> anyhow::Result<()> {
        let sealed = self.seal.seal(RECORD, &keys.to_bytes())?;
        self.vault.commit(vec![Write::put(RECORD, sealed, Expected::Anything)]).await?;
        Ok(())
    }
}

/// Tickets of an edge that is given its keys before it serves.
///
/// # Errors
/// The system has no random bytes.
pub(crate) fn to_come() -> anyhow::Result<Tickets> {
    Ok(Tickets::new(&TicketKeys::generate(unix_ms())?))
}

/// Keys that cannot be read are no reason not to start: clients make a whole handshake once.
fn read(seal: &SealKey, bytes: &[u8]) -> Option<TicketKeys> {
    let opened = seal.open(RECORD, bytes).map_err(|error| error.to_string());
    let keys = opened.and_then(|bytes| TicketKeys::from_bytes(&bytes).map_err(|error| error.to_string()));
    keys.inspect_err(
        |error| tracing::error!(%error, "the keys of session tickets cannot be read: new ones are made"),
    )
    .ok()
}

fn secret(keys: &TicketKeys) -> Secret {
    Secret::new(keys.to_bytes())
}

/// How long until the newest of them is to be replaced, in milliseconds: never longer than a key's life, whatever the clock did.
pub(crate) fn left_ms(keys: &TicketKeys) -> u64 {
    let age_ms = unix_ms().saturating_sub(keys.made_at_ms());
    TICKET_KEY_LIFE_MS.saturating_sub(age_ms)
}

/// Unix time in milliseconds: keys outlive the process.
pub(crate) fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use peregrine_certs::MemoryVault;

    use super::*;

    /// The clock of the runtime goes ahead by itself while everybody sleeps: eight hours are over at once.
    #[tokio::test(start_paused = true)]
    async fn keys_are_replaced_in_time_kept_sealed_and_told_and_a_restart_begins_with_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let key_file = folder.path().join("key");
        let vault = Arc::new(MemoryVault::new());
        let keys = InstallationKeys::open(Arc::clone(&vault) as _, &key_file).await.expect("keys");
        let first = keys.told().borrow().clone();
        assert_eq!(TicketKeys::from_bytes(first.bytes()).map(|keys| keys.to_bytes().len()), Ok(56));
        let (edge, mut told) = (to_come().expect("random bytes"), keys.told());
        let begun = tokio::time::Instant::now();
        tokio::select! {
            () = keys.run(&edge) => {}
            changed = told.changed() => changed.expect("they are there"),
        }
        let waited_ms = u64::try_from(begun.elapsed().as_millis()).expect("hours");
        assert!(waited_ms.abs_diff(TICKET_KEY_LIFE_MS) < 60_000, "after {waited_ms} ms");
        let second = told.borrow().clone();
        assert!(
            second.bytes().len() == 112 && second.bytes().ends_with(first.bytes()),
            "the one before still opens"
        );
        let record = vault.get(RECORD).await.expect("a vault").expect("a record");
        assert!(
            !record.bytes.windows(16).any(|part| second.bytes().windows(16).any(|key| key == part)),
            "sealed"
        );
        let again = InstallationKeys::open(vault as _, &key_file).await.expect("keys");
        assert_eq!(again.told().borrow().bytes(), second.bytes());
    }
}
