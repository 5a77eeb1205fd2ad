//! A script of domains and challenges, and of names that clients ask for, by the index and by a model that searches a list from
//! end to end.
//!
//! A line each: `domain PATTERN N`, `no PATTERN`, `http TOKEN NAME`, `tls NAME N`, `done TOKEN`, `ask NAME [TOKEN]`. Everything
//! else is passed over.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use peregrine_routing::{
    CertificateId, Change, ChallengeAnswer, ChallengeId, ChallengeSpec, DomainPolicy, DomainSpec, HostPattern,
    TableReader, TableWriter, canonical_host, table,
};

/// Longer scripts only take longer.
const MAX_LINES: usize = 200;

fuzz_target!(|data: &[u8]| {
    let script = String::from_utf8_lossy(data);
    let (writer, reader) = table();
    let mut run = Run { writer, reader, model: Model::default() };
    for line in script.lines().take(MAX_LINES) {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        match (words.next(), words.next(), words.next()) {
            (Some("domain"), Some(pattern), number) => run.domain(pattern, number),
            (Some("no"), Some(pattern), None) => run.no(pattern),
            (Some("http"), Some(token), Some(name)) => run.http(token, name),
            (Some("tls"), Some(name), number) => run.tls(name, number),
            (Some("done"), Some(id), None) => run.done(id),
            (Some("ask"), Some(name), token) => run.ask(name, token.unwrap_or_default()),
            _ => {}
        }
    }
});

#[derive(Default)]
struct Model {
    /// By pattern as it is shown.
    domains: BTreeMap<String, u8>,
    /// By token: the name.
    http: BTreeMap<String, String>,
    /// By name.
    tls: BTreeMap<String, u8>,
}

struct Run {
    writer: TableWriter,
    reader: TableReader,
    model: Model,
}

impl Run {
    fn apply(&mut self, change: Change) {
        self.writer.apply(&[change]).expect("domains are never in each other's way");
    }

    fn domain(&mut self, pattern: &str, number: Option<&str>) {
        let Ok(name) = HostPattern::parse(pattern) else { return };
        let number = number.map_or(0, |text| text.len() as u8);
        self.model.domains.insert(name.to_string(), number);
        let certificate = Some(CertificateId([number; 32]));
        self.apply(Change::PutDomain(DomainSpec { name, certificate, staple: None, policy: DomainPolicy::default() }));
    }

    fn no(&mut self, pattern: &str) {
        let Ok(name) = HostPattern::parse(pattern) else { return };
        self.model.domains.remove(&name.to_string());
        self.apply(Change::RemoveDomain(name));
    }

    fn http(&mut self, token: &str, name: &str) {
        self.model.http.insert(token.to_owned(), name.to_owned());
        let answer = ChallengeAnswer::Http01 { token: token.into(), key_authorization: token.into() };
        self.apply(Change::PutChallenge(ChallengeSpec { name: name.into(), answer }));
    }

    fn tls(&mut self, name: &str, number: Option<&str>) {
        let number = number.map_or(0, |text| text.len() as u8);
        self.model.tls.insert(name.to_owned(), number);
        let answer = ChallengeAnswer::TlsAlpn01 { digest: [number; 32] };
        self.apply(Change::PutChallenge(ChallengeSpec { name: name.into(), answer }));
    }

    fn done(&mut self, id: &str) {
        self.model.http.remove(id);
        self.model.tls.remove(id);
        self.apply(Change::RemoveChallenge(ChallengeId::Http01(id.into())));
        self.apply(Change::RemoveChallenge(ChallengeId::TlsAlpn01(id.into())));
    }

    fn ask(&mut self, name: &str, token: &str) {
        let table = self.reader.load();
        let domains = table.domains();
        if let Ok(host) = canonical_host(name) {
            let found = domains.get(&host).and_then(|domain| domain.certificate).map(|id| id.0[0]);
            let above = host.split_once('.').and_then(|(_, above)| self.model.domains.get(&format!("*.{above}")));
            assert_eq!(found, self.model.domains.get(&*host).or(above).copied(), "{host}");
        }
        let fallback = domains.fallback().and_then(|domain| domain.certificate).map(|id| id.0[0]);
        assert_eq!(fallback, self.model.domains.get("*").copied());
        let answered = domains.http_challenge(name, token).is_some();
        assert_eq!(answered, self.model.http.get(token).is_some_and(|owner| owner == name));
        assert_eq!(domains.tls_challenge(name).map(|digest| digest[0]), self.model.tls.get(name).copied());
        let mut all = 0;
        domains.for_each(|_| all += 1);
        assert_eq!(all, self.model.domains.len());
    }
}
