//! The last table on an edge's disk, and the one before it.
//!
//! ```text
//!   write table.new, flush ─► keep table as table.before ─► rename table.new to table ─► flush the folder
//! ```
//!
//! A file that is torn or damaged in any way is noticed (length and SHA-256) and the one before it is used. An edge
//! that finds files and none of them whole has no table: it does not take that for an empty one.

use std::io;
use std::path::{Path, PathBuf};

use peregrine_routing::{DomainSpec, ServiceSpec};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::files;
use crate::wire::{
    BadHost, DomainOfForm4, KeptService, RulesOfForm3, WireDomain, WireProxyProtocol, WireRules,
};

const FILE: &str = "table";
const FILE_BEFORE: &str = "table.before";
/// Names the form of what follows.
const MAGIC: &[u8; 16] = b"peregrine table\x01";
/// Form of the content: the number that the link had when the two were parted. It is raised when [`KeptService`] changes,
/// and then the forms before it are read too: an edge that is brought up to another version begins with what it had.
const FORM: u16 = 5;
/// Nobody is told for whom a connection is, and nothing is stapled to certificates; nor in those before it.
const FORM_4: u16 = 4;
/// Rules say less in it.
const FORM_3: u16 = 3;
/// Without domains and rules.
const FORM_2: u16 = 2;
const CHECKSUM_BYTES: usize = 32;
/// A table of a million services is a fifth of it.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A table that was saved.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedTable {
    /// Epoch of the engine that it is from.
    pub epoch: u64,
    /// Its services.
    pub services: Vec<ServiceSpec>,
    /// What it serves over TLS. Challenges are for now only.
    pub domains: Vec<DomainSpec>,
}

/// What was found on the disk.
#[derive(Debug, PartialEq)]
pub enum Saved {
    /// Nothing: this edge has never had a table.
    Never,
    /// The last table.
    Last(SavedTable),
    /// The table before it, and what is wrong with the last one.
    Before(SavedTable, String),
    /// There are files, and none can be used. The reasons.
    Damaged(String),
}

/// Why a table could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The disk.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is beyond the limit.
    #[error("the table has {0} bytes, the limit is {MAX_FILE_BYTES}")]
    TooLarge(u64),
}

#[derive(Serialize, Deserialize)]
struct Content {
    form: u16,
    epoch: u64,
    services: Vec<KeptService>,
    domains: Vec<WireDomain>,
    /// Rules, with the number of their service above: few services have any.
    rules: Vec<(u32, WireRules)>,
    /// Services whose upstreams are told for whom a connection is: those that insist on it would serve nobody else.
    send_proxy_protocol: Vec<(u32, WireProxyProtocol)>,
}

#[derive(Serialize, Deserialize)]
struct ContentOfForm2 {
    form: u16,
    epoch: u64,
    services: Vec<KeptService>,
}

#[derive(Serialize, Deserialize)]
struct ContentOfForm3 {
    form: u16,
    epoch: u64,
    services: Vec<KeptService>,
    domains: Vec<DomainOfForm4>,
    rules: Vec<(u32, RulesOfForm3)>,
}

#[derive(Serialize, Deserialize)]
struct ContentOfForm4 {
    form: u16,
    epoch: u64,
    services: Vec<KeptService>,
    domains: Vec<DomainOfForm4>,
    rules: Vec<(u32, WireRules)>,
}

/// Reads what is there.
pub(crate) fn load(folder: &Path) -> Saved {
    match read(&folder.join(FILE)) {
        Ok(Some(table)) => Saved::Last(table),
        last => match (last, read(&folder.join(FILE_BEFORE))) {
            (Ok(None), Ok(None)) => Saved::Never,
            (Ok(None), Ok(Some(table))) => Saved::Before(table, format!("{FILE} is not there")),
            (Err(why), Ok(Some(table))) => Saved::Before(table, format!("{FILE}: {why}")),
            (Err(why), Ok(None)) => Saved::Damaged(format!("{FILE}: {why}")),
            (Ok(None), Err(why)) => Saved::Damaged(format!("{FILE_BEFORE}: {why}")),
            (Err(why), Err(before)) => Saved::Damaged(format!("{FILE}: {why}; {FILE_BEFORE}: {before}")),
            (Ok(Some(_)), _) => unreachable!("matched above"),
        },
    }
}

