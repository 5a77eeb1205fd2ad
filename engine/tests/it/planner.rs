//! The planner: pure, so each blocker is shown on a state made by hand.

use std::collections::BTreeMap;

use peregrine_engine::model::{
    DockerEndpoint, Finding, HealthKind, Instance, InstanceId, InstanceState, Machine, MachineKind, Plan,
    RolloutId, RolloutKind, Route, Service, ServiceSpec, Step, Version, Workload,
};
use peregrine_engine::plan::{ImageSeen, MachineSeen, Observations, Outcome, plan};
use peregrine_engine::runtime::RuntimeInfo;
use peregrine_engine::{Ask, EngineError, ErrorKind, MoveOverrides, State};

use crate::support::runtime::image_info;
use crate::support::{machine, move_to, shop, shop_image, shop_version};

fn docker(name: &str) -> Machine {
    let mut spec = machine(name);
    spec.kind = MachineKind::Docker { endpoint: DockerEndpoint::Unix { path: "/run/docker.sock".into() } };
    Machine { spec, added_at: 1, from_config: false }
}

fn process(name: &str) -> Machine {
    Machine { spec: machine(name), added_at: 1, from_config: false }
}

fn image_shop() -> ServiceSpec {
    shop_image("shop:1")
}

fn service(spec: &ServiceSpec, version: u32, previous: Option<u32>) -> Service {
    Service {
        spec: spec.clone(),
        version: Some(version),
        previous_version: previous,
        last_version: version,
        epoch: 1,
        rollout: None,
        from_config: false,
        fixed_generations: BTreeMap::new(),
        created_at: 1,
    }
}

fn version(spec: &ServiceSpec, number: u32, digest: Option<&str>) -> Version {
    Version {
        service: spec.name.clone(),
        number,
        workload: spec.workload.clone(),
        digest: digest.map(str::to_owned),
        health: spec.health.clone(),
        resources: spec.resources.clone(),
        created_at: 1,
        rollout: RolloutId("mov_1".to_owned()),
    }
}

fn copy(id: &str, spec: &ServiceSpec, number: u32, machine: &str) -> Instance {
    Instance {
        id: InstanceId(id.to_owned()),
        service: spec.name.clone(),
        version: number,
        machine: machine.to_owned(),
        epoch: 1,
        rollout: RolloutId("mov_1".to_owned()),
        address: Some(([127, 0, 0, 1], 4000).into()),
        generation: 1,
        former: Vec::new(),
        state: InstanceState::Serving,
        created_at: 1,
    }
}

/// The shop with version 1 on `host-a`.
fn state_of(spec: &ServiceSpec, machines: Vec<Machine>) -> State {
    let mut state = State::default();
    for machine in machines {
        state.machines.insert(machine.spec.name.clone(), machine);
    }
    state.services.insert(spec.name.clone(), service(spec, 1, None));
    state.versions.insert((spec.name.clone(), 1), version(spec, 1, None).into());
    state.instances.insert(InstanceId("ins_1".to_owned()), copy("ins_1", spec, 1, "host-a"));
    state
}

fn processes() -> Vec<Machine> {
    vec![process("host-a"), process("host-b")]
}

fn dockers() -> Vec<Machine> {
    vec![docker("host-a"), docker("host-b")]
}

fn up(image: ImageSeen) -> MachineSeen {
    let info =
        RuntimeInfo { version: "1".to_owned(), architecture: "amd64".to_owned(), os: "linux".to_owned() };
    MachineSeen { info: Ok(info), image }
}

fn all_up(state: &State) -> Observations {
    Observations {
        machines: state.machines.keys().map(|name| (name.clone(), up(ImageSeen::Unknown))).collect(),
    }
}

fn try_plan(state: &State, ask: &Ask, seen: &Observations) -> Result<Outcome, EngineError> {
    let mut next = 0;
    plan(state, ask, seen, &mut || {
        next += 1;
        InstanceId(format!("ins_new_{next}"))
    })
}

fn planned(state: &State, ask: &Ask, seen: &Observations) -> Plan {
    match try_plan(state, ask, seen) {
        Ok(Outcome::Rollout(planned)) => planned.plan,
        other => panic!("no rollout: {other:?}"),
    }
}

fn codes(findings: &[Finding]) -> Vec<&str> {
    findings.iter().map(|finding| finding.code.as_str()).collect()
}

fn blockers(state: &State, ask: &Ask) -> Vec<String> {
    let plan = planned(state, ask, &all_up(state));
    assert!(plan.blockers.iter().all(|finding| !finding.hint.is_empty() && !finding.message.is_empty()));
    codes(&plan.blockers).into_iter().map(str::to_owned).collect()
}

