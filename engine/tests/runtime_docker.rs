//! The Docker runtime on two real engines, which these tests start for themselves: this test binary is also the
//! program in their image.

mod docker_support;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use docker_support::{
    DEADLINE, Daemon, INSTALL, OnFirst, PORT, TLS_PORT, allowed, allowing, answer_of, ask, docker, engines,
    eventually, forwarder, image, on_first, playing, ports::free_port, program, runtime, spec,
};
use futures_util::StreamExt;
use peregrine_engine::model::{DockerEndpoint, InstanceId, MachineKind, MachineSpec, TlsFiles};
use peregrine_engine::runtime::local_engines::{LocalEngines, LocalEnginesError, LocalEnginesOptions};
use peregrine_engine::runtime::{
    InstanceSpec, LogOptions, Run, Runtime, RuntimeError, connect, transfer_image,
};

#[tokio::test]
async fn a_container_listens_where_it_says_and_is_gone_after_its_removal() {
    let Some(engines) = engines().await else { return };
    let first = engines.engines.first();
    let runtime = runtime(first);
    let info = runtime.info().await.unwrap();
    assert!(info.version.starts_with("Docker ") && info.version.contains("API 1."), "{info:?}");
    let spec = spec(first, &engines.image.id);
    let address = runtime.ensure(&spec).await.unwrap();
    assert_eq!(address.ip(), first.address);
    let answer = answer_of(address).await;
    assert_eq!(answer["env.PORT"], PORT.to_string());
    let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
    assert_eq!((status.running, status.address, status.restarts), (true, Some(address), 0));
    assert_eq!((status.service.as_str(), status.epoch), (spec.service.as_str(), 1));
    assert!(runtime.list(INSTALL).await.unwrap().contains(&status));
    assert!(runtime.list("another installation").await.unwrap().is_empty());
    let stats = runtime.stats(&spec.id).await.unwrap();
    assert!(stats.memory_bytes > 100_000 && stats.pids >= 1 && stats.cpu_seconds > 0.0, "{stats:?}");

    runtime.remove(&spec.id, 1_000).await.unwrap();
    assert!(ask(address).is_none());
    assert!(runtime.inspect(&spec.id).await.unwrap().is_none());
    assert_eq!(docker(first, &["ps", "-aq", "--filter", &format!("name={}", spec.id)]), "");
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn a_container_is_confined_and_limited_and_may_still_listen_on_port_80() {
    let Some(OnFirst { engines, runtime, spec }) = on_first().await else { return };
    let first = engines.engines.first();
    let address = runtime.ensure(&spec).await.unwrap();
    let answer = answer_of(address).await;
    for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(answer[&format!("status.{set}")], "0000000000000000", "{set}");
    }
    assert_eq!(answer["status.NoNewPrivs"], "1");
    assert!(answer["first"].contains("init"), "no init process: {}", answer["first"]);
    let seen = docker(first, &["inspect", spec.id.as_str()]);
    let seen: serde_json::Value = serde_json::from_str(&seen).unwrap();
    let host = &seen[0]["HostConfig"];
    assert_eq!(host["Memory"], 128 << 20);
    assert_eq!(host["MemorySwap"], 128 << 20);
    assert_eq!(host["NanoCpus"], 500_000_000);
    assert_eq!(host["PidsLimit"], 64);
    assert_eq!(host["RestartPolicy"]["Name"], "unless-stopped");
    assert_eq!(host["LogConfig"]["Config"]["max-size"], "10m");
    let labels = &seen[0]["Config"]["Labels"];
    assert_eq!(labels["peregrine.install"], INSTALL);
    assert_eq!(labels["peregrine.service"], spec.service);
    assert_eq!(labels["peregrine.instance"], spec.id.as_str());
    assert_eq!(labels["peregrine.version"], "1");
    assert_eq!(labels["peregrine.epoch"], "1");
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn an_image_that_changes_user_runs_only_with_the_capabilities_for_it_and_has_no_other() {
    let Some(OnFirst { engines: _engines, runtime, spec }) = on_first().await else { return };
    let spec = playing("serve_as_nobody", spec);
    let error = failure_of(&*runtime, &spec).await;
    assert!(matches!(&error, RuntimeError::Exited { code: Some(4), .. }), "{error}");
    runtime.remove(&spec.id, 1_000).await.unwrap();
    let spec = allowing(&["SETGID", "SETUID"], spec);
    let answer = answer_of(runtime.ensure(&spec).await.unwrap()).await;
    let nobody = program::NOBODY.to_string();
    assert!(answer["status.Uid"].split_whitespace().all(|id| id == nobody), "{}", answer["status.Uid"]);
    assert_eq!(answer["status.CapBnd"], "00000000000000c0", "CAP_SETGID is bit 6, CAP_SETUID bit 7");
    assert_eq!(answer["status.CapEff"], "0000000000000000", "what changes the user has none left");
    assert_eq!(answer["status.NoNewPrivs"], "1");
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

/// Why an instance that goes on failing does not start, whether the first attempt or a later one sees it.
async fn failure_of(runtime: &dyn Runtime, spec: &InstanceSpec) -> RuntimeError {
    let started = Instant::now();
    loop {
        match runtime.ensure(spec).await {
            Err(error) => return error,
            Ok(_) => assert!(started.elapsed() < DEADLINE, "it never fails"),
        }
    }
}

#[tokio::test]
async fn a_container_that_runs_is_left_alone_by_a_second_ensure() {
    let Some(OnFirst { engines, runtime, spec }) = on_first().await else { return };
    let first = engines.engines.first();
    let (one, two) = tokio::join!(runtime.ensure(&spec), runtime.ensure(&spec));
    let address = one.unwrap();
    assert_eq!(two.unwrap(), address);
    let pid = || docker(first, &["inspect", "-f", "{{.State.Pid}}", spec.id.as_str()]);
    let before = pid();
    assert_eq!(runtime.ensure(&spec).await.unwrap(), address);
    assert_eq!(pid(), before);
    let (one, two) = tokio::join!(runtime.remove(&spec.id, 1_000), runtime.remove(&spec.id, 1_000));
    one.unwrap();
    two.unwrap();
}

#[tokio::test]
async fn a_container_that_was_stopped_or_never_started_is_started() {
    let Some(OnFirst { engines, runtime, spec }) = on_first().await else { return };
    let first = engines.engines.first();
    let address = runtime.ensure(&spec).await.unwrap();
    answer_of(address).await;
    docker(first, &["kill", spec.id.as_str()]);
    let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
    assert_eq!((status.running, status.address, status.exit_code), (false, None, Some(137)));
    let address = runtime.ensure(&spec).await.unwrap();
    answer_of(address).await;
    runtime.remove(&spec.id, 1_000).await.unwrap();

    // As if we had been killed between making it and starting it.
    let label = |name: &str, value: &str| format!("--label=peregrine.{name}={value}");
    let made = [
        "create",
        "--name",
        spec.id.as_str(),
        &label("install", INSTALL),
        &label("service", &spec.service),
        &label("instance", spec.id.as_str()),
        &label("epoch", "1"),
        &label("port", "80"),
        "--env=PORT=80",
        &format!("--publish={}::80", first.address),
        &engines.image.id,
    ];
    docker(first, &made);
    let address = runtime.ensure(&spec).await.unwrap();
    answer_of(address).await;
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn a_crashed_container_comes_back_by_itself_and_inspect_knows_its_new_address() {
    let Some(OnFirst { engines, runtime, spec }) = on_first().await else { return };
    let first = engines.engines.first();
    answer_of(runtime.ensure(&spec).await.unwrap()).await;
    let pid = docker(first, &["inspect", "-f", "{{.State.Pid}}", spec.id.as_str()]);
    let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    eventually("it is back", || async {
        let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
        status.running && status.restarts == 1 && status.address.is_some_and(|address| ask(address).is_some())
    })
    .await;
    runtime.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn a_container_that_ends_at_once_is_reported_with_its_last_output() {
    let Some(OnFirst { engines: _engines, runtime, spec }) = on_first().await else { return };
    let spec = playing("fail", spec);
    let error = failure_of(&*runtime, &spec).await;
    let RuntimeError::Exited { code, last_output, .. } = &error else { panic!("{error}") };
    assert_eq!(*code, Some(3));
    assert!(last_output.contains("cannot find the thing"), "{last_output}");
    runtime.remove(&spec.id, 1_000).await.unwrap();
    assert!(runtime.inspect(&spec.id).await.unwrap().is_none());
}

#[tokio::test]
async fn a_container_that_takes_too_much_memory_is_ended_and_that_is_said() {
    let Some(OnFirst { engines: _engines, runtime, spec }) = on_first().await else { return };
    let spec = playing("devour", spec);
    drop(runtime.ensure(&spec).await); // it may have ended before anybody looks, or not
    eventually("the reason of its end", || async {
        let status = runtime.inspect(&spec.id).await.unwrap().unwrap();
        status.out_of_memory && !status.running && status.ending().contains("more memory than its limit")
    })
    .await;
    runtime.remove(&spec.id, 0).await.unwrap();
}

#[tokio::test]
async fn an_older_controller_makes_and_starts_nothing() {
    let Some(OnFirst { engines: _engines, runtime, spec }) = on_first().await else { return };
    let mut newer = playing("hang", spec);
    newer.epoch = 5;
    runtime.ensure(&newer).await.unwrap();
    let mut older = newer.clone();
    older.id = InstanceId::generate();
    older.epoch = 4;
    let error = runtime.ensure(&older).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Fenced { ours: 4, theirs: 5, .. }), "{error}");
    assert!(runtime.inspect(&older.id).await.unwrap().is_none());
    runtime.remove(&newer.id, 0).await.unwrap();
}

#[tokio::test]
async fn somebody_elses_container_is_never_touched() {
    let Some(OnFirst { engines, runtime, spec }) = on_first().await else { return };
    let first = engines.engines.first();
    docker(first, &["create", "--name", spec.id.as_str(), &engines.image.id]);
    let error = runtime.ensure(&spec).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Refused { .. }), "{error}");
    let error = runtime.remove(&spec.id, 0).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Refused { .. }), "{error}");
    assert!(runtime.inspect(&spec.id).await.unwrap().is_none(), "it is no instance");
    docker(first, &["rm", spec.id.as_str()]);
}

