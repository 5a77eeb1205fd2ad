//! Looking at the machines before a plan is made.

use std::sync::Arc;
use std::time::Duration;

use crate::core::Core;
use crate::handle::Ask;
use crate::model::{Finding, MachineKind};
use crate::plan::{ImageSeen, MachineSeen, Observations, image_wanted, machines_of_interest};
use crate::runtime::Runtime;

/// Longest time that a machine may take to answer; a plan is made for people who wait for it.
pub(super) const ANSWER_LIMIT_MS: u64 = 5_000;

/// Asks every machine that matters, all at once.
pub(super) async fn observe(core: &Arc<Core>, ask: &Ask) -> Observations {
    let state = core.state();
    let wanted = image_wanted(&state, ask);
    let mut asked = tokio::task::JoinSet::new();
    for name in machines_of_interest(&state, ask) {
        let Some(runtime) = core.runtime(&name) else { continue };
        let docker =
            matches!(state.machines.get(&name).map(|m| &m.spec.kind), Some(MachineKind::Docker { .. }));
        let image = wanted.clone().filter(|_| docker);
        asked.spawn(async move {
            let seen = look(&name, &*runtime, image.as_deref()).await;
            (name, seen)
        });
    }
    drop(state);
    let mut seen = Observations::default();
    while let Some(Ok((name, machine))) = asked.join_next().await {
        seen.machines.insert(name, machine);
    }
    seen
}

async fn look(name: &str, runtime: &dyn Runtime, image: Option<&str>) -> MachineSeen {
    let looked = async {
        let info = runtime.info().await.map_err(|error| Finding::from(&error))?;
        let image = match image {
            None => ImageSeen::Unknown,
            Some(image) => match runtime.image(image).await {
                Ok(Some(found)) => ImageSeen::Present(found),
                Ok(None) => ImageSeen::Missing,
                Err(_) => ImageSeen::Unknown,
            },
        };
        Ok((info, image))
    };
    match tokio::time::timeout(Duration::from_millis(ANSWER_LIMIT_MS), looked).await {
        Ok(Ok((info, image))) => MachineSeen { info: Ok(info), image },
        Ok(Err(problem)) => MachineSeen { info: Err(problem), image: ImageSeen::Unknown },
        Err(_) => MachineSeen { info: Err(no_answer(name)), image: ImageSeen::Unknown },
    }
}

pub(super) fn no_answer(name: &str) -> Finding {
    Finding {
        code: "machine.unreachable".to_owned(),
        message: format!("{name} does not answer within {ANSWER_LIMIT_MS} ms"),
        hint: "Check that the machine is up and its engine runs: peregrine machines check.".to_owned(),
    }
}