fn deploy(spec: ServiceSpec, machine: Option<&str>) -> Ask {
    Ask::Deploy {
        spec: Box::new(spec),
        machine: machine.map(str::to_owned),
        overrides: MoveOverrides::default(),
    }
}

#[test]
fn a_move_has_its_steps_in_order_and_no_blockers() {
    let state = state_of(&shop(), processes());
    let plan = planned(&state, &move_to("host-b"), &all_up(&state));
    let new = InstanceId("ins_new_1".to_owned());
    let mut expected = vec![Step::Claim, Step::Start { instance: new }, Step::Warm];
    expected.extend([1, 10, 50, 100].map(|percent| Step::Shift { percent }));
    expected.extend([Step::Drain, Step::Release { instance: InstanceId("ins_1".to_owned()) }]);
    assert_eq!(plan.steps, expected);
    assert_eq!((plan.kind, plan.from_version, plan.to_version), (RolloutKind::Move, Some(1), 1));
    assert!(plan.blockers.is_empty());
    assert!(plan.estimate.duration_ms <= 3_000 && plan.estimate.pause_ms == 0);
}

#[test]
fn an_image_is_prepared_once_for_each_machine_and_a_soak_is_a_step_only_if_asked_for() {
    let state = state_of(&image_shop(), dockers());
    let mut ask = move_to("host-b");
    if let Ask::Move { overrides, .. } = &mut ask {
        overrides.soak_ms = Some(5);
    }
    let mut seen = all_up(&state);
    seen.machines.insert("host-a".to_owned(), up(ImageSeen::Present(image_info("sha256:1"))));
    seen.machines.insert("host-b".to_owned(), up(ImageSeen::Missing));
    let plan = planned(&state, &ask, &seen);
    assert!(plan.steps.contains(&Step::Prepare { machine: "host-b".to_owned() }));
    assert!(plan.steps.contains(&Step::Soak));
    assert_eq!(plan.estimate.transfer_bytes, Some(1_000));
    assert!(plan.blockers.is_empty());
}

#[test]
fn an_unknown_machine_blocks() {
    assert_eq!(blockers(&state_of(&shop(), processes()), &move_to("host-c")), ["machine.unknown"]);
}

#[test]
fn an_unreachable_machine_blocks() {
    let state = state_of(&shop(), processes());
    let mut seen = all_up(&state);
    let silent =
        Finding { code: "machine.unreachable".to_owned(), message: "no".to_owned(), hint: "look".to_owned() };
    seen.machines.insert("host-b".to_owned(), MachineSeen { info: Err(silent), image: ImageSeen::Unknown });
    assert_eq!(codes(&planned(&state, &move_to("host-b"), &seen).blockers), ["machine.unreachable"]);
}

#[test]
fn an_image_on_a_process_machine_and_a_command_on_a_docker_machine_block() {
    let images = state_of(&image_shop(), vec![docker("host-a"), process("host-b")]);
    assert_eq!(blockers(&images, &move_to("host-b")), ["machine.needs_docker"]);
    let commands = state_of(&shop(), vec![process("host-a"), docker("host-b")]);
    assert_eq!(blockers(&commands, &move_to("host-b")), ["machine.needs_process"]);
}

#[test]
fn an_image_for_another_architecture_blocks() {
    let state = state_of(&image_shop(), dockers());
    let mut seen = all_up(&state);
    let mut image = image_info("sha256:1");
    image.architecture = "arm64".to_owned();
    seen.machines.insert("host-a".to_owned(), up(ImageSeen::Present(image)));
    assert_eq!(codes(&planned(&state, &move_to("host-b"), &seen).blockers), ["image.architecture"]);
}

#[test]
fn an_image_that_is_known_by_digest_and_is_nowhere_blocks() {
    let mut state = state_of(&image_shop(), dockers());
    state.versions.insert(("shop".to_owned(), 1), version(&image_shop(), 1, Some("sha256:1")).into());
    let mut seen = all_up(&state);
    for seen in seen.machines.values_mut() {
        seen.image = ImageSeen::Missing;
    }
    assert_eq!(codes(&planned(&state, &move_to("host-b"), &seen).blockers), ["image.missing"]);
}

#[test]
fn the_same_place_blocks() {
    assert_eq!(blockers(&state_of(&shop(), processes()), &move_to("host-a")), ["move.same_place"]);
}

#[test]
fn a_machine_to_leave_without_a_copy_on_it_blocks() {
    let state = state_of(&shop(), processes());
    let ask = Ask::Move {
        service: "shop".to_owned(),
        to: "host-b".to_owned(),
        from: Some("host-b".to_owned()),
        overrides: MoveOverrides::default(),
    };
    assert_eq!(blockers(&state, &ask), ["move.nothing_there"]);
}