/// Saves a table; the one that was there is kept as the one before, unless it is damaged.
pub(crate) fn save(
    folder: &Path,
    epoch: u64,
    services: Vec<KeptService>,
    domains: Vec<WireDomain>,
) -> Result<(), SavedError> {
    let rules =
        services.iter().zip(0..).filter_map(|(service, n)| Some((n, service.rules.clone()?))).collect();
    let send_proxy_protocol =
        services.iter().zip(0..).filter_map(|(service, n)| Some((n, service.send_proxy_protocol?))).collect();
    let content = Content { form: FORM, epoch, services, domains, rules, send_proxy_protocol };
    let bytes = encode(&content);
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(SavedError::TooLarge(bytes.len() as u64));
    }
    let path = folder.join(FILE);
    // A damaged file must not take the place of the good one before it.
    let keep = read(&path).is_ok();
    let written = if keep {
        files::write_keeping(&path, &folder.join(FILE_BEFORE), &bytes)
    } else {
        files::write_whole(&path, &bytes)
    };
    written.map_err(|source| SavedError::Io { path, source })
}

fn encode(content: &Content) -> Vec<u8> {
    signed(&postcard::to_stdvec(content).expect("plain data can be written"))
}

fn signed(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + payload.len() + CHECKSUM_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(payload);
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum);
    bytes
}

fn read(path: &Path) -> Result<Option<SavedTable>, String> {
    let bytes = files::read_bounded(path, MAX_FILE_BYTES).map_err(|error| error.to_string())?;
    bytes.map(|bytes| decode(&bytes)).transpose()
}