#[tokio::test]
async fn what_cannot_be_run_is_refused_with_the_engines_reason() {
    let Some(engines) = engines().await else { return };
    let first = engines.engines.first();
    let runtime = runtime(first);
    let none = spec(first, &format!("sha256:{}", "0".repeat(64)));
    let error = runtime.ensure(&none).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::NoImage { .. }), "{error}");
    let mut elsewhere = spec(first, &engines.image.id);
    elsewhere.publish = [192, 0, 2, 1].into();
    let error = runtime.ensure(&elsewhere).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
    runtime.remove(&elsewhere.id, 0).await.unwrap();
    let mut process = none;
    process.run = Run::Process { command: vec!["true".to_owned()], directory: None };
    assert!(matches!(runtime.ensure(&process).await, Err(RuntimeError::Unsupported(_))));
    for reference in ["", "no such", "a?b", "../../containers/json", "a\nb"] {
        assert!(runtime.image(reference).await.is_err(), "{reference:?}");
    }
}

#[tokio::test]
async fn output_is_told_apart_followed_and_cut_as_asked() {
    let Some(OnFirst { engines: _engines, runtime, spec }) = on_first().await else { return };
    let address = runtime.ensure(&spec).await.unwrap();
    answer_of(address).await;
    let mut follow = runtime.logs(&spec.id, LogOptions { follow: true, ..LogOptions::default() });
    let mut next = async |text: &str| loop {
        let line = tokio::time::timeout(DEADLINE, follow.next()).await.unwrap().unwrap().unwrap();
        if line.text == text {
            break line;
        }
    };
    let asked = next("asked").await;
    assert!(asked.at > 1_600_000_000_000 && !asked.stderr);
    answer_of(address).await;
    let again = next("asked").await;
    assert!(again.at >= asked.at);
    let all: Vec<_> = runtime.logs(&spec.id, LogOptions::default()).map(Result::unwrap).collect().await;
    let find = |text: &str| all.iter().find(|line| line.text.ends_with(text)).unwrap(); // the harness prints before it
    assert!(find("to stderr").stderr && !find("to stdout").stderr);
    let tail = LogOptions { tail: Some(1), ..LogOptions::default() };
    let tail: Vec<_> = runtime.logs(&spec.id, tail).map(Result::unwrap).collect().await;
    // A line of the last request may have come since all of them were read.
    let after: Vec<_> = runtime.logs(&spec.id, LogOptions::default()).map(Result::unwrap).collect().await;
    assert_eq!(tail.len(), 1);
    let at = after.iter().rposition(|line| *line == tail[0]);
    assert!(at >= Some(all.len() - 1), "{tail:?} is not at the end of {after:?}");
    let since = LogOptions { since: Some(again.at), ..LogOptions::default() };
    let since: Vec<_> = runtime.logs(&spec.id, since).map(Result::unwrap).collect().await;
    assert!(!since.is_empty() && since.len() < all.len() && since.iter().all(|line| line.at >= again.at));
    runtime.remove(&spec.id, 1_000).await.unwrap();
    let rest = tokio::time::timeout(DEADLINE, follow.collect::<Vec<_>>()).await;
    assert!(rest.is_ok(), "the stream does not end with its container");
    let gone = runtime.logs(&spec.id, LogOptions::default()).next().await;
    assert!(matches!(gone, Some(Err(_))));
}