#[test]
fn a_service_that_is_being_changed_is_a_conflict_with_the_running_rollout() {
    let mut state = state_of(&shop(), processes());
    let running = RolloutId("mov_7".to_owned());
    state.services.get_mut("shop").expect("it is there").rollout = Some(running.clone());
    let error = try_plan(&state, &move_to("host-b"), &all_up(&state)).expect_err("one at a time");
    assert_eq!((error.kind, error.rollout), (ErrorKind::Conflict, Some(running)));
}

#[test]
fn nothing_to_roll_back_to_and_an_unknown_version_block() {
    let state = state_of(&shop(), processes());
    let back = |to_version| Ask::Rollback { service: "shop".to_owned(), to_version };
    assert_eq!(blockers(&state, &back(None)), ["rollback.nothing"]);
    assert_eq!(blockers(&state, &back(Some(9))), ["rollback.unknown_version"]);
    assert_eq!(blockers(&state, &back(Some(1))), ["rollback.same_version"]);
}

#[test]
fn a_rollback_is_a_rollout_to_the_version_before_in_the_same_places() {
    let mut state = state_of(&shop(), processes());
    let second = shop_version("two");
    state.services.insert("shop".to_owned(), service(&second, 2, Some(1)));
    state.versions.insert(("shop".to_owned(), 2), version(&second, 2, None).into());
    state.instances.get_mut(&InstanceId("ins_1".to_owned())).expect("it is there").version = 2;
    let plan =
        planned(&state, &Ask::Rollback { service: "shop".to_owned(), to_version: None }, &all_up(&state));
    assert_eq!((plan.kind, plan.from_version, plan.to_version), (RolloutKind::Rollback, Some(2), 1));
    assert_eq!((plan.add[0].machine.as_str(), plan.add[0].version), ("host-a", 1));
}

#[test]
fn scaling_to_the_same_number_or_to_none_blocks_and_down_retires_the_newest() {
    let mut state = state_of(&shop(), processes());
    let scale = |replicas| Ask::Scale { service: "shop".to_owned(), replicas, machine: None };
    assert_eq!(blockers(&state, &scale(1)), ["scale.same"]);
    assert_eq!(blockers(&state, &scale(0)), ["scale.out_of_range"]);
    state.instances.insert(InstanceId("ins_2".to_owned()), copy("ins_2", &shop(), 1, "host-b"));
    let plan = planned(&state, &scale(1), &all_up(&state));
    assert_eq!(plan.retire, [InstanceId("ins_2".to_owned())]);
    assert_eq!(
        plan.steps,
        [Step::Claim, Step::Drain, Step::Release { instance: InstanceId("ins_2".to_owned()) }]
    );
}

#[test]
fn a_route_of_another_service_blocks_even_while_it_is_only_on_its_way() {
    let mut state = state_of(&shop(), processes());
    let mut other = shop();
    other.name = "books".to_owned();
    assert_eq!(blockers(&state, &deploy(other.clone(), Some("host-a"))), ["route.taken"]);
    // The shop is about to take another host.
    other.routes = vec![Route { host: "new.test".to_owned(), path: "/".to_owned() }];
    let mut after = shop();
    after.routes = other.routes.clone();
    state.changes.insert(
        RolloutId("mov_2".to_owned()),
        peregrine_engine::journal::ServiceChange {
            before: Some(Box::new(shop())),
            version_before: Some(1),
            previous_before: None,
            after: Some(Box::new(after)),
        },
    );
    assert_eq!(blockers(&state, &deploy(other, Some("host-a"))), ["route.taken"]);
}

#[test]
fn a_first_deploy_needs_a_machine_unless_only_one_fits() {
    let mut state = State::default();
    let ask = deploy(shop(), None);
    assert_eq!(blockers(&state, &ask), ["machine.not_named"]);
    for machine in [process("host-a"), docker("host-d")] {
        state.machines.insert(machine.spec.name.clone(), machine);
    }
    let plan = planned(&state, &ask, &all_up(&state));
    assert_eq!(plan.add[0].machine, "host-a");
    assert_eq!(
        plan.steps.iter().filter(|step| matches!(step, Step::Shift { .. })).count(),
        1,
        "nothing to compare with"
    );
    state.machines.insert("host-b".to_owned(), process("host-b"));
    assert_eq!(blockers(&state, &ask), ["machine.not_named"]);
}

