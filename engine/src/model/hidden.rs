//! What `Debug` shows of things that may be secret: that they are there, never what they are.

use std::collections::BTreeMap;
use std::fmt;

/// Environment variables: their names, and `…` for their values.
pub(crate) struct HiddenValues<'a>(pub(crate) &'a BTreeMap<String, String>);

impl fmt::Debug for HiddenValues<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.keys().map(|name| (name, format_args!("…")))).finish()
    }
}

/// A record as it is stored: its length. It may hold a service with its environment.
pub(crate) struct HiddenBytes(pub(crate) usize);

impl fmt::Debug for HiddenBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "… ({} bytes)", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;

    use crate::model::{HealthSpec, Resources, RolloutId, Version, Workload};
    use crate::runtime::{InstanceSpec, Run};
    use crate::store::{Batch, Committed, Entry, Precondition, Write};

    const SECRET: &str = "hunter2";

    fn assert_hidden(shown: &str) {
        assert!(!shown.contains(SECRET), "{shown}");
        assert!(shown.contains('…'), "{shown}");
    }

    fn workloads() -> [Workload; 2] {
        let env = || [("PASSWORD".to_owned(), SECRET.to_owned())].into();
        [
            Workload::Image {
                image: "shop:1".to_owned(),
                port: 80,
                command: None,
                env: env(),
                capabilities: BTreeSet::new(),
            },
            Workload::Command { command: vec!["shop".to_owned()], directory: None, env: env() },
        ]
    }

    #[test]
    fn a_workload_shows_the_names_of_its_environment_and_hides_the_values() {
        for workload in workloads() {
            let shown = format!("{workload:?} {workload:#?}");
            assert_hidden(&shown);
            assert!(shown.contains("PASSWORD"), "{shown}");
        }
    }

    #[test]
    fn whatever_holds_a_workload_hides_the_values_too() {
        for workload in workloads() {
            let version = Version {
                service: "shop".to_owned(),
                number: 1,
                workload,
                digest: None,
                health: HealthSpec::default(),
                resources: Resources::default(),
                created_at: 0,
                rollout: RolloutId::generate(),
            };
            assert_hidden(&format!("{version:?}"));
        }
    }

    #[test]
    fn what_a_runtime_is_told_hides_the_values() {
        let spec = InstanceSpec {
            install: "i".to_owned(),
            id: crate::model::InstanceId::generate(),
            service: "shop".to_owned(),
            version: 1,
            epoch: 1,
            run: Run::Process { command: vec!["shop".to_owned()], directory: None },
            env: [("PASSWORD".to_owned(), SECRET.to_owned())].into(),
            resources: Resources::default(),
            publish: [127, 0, 0, 1].into(),
        };
        assert_hidden(&format!("{spec:?}"));
    }

    #[test]
    fn what_is_stored_shows_its_key_and_its_length_and_not_its_value() {
        let value = Bytes::from_static(SECRET.as_bytes());
        let write = Write::Put("services/shop".to_owned(), value.clone());
        let equals = Precondition::Equals("services/shop".to_owned(), value.clone());
        let batch = Batch { preconditions: vec![equals], writes: vec![write.clone()] };
        let entry = Entry { key: "services/shop".to_owned(), value, revision: 1 };
        let committed = Committed { revision: 1, writes: vec![write] };
        for shown in [format!("{batch:?}"), format!("{entry:?}"), format!("{committed:?}")] {
            assert_hidden(&shown);
            assert!(shown.contains("services/shop") && shown.contains("7 bytes"), "{shown}");
        }
    }
}
