//! Ids: a kind, an underscore and a UUIDv7, so that they sort by time and say what they name.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// A new id, later than every one before it on this machine.
            #[must_use]
            pub fn generate() -> Self {
                Self::of(Uuid::now_v7())
            }

            /// The id that a UUID makes.
            #[must_use]
            pub fn of(uuid: Uuid) -> Self {
                Self(format!(concat!($prefix, "_{}"), uuid.simple()))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A rollout: deploy, move, rollback, scale or failover.
    RolloutId,
    "mov"
);
id!(
    /// One running copy of a service.
    InstanceId,
    "ins"
);
