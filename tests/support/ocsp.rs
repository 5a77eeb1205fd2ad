//! A responder for certificates: `openssl ocsp`, as a peer that is not ours.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::ports::free_port;

/// It answers for one authority, out of a list that may be changed while it runs.
pub(crate) struct Responder {
    /// With what it says, which somebody has to hear.
    child: Option<(Child, BufReader<ChildStdout>)>,
    port: u16,
    folder: tempfile::TempDir,
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some((child, _)) = &mut self.child {
            let _killed = child.kill();
            let _gone = child.wait();
        }
    }
}

impl Responder {
    /// One that does not answer yet: certificates that name it can be made.
    pub(crate) fn new() -> Self {
        Self { child: None, port: free_port(), folder: tempfile::tempdir().expect("a folder") }
    }

    /// What certificates call it.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// Whether certificates with these serial numbers (upper case hexadecimal digits) are good (or revoked).
    pub(crate) fn knows(&self, certificates: &[(&str, bool)]) {
        let line = |(serial, is_good): &(&str, bool)| match is_good {
            true => format!("V\t491231235959Z\t\t{serial}\tunknown\t/CN=good\n"),
            false => format!("R\t491231235959Z\t260102030405Z\t{serial}\tunknown\t/CN=revoked\n"),
        };
        let (index, beside) = (self.folder.path().join("index"), self.folder.path().join("index.new"));
        std::fs::write(&beside, certificates.iter().map(line).collect::<String>()).expect("is written");
        // Another file: that is how it notices.
        std::fs::rename(beside, index).expect("is put in its place");
        if self.child.is_some() {
            // It looks before it waits for the next question, so that one is still answered out of the list before: this one. It has to
            // be a proper one, or the responder ends.
            let asked = Command::new("openssl")
                .args(["ocsp", "-noverify", "-url", &self.url(), "-issuer"])
                .arg(self.folder.path().join("ca.pem"))
                .args(["-serial", "1"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            assert!(asked.is_ok_and(|asked| asked.success()), "it answers");
        }
    }

    /// Answers from now on, in the name of this authority; an answer holds for `days`.
    pub(crate) fn start(&mut self, authority_pem: &str, key_pem: &str, days: u32) {
        let file = |name: &str, text: &str| {
            let path = self.folder.path().join(name);
            std::fs::write(&path, text).expect("is written");
            path
        };
        let (authority, key) = (file("ca.pem", authority_pem), file("ca.key", key_pem));
        let mut child = Command::new("openssl")
            .args(["ocsp", "-port", &self.port.to_string(), "-ndays", &days.to_string(), "-index"])
            .arg(self.folder.path().join("index"))
            .arg("-CA")
            .arg(&authority)
            .arg("-rsigner")
            .arg(&authority)
            .arg("-rkey")
            .arg(key)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl is installed: scripts/setup test");
        let (mut said, mut line) = (BufReader::new(child.stdout.take().expect("is piped")), String::new());
        said.read_line(&mut line).expect("it speaks");
        assert!(line.starts_with("ACCEPT"), "it listens: {line:?}");
        self.child = Some((child, said));
    }
}