#[tokio::test]
async fn an_image_without_a_registry_is_streamed_to_the_target_and_runs_there() {
    let Some(engines) = engines().await else { return };
    let (first, second) = (engines.engines.first(), engines.engines.second());
    let (source, target) = (runtime(first), runtime(second));
    let image = image::packed();
    let known = source.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
    assert_eq!((known.id.as_str(), known.exposed_ports.as_slice()), (image.id.as_str(), &[PORT][..]));
    assert!(target.image(&image.id).await.unwrap().is_none());
    let told = Mutex::new(Vec::new());
    let progress = |done, total| told.lock().unwrap().push((done, total));
    let brought = transfer_image(Some(&*source), &*target, &image.id, &[], &progress).await.unwrap();
    assert_eq!(brought.id, image.id);
    let (done, total) = *told.lock().unwrap().last().unwrap();
    assert!(done > 1_000_000 && total.is_some_and(|total| total >= done), "{done} {total:?}");

    told.lock().unwrap().clear();
    transfer_image(Some(&*source), &*target, &image.id, &[], &progress).await.unwrap();
    assert!(told.lock().unwrap().is_empty(), "it is there already");
    let spec = spec(second, &image.id);
    let address = target.ensure(&spec).await.unwrap();
    assert_eq!(address.ip(), second.address);
    answer_of(address).await;
    target.remove(&spec.id, 1_000).await.unwrap();
}

