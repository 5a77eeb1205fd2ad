//! Bodies of requests: whatever comes, it is read or refused. What is taken is written and read again the same, and
//! turning it into the engine's form, secrets kept back, never crashes either.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peregrine_api::request::parse;
use peregrine_api::types::{
    DeployRequest, MachineSpec, MoveRequest, RollbackRequest, ScaleRequest, ServiceSpec,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|body: &[u8]| {
    taken_is_the_same_again::<MoveRequest>(body);
    taken_is_the_same_again::<RollbackRequest>(body);
    taken_is_the_same_again::<ScaleRequest>(body);
    if let Some(machine) = taken_is_the_same_again::<MachineSpec>(body)
        && let Ok(spec) = machine.to_engine()
    {
        assert_eq!(MachineSpec::from(&spec), machine);
    }
    let service = taken_is_the_same_again::<ServiceSpec>(body)
        .or_else(|| taken_is_the_same_again::<DeployRequest>(body).and_then(|deploy| deploy.service));
    if let Some(service) = service
        && let Ok(spec) = service.to_engine(None)
    {
        assert_eq!(ServiceSpec::with_values(&spec), service);
        let shown = ServiceSpec::redacted(&spec);
        assert_eq!(shown.to_engine(Some(&spec)).as_ref(), Ok(&spec), "read and put back");
    }
});

fn taken_is_the_same_again<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(body: &[u8]) -> Option<T> {
    let taken: T = match parse(body) {
        Ok(taken) => taken,
        Err(refused) => {
            assert!(!refused.detail.is_empty() && refused.code.status >= 400);
            return None;
        }
    };
    let written = serde_json::to_vec(&taken).expect("a body that was read can be written");
    assert_eq!(parse::<T>(&written).expect("and read again"), taken);
    Some(taken)
}