#[test]
fn fixed_upstreams_need_no_rollout_and_cannot_be_moved() {
    let mut spec = shop();
    let upstream = peregrine_engine::model::FixedUpstream { address: "10.0.0.5:8080".to_owned(), weight: 1 };
    spec.workload = Workload::Fixed { upstreams: vec![upstream] };
    let mut state = State::default();
    let outcome = try_plan(&state, &deploy(spec.clone(), None), &Observations::default());
    assert!(matches!(outcome, Ok(Outcome::Settings(_))), "{outcome:?}");
    state.services.insert("shop".to_owned(), service(&spec, 1, None));
    let error = try_plan(&state, &move_to("host-b"), &Observations::default()).expect_err("nothing to move");
    assert_eq!((error.kind, error.code), (ErrorKind::Invalid, "workload.fixed"));
}

#[test]
fn a_service_cannot_turn_from_fixed_upstreams_into_copies_under_way() {
    let state = state_of(&shop(), processes());
    let mut spec = shop();
    spec.workload = Workload::Fixed { upstreams: Vec::new() };
    assert_eq!(blockers(&state, &deploy(spec, None)), ["workload.kind_changed"]);
}

#[test]
fn the_same_workload_with_other_settings_is_no_rollout() {
    let state = state_of(&shop(), processes());
    let mut spec = shop();
    spec.traffic.preserve_host = false;
    assert!(matches!(try_plan(&state, &deploy(spec, None), &all_up(&state)), Ok(Outcome::Settings(_))));
    let changed = planned(&state, &deploy(shop_version("two"), None), &all_up(&state));
    assert_eq!((changed.to_version, changed.retire.len()), (2, 1));
    let elsewhere = planned(&state, &deploy(shop(), Some("host-b")), &all_up(&state));
    assert_eq!((elsewhere.to_version, elsewhere.add[0].machine.as_str()), (1, "host-b"));
    let mut more = shop();
    more.replicas = 2;
    let more = planned(&state, &deploy(more, None), &all_up(&state));
    assert_eq!((more.keep.len(), more.add.len(), more.retire.len()), (1, 1, 0));
}

#[test]
fn what_cannot_be_meant_is_refused_with_the_place() {
    type Change = fn(&mut ServiceSpec);
    let cases: [(&str, Change); 6] = [
        ("DNS label", |spec| spec.name = "Shop!".to_owned()),
        ("replicas", |spec| spec.replicas = 0),
        ("steps", |spec| spec.move_settings.steps = vec![50, 10]),
        ("steps", |spec| spec.move_settings.steps = vec![0, 100]),
        ("host", |spec| spec.routes[0].host = "shop.test:80".to_owned()),
        ("command", |spec| {
            spec.workload = Workload::Command { command: Vec::new(), directory: None, env: BTreeMap::new() };
        }),
    ];
    for (word, change) in cases {
        let mut spec = shop();
        change(&mut spec);
        let error =
            try_plan(&State::default(), &deploy(spec, None), &Observations::default()).expect_err(word);
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains(word) && !error.hint.is_empty(), "{}", error.message);
    }
}

#[test]
fn an_unknown_service_is_not_found() {
    let error =
        try_plan(&State::default(), &move_to("host-b"), &Observations::default()).expect_err("unknown");
    assert_eq!((error.kind, error.code), (ErrorKind::NotFound, "service.unknown"));
}

#[test]
fn weak_spots_are_warnings() {
    let mut spec = shop();
    spec.health.kind = HealthKind::Tcp;
    spec.routes.clear();
    let state = state_of(&spec, processes());
    let plan = planned(&state, &move_to("host-b"), &all_up(&state));
    assert_eq!(codes(&plan.warnings), ["health.no_path", "replicas.single", "route.none"]);
    let state = state_of(&image_shop(), dockers());
    let second = shop_image("shop:2");
    let plan = planned(&state, &deploy(second, None), &all_up(&state));
    assert!(codes(&plan.warnings).contains(&"image.to_be_pulled"), "{:?}", plan.warnings);
}

#[test]
fn the_hash_is_of_the_ask_and_the_state_and_not_of_the_ids() {
    let state = state_of(&shop(), processes());
    let seen = all_up(&state);
    let one = planned(&state, &move_to("host-b"), &seen);
    let Ok(Outcome::Rollout(two)) = plan(&state, &move_to("host-b"), &seen, &mut InstanceId::generate) else {
        panic!("a rollout")
    };
    assert_ne!(one.add[0].id, two.plan.add[0].id);
    assert_eq!(one.hash, two.plan.hash);
    let mut slower = move_to("host-b");
    if let Ask::Move { overrides, .. } = &mut slower {
        overrides.soak_ms = Some(1);
    }
    assert_ne!(one.hash, planned(&state, &slower, &seen).hash);
}
