//! Debian's knot: a DNS server that takes signed updates.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::server::free_address;
use super::wait_for;

/// Name of the key that may update the zone, and the key in base64.
pub(crate) const KEY: (&str, &str) = ("acme", "YSBzaGFyZWQga2V5IG9mIHRoaXJ0eS10d28gYnl0ZXM=");

/// It serves `example.com`, where every name leads here.
pub(crate) struct Knot {
    child: Child,
    pub(crate) address: SocketAddr,
    folder: tempfile::TempDir,
}

impl Drop for Knot {
    fn drop(&mut self) {
        let _killed = self.child.kill();
        let _gone = self.child.wait();
    }
}

impl Knot {
    /// `None` where it is not installed, which is a failure where `PEREGRINE_REQUIRE_PEBBLE=1` says so.
    pub(crate) fn start() -> Option<Self> {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let folders =
            std::env::split_paths(&paths).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
        let Some(program) = folders.map(|folder| folder.join("knotd")).find(|path| path.is_file()) else {
            let required = std::env::var_os("PEREGRINE_REQUIRE_PEBBLE").is_some_and(|value| value == "1");
            assert!(!required, "knot is not installed: scripts/setup test installs it");
            eprintln!("skipped: knot is not installed (scripts/setup test installs it)");
            return None;
        };
        let (folder, address) = (tempfile::tempdir().expect("a folder"), free_address());
        let dir = folder.path().display();
        let zone = "$ORIGIN example.com.\n$TTL 5\n@ SOA ns admin 1 60 60 60 5\n@ NS ns\nns A 127.0.0.1\n* A 127.0.0.1\n";
        std::fs::write(folder.path().join("zone"), zone).expect("is written");
        let config = format!(
            "server:\n    listen: 127.0.0.1@{port}\n    rundir: {dir}\n    pidfile: {dir}/pid\n\
             database:\n    storage: {dir}\n\
             log:\n  - target: stderr\n    any: info\n\
             key:\n  - id: {key}\n    algorithm: hmac-sha256\n    secret: {secret}\n\
             acl:\n  - id: updates\n    key: {key}\n    action: update\n\
             zone:\n  - domain: example.com\n    storage: {dir}\n    file: zone\n    acl: updates\n    zonefile-sync: -1\n",
            port = address.port(),
            key = KEY.0,
            secret = KEY.1,
        );
        let path = folder.path().join("knot.conf");
        std::fs::write(&path, config).expect("is written");
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        let child = Command::new(program)
            .arg("-c")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("knotd starts");
        let started = Self { child, address, folder };
        wait_for("knot to start", || started.log().contains("server started").then_some(()));
        Some(started)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}