#[tokio::test]
async fn an_image_that_cannot_be_had_says_every_way_that_was_tried() {
    let Some(engines) = engines().await else { return };
    let (source, target) = (runtime(engines.engines.first()), runtime(engines.engines.second()));
    let digest = format!("127.0.0.1:9/shop@sha256:{}", "0".repeat(64));
    let missing = format!("sha256:{}", "1".repeat(64));
    let error =
        transfer_image(Some(&*source), &*target, &missing, std::slice::from_ref(&digest), &|_, _| {}).await;
    let error = error.unwrap_err();
    let RuntimeError::NoImage { detail, .. } = &error else { panic!("{error}") };
    assert!(detail.contains(&digest) && detail.contains("the source does not have it"), "{detail}");
}

#[tokio::test]
async fn a_stream_that_breaks_off_leaves_no_image_and_names_the_source() {
    let Some(engines) = engines().await else { return };
    let target = runtime(engines.engines.second());
    let image = image::packed();
    let broken = image.stream().take(3).chain(futures_util::stream::once(async {
        Err(RuntimeError::Unreachable { machine: "the source".to_owned(), detail: "cable cut".to_owned() })
    }));
    let error = target.import(&image.id, broken.boxed(), &|_, _| {}).await.unwrap_err();
    assert!(error.to_string().contains("cable cut"), "{error}");
    assert!(target.image(&image.id).await.unwrap().is_none());
}

