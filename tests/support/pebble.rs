//! An authority of our own: Debian's `pebble`, with its DNS server that leads every name here.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use super::ports::free_port;
use super::server::free_address;
use super::wait_for;

/// An account that this authority gives out beside ACME: the name of a key, and the key in base64.
pub(crate) const EXTERNAL: (&str, &str) =
    ("kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W");

pub(crate) struct Pebble {
    children: Vec<Child>,
    address: SocketAddr,
    /// Where names are asked for.
    pub(crate) dns: SocketAddr,
    folder: tempfile::TempDir,
}

impl Drop for Pebble {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _killed = child.kill();
            let _gone = child.wait();
        }
    }
}

impl Pebble {
    /// Starts both; names are validated at these addresses' ports. Half of all nonces are refused. `None` where it is not
    /// installed, which is a failure where `PEREGRINE_REQUIRE_PEBBLE=1` says so.
    pub(crate) fn start(http: SocketAddr, https: SocketAddr) -> Option<Self> {
        Self::start_with(http, https, None)
    }

    /// As [`Self::start`]; it asks that server for names, and takes nobody without an account of [`EXTERNAL`].
    pub(crate) fn start_asking(http: SocketAddr, https: SocketAddr, dns: SocketAddr) -> Option<Self> {
        Self::start_with(http, https, Some(dns))
    }

    fn start_with(http: SocketAddr, https: SocketAddr, asked: Option<SocketAddr>) -> Option<Self> {
        if Command::new("pebble")
            .arg("-version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_err()
        {
            let required = std::env::var_os("PEREGRINE_REQUIRE_PEBBLE").is_some_and(|value| value == "1");
            assert!(!required, "pebble is not installed: scripts/setup test installs it");
            eprintln!("skipped: pebble is not installed (scripts/setup test installs it)");
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        let file = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("is written");
            path
        };
        let certificate = file("cert.pem", made.cert.pem());
        let key = file("key.pem", made.signing_key.serialize_pem());
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("is its owner's");
        let (address, management) = (free_address(), free_address());
        let dns = asked.unwrap_or_else(free_address);
        let config = serde_json::json!({ "pebble": {
            "listenAddress": address.to_string(),
            "managementListenAddress": management.to_string(),
            "certificate": certificate,
            "privateKey": key,
            "httpPort": http.port(),
            "tlsPort": https.port(),
            "ocspResponderURL": "",
            "externalAccountBindingRequired": asked.is_some(),
            "externalAccountMACKeys": { EXTERNAL.0: EXTERNAL.1 },
        }});
        let config = file("config.json", config.to_string());
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        let mut names = Command::new("pebble-challtestsrv");
        names
            .args(["-defaultIPv6", "", "-http01", "", "-https01", "", "-tlsalpn01", ""])
            .args(["-dns01", &dns.to_string(), "-management", &format!("127.0.0.1:{}", free_port())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let names = asked.is_none().then(|| names.spawn().expect("pebble-challtestsrv starts"));
        let authority = Command::new("pebble")
            .arg("-config")
            .arg(config)
            .args(["-dnsserver", &dns.to_string()])
            .env("PEBBLE_VA_NOSLEEP", "1")
            .env("PEBBLE_AUTHZREUSE", "0")
            .env("PEBBLE_WFE_NONCEREJECT", "50")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("pebble starts");
        wait_for("pebble to listen", || std::net::TcpStream::connect(address).ok());
        let children = names.into_iter().chain([authority]).collect();
        Some(Self { children, address, dns, folder })
    }

    /// What `[acme]` has to say for it.
    pub(crate) fn configuration(&self) -> String {
        format!(
            "[acme]\nagree_to_terms = true\ndirectory = \"https://{}/dir\"\ntrust = \"{}\"\nresolvers = [\"{}\"]\n\
             addresses = [\"127.0.0.1\"]\n",
            self.address,
            self.folder.path().join("cert.pem").display(),
            self.dns,
        )
    }

    /// Certificates that it has issued.
    pub(crate) fn issued(&self) -> usize {
        let log = std::fs::read_to_string(self.folder.path().join("log")).expect("its log");
        log.lines().filter(|line| line.contains("Issued certificate serial")).count()
    }
}
