//! Debian's knot, a real DNS server that takes signed updates.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};

use super::ports::free_port;

pub(crate) const KEY: &[u8] = b"a shared key of thirty-two bytes";

pub(crate) struct Knot {
    child: Child,
    pub(crate) address: SocketAddr,
    folder: tempfile::TempDir,
}

impl Drop for Knot {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

impl Knot {
    /// Serves `example.com`, where every name has the address 127.0.0.1, and takes updates with the key `acme`.
    pub(crate) fn start(program: &PathBuf) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let dir = folder.path().display().to_string();
        let zone = "$ORIGIN example.com.\n$TTL 5\n@ SOA ns admin 1 60 60 60 5\n@ NS ns\nns A 127.0.0.1\n* A 127.0.0.1\n";
        std::fs::write(folder.path().join("zone"), zone).unwrap();
        let secret = data_encoding::BASE64.encode(KEY);
        let config = format!(
            "server:\n    listen: 127.0.0.1@{port}\n    rundir: {dir}\n    pidfile: {dir}/pid\n\
             database:\n    storage: {dir}\n\
             log:\n  - target: stderr\n    any: info\n\
             key:\n  - id: acme\n    algorithm: hmac-sha256\n    secret: {secret}\n\
             acl:\n  - id: updates\n    key: acme\n    action: update\n\
             zone:\n  - domain: example.com\n    storage: {dir}\n    file: zone\n    acl: updates\n    zonefile-sync: -1\n",
            port = address.port(),
        );
        let path = folder.path().join("knot.conf");
        std::fs::write(&path, config).unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new(program)
            .arg("-c")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("knotd starts");
        let mut started = Self { child, address, folder };
        started.wait();
        started
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.log().contains("server started") {
            assert!(self.child.try_wait().expect("its state").is_none(), "knotd ended: {}", self.log());
            assert!(Instant::now() < deadline, "knotd does not start: {}", self.log());
            std::thread::yield_now();
        }
    }

    /// How many TXT records a name has.
    pub(crate) async fn texts(&self, name: &str) -> usize {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(format!("{name}.")).unwrap(), RecordType::TXT));
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&message.to_vec().unwrap(), self.address).await.unwrap();
        let mut answer = [0; 4096];
        let length = socket.recv(&mut answer).await.unwrap();
        Message::from_vec(&answer[..length]).unwrap().answers.len()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}