#[tokio::test]
async fn an_image_in_a_registry_is_pulled_by_digest() {
    let Some(engines) = engines().await else { return };
    let second = engines.engines.second();
    let missing = !Path::new("/usr/bin/docker-registry").exists();
    if !allowed(missing.then(|| "docker-registry is not installed".to_owned())) {
        return;
    }
    // On the loopback of the engine's own namespace: engines take that for a registry without TLS.
    let port = 5000;
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("registry.yml");
    let text = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        dir.path().join("data").display()
    );
    std::fs::write(&config, text).unwrap();
    let namespace = second.namespace.as_ref().unwrap();
    let _registry = Daemon(
        Command::new("nsenter")
            .arg(format!("--net=/var/run/netns/{namespace}"))
            .args(["docker-registry", "serve"])
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let target = runtime(second);
    let image = image::packed();
    target.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
    let name = format!("127.0.0.1:{port}/shop:1");
    docker(second, &["tag", &image.id, &name]);
    eventually("the registry takes it", || async {
        let socket = format!("unix://{}", second.socket.display());
        let push = Command::new("docker").args(["-H", &socket, "push", "-q", &name]).output();
        push.unwrap().status.success()
    })
    .await;
    let known = target.image(&name).await.unwrap().unwrap();
    let [digest] = &known.repo_digests[..] else { panic!("{known:?}") };
    docker(second, &["rmi", &name]);
    assert!(target.image(&image.id).await.unwrap().is_none());
    let told = Mutex::new(0);
    let progress = |done, _| *told.lock().unwrap() = done;
    let brought =
        transfer_image(None, &*target, &image.id, std::slice::from_ref(digest), &progress).await.unwrap();
    assert_eq!(brought.id, image.id);
    assert!(*told.lock().unwrap() > 100_000);
    let error = target.pull(&format!("127.0.0.1:{port}/shop:2"), &|_, _| {}).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::NoImage { .. }), "{error}");
}

fn machine(endpoint: DockerEndpoint, address: std::net::IpAddr) -> MachineSpec {
    MachineSpec {
        name: "far".to_owned(),
        kind: MachineKind::Docker { endpoint },
        address,
        labels: std::collections::BTreeMap::new(),
    }
}

#[tokio::test]
async fn an_engine_is_reached_over_mutual_tls_and_only_with_the_right_certificates() {
    let Some(engines) = engines().await else { return };
    let (second, files) = (engines.engines.second(), &engines.certificates);
    let near = forwarder(SocketAddr::new(second.address, TLS_PORT)).await;
    let over = |ca: &Path, cert: &Path, key: &Path| {
        let tls = Some(TlsFiles { ca: ca.to_owned(), cert: cert.to_owned(), key: key.to_owned() });
        let endpoint =
            DockerEndpoint::Tcp { host: "localhost".to_owned(), port: near.port(), tls, insecure: false };
        connect(&machine(endpoint, second.address), Path::new("/nowhere")).unwrap()
    };
    let good = over(&files.ca, &files.client, &files.client_key);
    let image = image::packed();
    good.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
    let spec = spec(second, &image.id);
    answer_of(good.ensure(&spec).await.unwrap()).await;
    good.remove(&spec.id, 1_000).await.unwrap();

    let other_engine = over(&files.other_ca, &files.client, &files.client_key);
    let error = other_engine.info().await.unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Unreachable { .. }) && error.to_string().contains("TLS"),
        "{error}"
    );
    let other_client = over(&files.ca, &files.other_client, &files.other_client_key);
    let error = other_client.info().await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Unreachable { .. }), "{error}");
    let no_file = over(&files.ca, Path::new("/no/such/cert.pem"), &files.client_key);
    let error = no_file.info().await.unwrap_err();
    assert!(error.to_string().contains("/no/such/cert.pem"), "{error}");
}

struct Sshd {
    _daemon: Daemon,
    port: u16,
    dir: tempfile::TempDir,
}