fn decode(bytes: &[u8]) -> Result<SavedTable, String> {
    let head = MAGIC.len() + 8;
    if bytes.len() < head + CHECKSUM_BYTES {
        return Err("it ends too early".into());
    }
    let (signed, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    if Sha256::digest(signed)[..] != *checksum {
        return Err("its checksum is wrong".into());
    }
    let (magic, rest) = signed.split_at(MAGIC.len());
    let (length, payload) = rest.split_at(8);
    if magic != MAGIC || length != (payload.len() as u64).to_le_bytes() {
        return Err("it is no table of this version".into());
    }
    // The form comes first: what follows can be read only by who knows it.
    let (form, _): (u16, _) = postcard::take_from_bytes(payload).map_err(|error| error.to_string())?;
    let content: Content = match form {
        FORM => postcard::from_bytes(payload).map_err(|error| error.to_string())?,
        FORM_4 => {
            let before = postcard::from_bytes(payload).map_err(|error| error.to_string())?;
            let ContentOfForm4 { form, epoch, services, domains, rules } = before;
            Content {
                form,
                epoch,
                services,
                domains: stapled_to(domains),
                rules,
                send_proxy_protocol: Vec::new(),
            }
        }
        FORM_3 => {
            let before = postcard::from_bytes(payload).map_err(|error| error.to_string())?;
            let ContentOfForm3 { form, epoch, services, domains, rules } = before;
            let rules = rules.into_iter().map(|(n, rules)| (n, rules.into())).collect();
            Content {
                form,
                epoch,
                services,
                domains: stapled_to(domains),
                rules,
                send_proxy_protocol: Vec::new(),
            }
        }
        FORM_2 => {
            let before = postcard::from_bytes(payload).map_err(|error| error.to_string())?;
            let ContentOfForm2 { form, epoch, services } = before;
            let (domains, rules, send_proxy_protocol) = Default::default();
            Content { form, epoch, services, domains, rules, send_proxy_protocol }
        }
        _ => return Err(format!("it is of form {form}, this edge reads forms {FORM_2} to {FORM}")),
    };
    let mut services = content.services;
    for (n, rules) in content.rules {
        let service = services.get_mut(n as usize).ok_or("it has rules of no service")?;
        service.rules = Some(rules);
    }
    for (n, version) in content.send_proxy_protocol {
        let service = services.get_mut(n as usize).ok_or("it has a PROXY protocol of no service")?;
        service.send_proxy_protocol = Some(version);
    }
    let services = services.into_iter().map(|service| service.try_into());
    let services = services.collect::<Result<Vec<ServiceSpec>, _>>().map_err(|error| error.to_string())?;
    let domains = content.domains.into_iter().map(|domain| domain.try_into());
    let domains = domains.collect::<Result<Vec<DomainSpec>, BadHost>>().map_err(|error| error.to_string())?;
    Ok(SavedTable { epoch: content.epoch, services, domains })
}

/// Domains of a form that knew nothing of staples.
fn stapled_to(domains: Vec<DomainOfForm4>) -> Vec<WireDomain> {
    domains.into_iter().map(WireDomain::from).collect()
}

#[cfg(test)]
mod tests {
    use peregrine_routing::{Balance, ServicePolicy};

    use super::*;
    use crate::wire::{domain_tests, mirror_tests, rules_tests, spec_tests::service};

    fn services(count: usize) -> Vec<ServiceSpec> {
        let one = |n: usize| service(&format!("shop-{n}"), Balance::default(), ServicePolicy::default());
        (0..count).map(one).collect()
    }

    fn put(folder: &Path, epoch: u64, count: usize) {
        let services = services(count).iter().map(KeptService::from).collect();
        save(folder, epoch, services, Vec::new()).expect("it is saved");
    }

    #[test]
    fn the_last_table_and_the_one_before_it_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(load(folder.path()), Saved::Never);
        for epoch in 1..=3 {
            put(folder.path(), epoch, epoch as usize);
            let table = SavedTable { epoch, services: services(epoch as usize), domains: Vec::new() };
            assert_eq!(load(folder.path()), Saved::Last(table));
        }
        std::fs::remove_file(folder.path().join(FILE)).expect("it is there");
        let Saved::Before(table, _) = load(folder.path()) else { panic!("the one before") };
        assert_eq!(table, SavedTable { epoch: 2, services: services(2), domains: Vec::new() });
    }

    #[test]
    fn a_table_from_the_disk_mirrors_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut mirroring = services(1);
        mirroring[0].policy.mirror = Some(Box::new(mirror_tests::spec()));
        save(folder.path(), 1, mirroring.iter().map(KeptService::from).collect(), Vec::new())
            .expect("it is saved");
        assert_eq!(
            load(folder.path()),
            Saved::Last(SavedTable { epoch: 1, services: services(1), domains: Vec::new() })
        );
    }

    /// What is in `fixtures/table.2`, without the mirror that the first of them had.
    fn of_form_2() -> SavedTable {
        use peregrine_routing::{
            DrainTime, HashKey, HealthCheck, HealthCheckKind, Passive, PerClass, Sticky,
        };
        let policy = ServicePolicy {
            connect_timeout_ms: 1_001,
            response_head_timeout_ms: 1_002,
            body_idle_timeout_ms: 1_003,
            tunnel_idle_timeout_ms: 1_004,
            websocket_close_spread_ms: 1_005,
            drain: PerClass(std::array::from_fn(|n| DrainTime { close_ms: n as u64, cut_ms: 10 + n as u64 })),
            max_request_body_bytes: 1 << 40,
            max_idle_connections_per_upstream: 1_006,
            upstream_idle_timeout_ms: 1_007,
            health: Some(HealthCheck {
                kind: HealthCheckKind::Http { path: "/healthz".into(), host: Some("probe.test".into()) },
                interval_ms: 1_008,
                timeout_ms: 1_009,
                healthy_threshold: 2,
                unhealthy_threshold: 3,
            }),
            passive: Passive { consecutive_failures: 4, base_ejection_ms: 1_010, max_ejection_ms: 1_011 },
            slow_start_ms: 1_012,
            sticky: Some(Sticky { cookie: "c".into() }),
            preserve_host: false,
            ..ServicePolicy::default()
        };
        let rich = service("rich", Balance::ConsistentHash(HashKey::Header("x-user".into())), policy);
        let plain = service("plain", Balance::default(), ServicePolicy::default());
        SavedTable { epoch: 7, services: vec![rich, plain], domains: Vec::new() }
    }

    #[test]
    fn a_file_that_an_edge_wrote_before_holds_and_domains_were_known_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(FILE), include_bytes!("fixtures/table.2")).expect("it is written");
        assert_eq!(load(folder.path()), Saved::Last(of_form_2()));
        // It is kept as the one before what is saved over it.
        let services = of_form_2().services.iter().map(KeptService::from).collect();
        save(folder.path(), 8, services, Vec::new()).expect("it is saved");
        assert_eq!(load(folder.path()), Saved::Last(SavedTable { epoch: 8, ..of_form_2() }));
        std::fs::remove_file(folder.path().join(FILE)).expect("it is there");
        assert!(matches!(load(folder.path()), Saved::Before(before, _) if before == of_form_2()));
    }

    #[test]
    fn the_rules_of_services_are_on_the_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut services = services(3);
        let by = peregrine_routing::RateKey::Cookie("c".into());
        services[1].policy.rules = Some(Box::new(rules_tests::rules(by)));
        save(folder.path(), 1, services.iter().map(KeptService::from).collect(), Vec::new())
            .expect("it is saved");
        assert_eq!(load(folder.path()), Saved::Last(SavedTable { epoch: 1, services, domains: Vec::new() }));
    }

    #[test]
    fn a_file_that_an_edge_wrote_when_rules_changed_nothing_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut services = services(2);
        let (allow, deny) = (vec!["10.0.0.0/8".parse().expect("a network")], Vec::new());
        let rules = peregrine_routing::Rules { allow, deny, max_in_flight: 7, ..Default::default() };
        services[1].policy.rules = Some(Box::new(rules));
        let written: RulesOfForm3 = postcard::from_bytes(
            &postcard::to_stdvec(&(
                vec![("10.0.0.0".parse::<std::net::IpAddr>().expect("an address"), 8_u8)],
                Vec::<(std::net::IpAddr, u8)>::new(),
                7_u32,
                None::<u32>,
            ))
            .expect("bytes"),
        )
        .expect("rules");
        let content = ContentOfForm3 {
            form: FORM_3,
            epoch: 7,
            services: services.iter().map(KeptService::from).collect(),
            domains: Vec::new(),
            rules: vec![(1, written)],
        };
        let payload = postcard::to_stdvec(&content).expect("bytes");
        std::fs::write(folder.path().join(FILE), signed(&payload)).expect("it is written");
        assert_eq!(load(folder.path()), Saved::Last(SavedTable { epoch: 7, services, domains: Vec::new() }));
    }

    #[test]
    fn for_whom_connections_are_is_told_from_the_disk_too() {
        use peregrine_routing::ProxyProtocol::{V1, V2};
        let folder = tempfile::tempdir().expect("a folder");
        let mut services = services(3);
        services[0].policy.send_proxy_protocol = Some(V1);
        services[2].policy.send_proxy_protocol = Some(V2);
        save(folder.path(), 1, services.iter().map(KeptService::from).collect(), Vec::new())
            .expect("it is saved");
        let table = SavedTable { epoch: 1, services, domains: Vec::new() };
        assert_eq!(load(folder.path()), Saved::Last(table));
    }

    #[test]
    fn a_file_that_an_edge_wrote_before_anything_was_stapled_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut domain = domain_tests::domain("example.com");
        let (by, mut services) = (peregrine_routing::RateKey::Cookie("c".into()), services(2));
        services[1].policy.rules = Some(Box::new(rules_tests::rules(by)));
        let kept: Vec<KeptService> = services.iter().map(KeptService::from).collect();
        let content = ContentOfForm4 {
            form: FORM_4,
            epoch: 7,
            domains: vec![domain_tests::of_form_4(&domain)],
            rules: vec![(1, kept[1].rules.clone().expect("it has some"))],
            services: kept,
        };
        let payload = postcard::to_stdvec(&content).expect("bytes");
        std::fs::write(folder.path().join(FILE), signed(&payload)).expect("it is written");
        domain.staple = None;
        let table = SavedTable { epoch: 7, services, domains: vec![domain] };
        assert_eq!(load(folder.path()), Saved::Last(table));
    }

    #[test]
    fn what_is_served_over_tls_is_on_the_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let domains = vec![domain_tests::domain("example.com"), domain_tests::domain("*.example.com")];
        let kept = domains.iter().map(WireDomain::from).collect();
        save(folder.path(), 1, Vec::new(), kept).expect("it is saved");
        assert_eq!(load(folder.path()), Saved::Last(SavedTable { epoch: 1, services: Vec::new(), domains }));
    }

    #[test]
    fn a_file_of_a_form_to_come_is_told_from_a_damaged_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let content = Content {
            form: FORM + 1,
            epoch: 1,
            services: Vec::new(),
            domains: Vec::new(),
            rules: Vec::new(),
            send_proxy_protocol: Vec::new(),
        };
        std::fs::write(folder.path().join(FILE), encode(&content)).expect("it is written");
        let Saved::Damaged(why) = load(folder.path()) else { panic!("it cannot be read") };
        assert!(why.contains("it is of form 6, this edge reads forms 2 to 5"), "{why}");
    }

    #[test]
    fn a_table_from_the_disk_holds_nobody() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut held = services(1);
        held[0].policy.hold = Some(Box::new(peregrine_routing::HoldSpec {
            id: 1,
            until_ms: 2,
            max_requests: 3,
            max_bytes: 4,
            max_age_ms: 5,
            release_per_s: 6,
        }));
        save(folder.path(), 1, held.iter().map(KeptService::from).collect(), Vec::new())
            .expect("it is saved");
        assert_eq!(
            load(folder.path()),
            Saved::Last(SavedTable { epoch: 1, services: services(1), domains: Vec::new() })
        );
    }

    #[test]
    fn a_file_that_is_cut_at_any_byte_gives_way_to_the_one_before_it() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), 1, 1);
        put(folder.path(), 2, 2);
        let whole = std::fs::read(folder.path().join(FILE)).expect("it is there");
        for length in 0..whole.len() {
            std::fs::write(folder.path().join(FILE), &whole[..length]).expect("it is cut");
            let Saved::Before(table, _) = load(folder.path()) else { panic!("cut at {length}") };
            assert_eq!(
                table,
                SavedTable { epoch: 1, services: services(1), domains: Vec::new() },
                "cut at {length}"
            );
        }
        // What is saved next does not put the damaged one in the place of the good one.
        put(folder.path(), 3, 3);
        std::fs::write(folder.path().join(FILE), &whole[..7]).expect("it is cut");
        let Saved::Before(table, _) = load(folder.path()) else { panic!("cut again") };
        assert_eq!(table.epoch, 1);
    }

    #[test]
    fn a_file_with_any_bit_flipped_gives_way_to_the_one_before_it() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), 1, 1);
        put(folder.path(), 2, 1);
        let whole = std::fs::read(folder.path().join(FILE)).expect("it is there");
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(folder.path().join(FILE), &bytes).expect("it is damaged");
            assert!(matches!(load(folder.path()), Saved::Before(table, _) if table.epoch == 1), "byte {at}");
        }
    }

    #[test]
    fn two_damaged_files_are_not_an_empty_table() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), 1, 1);
        std::fs::write(folder.path().join(FILE), b"").expect("it is emptied");
        assert!(matches!(load(folder.path()), Saved::Damaged(_)));
        std::fs::write(folder.path().join(FILE_BEFORE), b"x").expect("it is damaged");
        assert!(matches!(load(folder.path()), Saved::Damaged(_)));
    }
}