impl Sshd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["host", "other", "client"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.path().join(name))
                .status();
            assert!(made.unwrap().success());
        }
        std::fs::copy(dir.path().join("client.pub"), dir.path().join("authorized")).unwrap();
        std::fs::create_dir_all("/run/sshd").unwrap(); // sshd refuses to start without
        let port = free_port();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\n\
             UsePAM no\nPidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
            path("host"),
            path("authorized")
        );
        std::fs::write(dir.path().join("config"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(dir.path().join("config"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { _daemon: Daemon(child), port, dir }
    }

    fn endpoint(&self, host_key: &str, socket: &Path) -> DockerEndpoint {
        let host_key = std::fs::read_to_string(self.dir.path().join(host_key)).unwrap();
        DockerEndpoint::Ssh {
            host: "127.0.0.1".to_owned(),
            port: self.port,
            user: "root".to_owned(),
            key: self.dir.path().join("client"),
            host_key,
            socket: socket.to_owned(),
        }
    }

    /// Processes that serve a connection.
    fn sessions(&self) -> Vec<i32> {
        let listener = self._daemon.0.id().to_string();
        let children = std::fs::read_to_string(format!("/proc/{listener}/task/{listener}/children"));
        children.unwrap().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }
}

#[tokio::test]
async fn an_engine_is_reached_over_ssh_by_one_session_that_is_made_anew_when_it_breaks() {
    let Some(engines) = engines().await else { return };
    let missing = !Path::new("/usr/sbin/sshd").exists();
    if !allowed(missing.then(|| "openssh-server is not installed".to_owned())) {
        return;
    }
    let first = engines.engines.first();
    let sshd = Sshd::start();
    let far = machine(sshd.endpoint("host.pub", &first.socket), first.address);
    let far = connect(&far, Path::new("/nowhere")).unwrap();
    eventually("sshd is up", || async { far.info().await.is_ok() }).await;
    let spec = spec(first, &engines.image.id);
    answer_of(far.ensure(&spec).await.unwrap()).await;
    let sessions = sshd.sessions();
    assert_eq!(sessions.len(), 1, "many connections, one session");
    let pid = rustix::process::Pid::from_raw(sessions[0]).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert!(far.inspect(&spec.id).await.unwrap().unwrap().running);
    assert!(!sshd.sessions().contains(&sessions[0]));
    // An image goes through a channel as well.
    let image = image::packed();
    far.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
    far.remove(&spec.id, 1_000).await.unwrap();

    let other = machine(sshd.endpoint("other.pub", &first.socket), first.address);
    let error = connect(&other, Path::new("/nowhere")).unwrap().info().await.unwrap_err();
    let shown = Command::new("ssh-keygen").arg("-lf").arg(sshd.dir.path().join("host.pub")).output();
    let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
    let fingerprint = shown.split_whitespace().nth(1).unwrap();
    assert!(error.to_string().contains(fingerprint), "{error}");
    assert!(matches!(&error, RuntimeError::Unreachable { .. }), "{error}");

    let no_socket = machine(sshd.endpoint("host.pub", Path::new("/no/such.sock")), first.address);
    let error = connect(&no_socket, Path::new("/nowhere")).unwrap().info().await.unwrap_err();
    assert!(error.to_string().contains("/no/such.sock"), "{error}");
    std::fs::write(sshd.dir.path().join("authorized"), "").unwrap();
    let stranger = machine(sshd.endpoint("host.pub", &first.socket), first.address);
    let error = connect(&stranger, Path::new("/nowhere")).unwrap().info().await.unwrap_err();
    assert!(error.to_string().contains("authorized_keys"), "{error}");
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_unreachable_and_is_found_when_it_comes() {
    let Some(engines) = engines().await else { return };
    let first = engines.engines.first();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("docker.sock");
    let endpoint = DockerEndpoint::Unix { path: socket.clone() };
    let runtime = connect(&machine(endpoint, first.address), dir.path()).unwrap();
    let error = runtime.list(INSTALL).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("docker.sock"), "{error}");
    std::os::unix::fs::symlink(&first.socket, &socket).unwrap();
    runtime.list(INSTALL).await.unwrap();
    std::fs::remove_file(&socket).unwrap();
    assert!(runtime.list(INSTALL).await.is_err());
}

#[test]
fn an_endpoint_that_cannot_be_used_is_refused_before_anything_is_dialled() {
    let clear =
        DockerEndpoint::Tcp { host: "203.0.113.5".to_owned(), port: 2375, tls: None, insecure: false };
    let address = [203, 0, 113, 5].into();
    let error = connect(&machine(clear, address), Path::new("/nowhere")).err().unwrap();
    assert!(matches!(&error, RuntimeError::Refused { .. }) && error.to_string().contains("TLS"), "{error}");
}

/// Has two engines and a container on one of them, until it is killed.
#[test]
#[ignore = "played as a program by a test"]
fn owner_of_engines() {
    let Some(dir) = std::env::var_os("OWNER_DIR") else { return };
    let work = async {
        let engines = LocalEngines::start(Path::new(&dir), &own_engines()).await.unwrap();
        let image = image::packed();
        let runtime = runtime(engines.first());
        runtime.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
        runtime.ensure(&playing("hang", spec(engines.first(), &image.id))).await.unwrap();
        println!("\nUP {}", namespaces(&engines).join(" "));
        std::future::pending::<()>().await;
    };
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(work);
}

fn own_engines() -> LocalEnginesOptions {
    LocalEnginesOptions { running: None, ..LocalEnginesOptions::default() }
}

fn namespaces(engines: &LocalEngines) -> Vec<String> {
    [engines.first(), engines.second()].map(|engine| engine.namespace.clone().unwrap()).to_vec()
}

#[tokio::test]
async fn two_local_engines_leave_nothing_behind_not_even_after_a_kill() {
    if !allowed(LocalEngines::check().err().map(|error| error.to_string())) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["owner_of_engines", "--exact", "--ignored", "--nocapture"])
        .env("OWNER_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(owner.stdout.take().unwrap()).lines().map(Result::unwrap);
    let names: Vec<String> = said
        .filter_map(|line| Some(line.strip_prefix("UP ")?.split(' ').map(str::to_owned).collect()))
        .next()
        .unwrap();
    assert!(names.len() == 2 && names.iter().all(|name| Path::new("/var/run/netns").join(name).exists()));
    let in_use = LocalEngines::start(dir.path(), &own_engines()).await.unwrap_err();
    assert!(matches!(&in_use, LocalEnginesError::InUse(_)), "{in_use}");
    owner.kill().unwrap();
    owner.wait().unwrap();

    let engines = LocalEngines::start(dir.path(), &own_engines()).await.unwrap();
    assert_gone(&names);
    let names = namespaces(&engines);
    engines.stop().await.unwrap();
    assert_gone(&names);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_start_that_is_given_up_at_any_moment_leaves_nothing_behind() {
    if !allowed(LocalEngines::check().err().map(|error| error.to_string())) {
        return;
    }
    for given_up_after_ms in [0, 5, 15, 40, 100, 250] {
        let dir = tempfile::tempdir().unwrap();
        let options = own_engines();
        let start = LocalEngines::start(dir.path(), &options);
        // The moment is what this is about.
        let given_up = tokio::time::timeout(Duration::from_millis(given_up_after_ms), start).await;
        drop(given_up);
        let left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "after {given_up_after_ms} ms: {left:?}");
    }
}

#[tokio::test]
async fn an_engine_without_an_init_process_runs_containers_all_the_same() {
    if !allowed(LocalEngines::check().err().map(|error| error.to_string())) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut options = own_engines();
    options.dockerd_arguments.push("--init-path=docker-init-that-is-not-there".to_owned());
    let engines = LocalEngines::start(dir.path(), &options).await.unwrap();
    let runtime = runtime(engines.first());
    let image = image::packed();
    runtime.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
    let spec = spec(engines.first(), &image.id);
    let answer = answer_of(runtime.ensure(&spec).await.unwrap()).await;
    assert!(!answer["first"].contains("init"), "process 1 is {}", answer["first"]);
    engines.stop().await.unwrap();
}

fn assert_gone(names: &[String]) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    for name in names {
        let link = name.replacen("prg-", "prg", 1).replace('-', "");
        assert!(!Path::new("/var/run/netns").join(name).exists(), "namespace {name}");
        assert!(!Path::new("/sys/class/net").join(&link).exists(), "link {link}");
        assert!(!Path::new("/run").join(name).exists(), "folder of {name}");
        assert!(!mounts.contains(name.as_str()), "mounts of {name}");
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            assert!(!command.contains(name.as_str()), "process {:?}: {command}", entry.file_name());
        }
    }
}

#[tokio::test]
async fn sigterm_reaches_the_program_so_that_no_grace_is_waited_for() {
    let Some(OnFirst { engines: _engines, runtime, spec }) = on_first().await else { return };
    let spec = playing("hang", spec);
    runtime.ensure(&spec).await.unwrap();
    let started = Instant::now();
    runtime.remove(&spec.id, 60_000).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(30), "SIGTERM reaches it through the init process");
    assert!(runtime.inspect(&spec.id).await.unwrap().is_none());
}
