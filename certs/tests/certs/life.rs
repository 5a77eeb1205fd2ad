//! Renewal, budgets, PEM, on demand: what comes after the first certificate, and beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use peregrine_certs::{
    AskConfig, BudgetLimit, DomainState, ExternalAccount, FolderVault, ManagerError, MemoryVault, PemError,
    SealKey, Vault, load_certificate,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::support::badca::{BadCa, Resource};
use crate::support::pebble::{PebbleOptions, ca};
use crate::support::{DEADLINE, World, config, eventually};

const NAME: &str = "shop.example.com";
const HOUR_MS: i64 = 3_600_000;

#[tokio::test]
async fn a_certificate_is_renewed_by_itself_at_two_thirds_of_its_life_and_the_old_one_goes() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let running = world.manager(world.config(), Arc::new(MemoryVault::new())).await;
    running.manager.add(NAME).await.unwrap();
    let first = running.until_valid(NAME).await.certificate.unwrap();
    let record = running.manager.certificate(first).await.unwrap();
    let life_ms = i64::try_from(record.not_after_ms - record.not_before_ms).unwrap();
    world.ahead_ms.store(life_ms / 3 * 2 - HOUR_MS, Ordering::Relaxed);
    running.manager.refresh().await.unwrap();
    // An hour before its time nothing is ordered. (What is not done cannot be awaited: the wildcard below is worked on after it.)
    running.manager.add("*.example.com").await.unwrap();
    running.until("*.example.com", |view| view.failures > 0).await;
    assert_eq!(world.pebble.orders(), 1);
    world.ahead_ms.store(life_ms / 10 * 7 + HOUR_MS, Ordering::Relaxed);
    running.manager.refresh().await.unwrap();
    running.until(NAME, |view| view.certificate != Some(first)).await;
    world.ahead_ms.store(0, Ordering::Relaxed);
    eventually("publishing", || world.front.published(NAME).is_some_and(|id| id != first)).await;
    let view = running.manager.get(NAME).unwrap();
    assert!(view.state.to_string().starts_with("valid until"), "{}", view.state);
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !matches!(running.manager.certificate(first).await, Err(ManagerError::Load(_))) {
        assert!(tokio::time::Instant::now() < deadline, "the old certificate is still there");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_renewal_follows_the_authoritys_window_and_names_what_it_replaces() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let bad = BadCa::before(&world.pebble).await;
    bad.set_window("2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z");
    let mut authority = ca("ari", bad.directory(), &bad.root_pem);
    authority.profile = Some("shortlived".to_owned());
    let running = world.manager(config(&world.dns, vec![authority]), Arc::new(MemoryVault::new())).await;
    running.manager.add(NAME).await.unwrap();
    let first = running.until_valid(NAME).await.certificate.unwrap();
    let bundle = running.manager.load(first).await.unwrap();
    // The window is over: it is renewed as early as a certificate is renewed at all.
    let earliest_ms = bundle.leaf.not_before_ms + HOUR_MS.unsigned_abs();
    running
        .until(
            NAME,
            |view| matches!(view.state, DomainState::Valid { renews_ms: Some(at), .. } if at == earliest_ms),
        )
        .await;
    bad.set_window("2099-01-01T00:00:00Z", "2099-01-02T00:00:00Z");
    world.ahead_ms.store(HOUR_MS + 60_000, Ordering::Relaxed);
    running.manager.refresh().await.unwrap();
    running.until(NAME, |view| view.certificate != Some(first)).await;
    let orders = bad.new_orders();
    assert_eq!((orders[0].get("replaces"), &orders[0]["profile"]), (None, &"shortlived".into()));
    let (_, leaf) = x509_parser::parse_x509_certificate(&bundle.chain[0]).unwrap();
    let authority_key = leaf.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(key) => key.key_identifier.clone(),
        _ => None,
    });
    let encode = |bytes: &[u8]| data_encoding::BASE64URL_NOPAD.encode(bytes);
    let expected = format!("{}.{}", encode(authority_key.unwrap().0), encode(leaf.raw_serial()));
    assert_eq!(orders[1]["replaces"], expected.as_str(), "RFC 9773 §5");
    // Pebble does not repeat `replaces`; its order is used all the same.
    assert_eq!((orders.len(), world.pebble.issued()), (2, 2));
}

#[tokio::test]
async fn budgets_hold_new_names_back_and_leave_something_for_renewals() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let mut config = world.config();
    config.authorities[0].orders = BudgetLimit { orders: 3, window_ms: 3_600_000 };
    config.limits.max_orders = 1;
    let vault = Arc::new(MemoryVault::new());
    let seal = SealKey::ephemeral().unwrap();
    let running = world.manager_with(config.clone(), Arc::clone(&vault) as _, seal).await;
    for name in ["a.example.com", "b.example.com", "c.example.com"] {
        world.dns.a(name, "127.0.0.1");
        running.manager.add(name).await.unwrap();
        if name != "c.example.com" {
            running.until_valid(name).await;
        }
    }
    let view = running.until("c.example.com", |view| view.state.to_string().starts_with("waiting")).await;
    let words = view.state.to_string();
    assert!(
        words.starts_with("waiting: the budget of 3 orders at pebble in 1 h is used up, next try 20"),
        "{words}"
    );
    let first = running.manager.get("a.example.com").unwrap().certificate;
    running.manager.renew("a.example.com").await.unwrap();
    running.until("a.example.com", |view| view.certificate != first).await;
    assert_eq!(world.pebble.orders(), 3);
}

#[tokio::test]
async fn an_authority_that_wants_an_external_account_gets_it() {
    let key = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    let options = PebbleOptions {
        external_account: Some(("kid-1".to_owned(), key.to_owned())),
        ..PebbleOptions::default()
    };
    let Some(world) = World::start(options).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let mut config = world.config();
    let hmac_key = Zeroizing::new(data_encoding::BASE64URL.decode(key.as_bytes()).unwrap());
    config.authorities[0].external_account = Some(ExternalAccount { key_id: "kid-1".to_owned(), hmac_key });
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    running.manager.add(NAME).await.unwrap();
    running.until_valid(NAME).await;
}

#[tokio::test]
async fn certificates_are_kept_sealed_in_a_folder_and_are_there_after_a_restart() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    let store = folder.path().join("store");
    let seal = || SealKey::open_or_create(&key).unwrap();
    let vault = Arc::new(FolderVault::open(&store).unwrap());
    let running = world.manager_with(world.config(), Arc::clone(&vault) as _, seal()).await;
    running.manager.add(NAME).await.unwrap();
    let id = running.until_valid(NAME).await.certificate.unwrap();
    let (chain, private) = running.manager.export(NAME).await.unwrap();
    assert!(
        chain.starts_with("-----BEGIN CERTIFICATE-----")
            && private.starts_with("-----BEGIN PRIVATE KEY-----")
    );
    let der = running.manager.load(id).await.unwrap();
    let der = der.key.secret_der();
    // P-256: 32 bytes of secret in the middle of what surrounds them.
    let secret = &der[36..68];
    for entry in std::fs::read_dir(store.join("records")).unwrap() {
        let path = entry.unwrap().path();
        let file = std::fs::read(&path).unwrap();
        assert!(!file.windows(secret.len()).any(|part| part == secret), "{}", path.display());
    }
    drop(running);
    let loaded = load_certificate(vault.as_ref(), &seal(), id).await.unwrap();
    assert_eq!(loaded.leaf.names, [NAME]);
    let other = SealKey::ephemeral().unwrap();
    assert!(
        load_certificate(vault.as_ref(), &other, id).await.is_err(),
        "without the key file there is no key"
    );
    let again = world.manager_with(world.config(), vault, seal()).await;
    assert_eq!(again.manager.get(NAME).unwrap().certificate, Some(id));
    assert_eq!(world.pebble.orders(), 1);
}

fn own_ca(names: &[&str], days: (i64, i64)) -> (String, String) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "own authority");
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut leaf = rcgen::CertificateParams::new(names).unwrap();
    let now = std::time::SystemTime::now();
    let at = |days: i64| {
        let seconds = std::time::Duration::from_secs(days.unsigned_abs() * 86_400);
        if days < 0 { now - seconds } else { now + seconds }
    };
    leaf.not_before = at(days.0).into();
    leaf.not_after = at(days.1).into();
    leaf.use_authority_key_identifier_extension = true;
    let cert = leaf.signed_by(&key, &issuer).unwrap();
    (cert.pem() + &ca_cert.pem(), key.serialize_pem())
}

#[tokio::test]
async fn what_is_brought_is_checked_and_served_and_not_renewed() {
    let world_dns = crate::support::dns::Dns::start().await;
    let front = crate::support::front::TestFront::start().await;
    let running = crate::support::Running::start(
        config(&world_dns, Vec::new()),
        Arc::new(MemoryVault::new()),
        front.clone(),
        SealKey::ephemeral().unwrap(),
        crate::support::outside(&Arc::default()),
    )
    .await;
    let manager = &running.manager;
    let (chain, key) = own_ca(&["Shop.Example.com", "*.shop.example.com"], (-1, 30));
    let view = manager.import(NAME, &chain, &key).await.unwrap();
    assert!(view.state.to_string().ends_with(", imported, not renewed"), "{}", view.state);
    let id = view.certificate.unwrap();
    eventually("publishing", || front.published(NAME) == Some(id)).await;
    manager.import("a.shop.example.com", &chain, &key).await.unwrap();
    let refused = |error: ManagerError| match error {
        ManagerError::Pem(error) => error,
        other => panic!("{other}"),
    };
    let other = manager.import("other.example.com", &chain, &key).await.unwrap_err();
    assert_eq!(
        refused(other).to_string(),
        "the certificate is for shop.example.com, *.shop.example.com and not for other.example.com"
    );
    let (_, other_key) = own_ca(&[NAME], (-1, 30));
    let error = refused(manager.import(NAME, &chain, &other_key).await.unwrap_err());
    assert!(matches!(error, PemError::OtherKey { .. }), "{error}");
    let (expired, its_key) = own_ca(&[NAME], (-30, -1));
    let error = refused(manager.import(NAME, &expired, &its_key).await.unwrap_err());
    assert!(matches!(error, PemError::Expired { .. }), "{error}");
    let (early, its_key) = own_ca(&[NAME], (1, 30));
    let error = refused(manager.import(NAME, &early, &its_key).await.unwrap_err());
    assert!(matches!(error, PemError::NotYet { .. }), "{error}");
    let (first, second) =
        chain.split_at(chain.find("-----END").unwrap() + "-----END CERTIFICATE-----\n".len());
    let root_twice = format!("{first}{first}{second}");
    let error = refused(manager.import(NAME, &root_twice, &key).await.unwrap_err());
    assert!(matches!(error, PemError::OutOfOrder { number: 1, .. }), "{error}");
    let error = refused(manager.import(NAME, "nothing", &key).await.unwrap_err());
    assert_eq!(error, PemError::NoCertificate);
    let error = refused(manager.import(NAME, &chain, "nothing").await.unwrap_err());
    assert_eq!(error, PemError::NoKey);
    let (exported, exported_key) = manager.export(NAME).await.unwrap();
    assert_eq!(exported.replace('\r', ""), chain.replace('\r', ""));
    let (again, key_again) = (manager.import(NAME, &exported, &exported_key).await.unwrap(), exported_key);
    assert_eq!(again.certificate, Some(id), "{}", key_again.len());
    manager.remove(NAME).await.unwrap();
    assert!(manager.certificate(id).await.is_ok(), "another domain is served with it");
    manager.remove("a.shop.example.com").await.unwrap();
    assert!(manager.certificate(id).await.is_err());
}

#[tokio::test]
async fn a_name_on_demand_gets_a_certificate_only_if_it_is_owned_or_allowed_and_is_asked_for_once() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/may", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap_or(0);
            let head = String::from_utf8_lossy(&head[..length]).into_owned();
            count.fetch_add(1, Ordering::SeqCst);
            let status =
                if head.starts_with("GET /may?domain=yes.example.com ") { "200 OK" } else { "403 No" };
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            let _gone = stream.write_all(answer.as_bytes()).await;
        }
    });
    let mut config = world.config();
    config.on_demand.ask = Some(AskConfig::new(url));
    config.on_demand.owned = Some(Arc::new(|name| name == "owned.example.com"));
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    for name in ["owned.example.com", "yes.example.com"] {
        world.dns.a(name, "127.0.0.1");
        let id = running.manager.obtain(name, 60_000).await.unwrap();
        assert_eq!(world.front.published(name), Some(id));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1, "an owned name is not asked for");
    for _ in 0..5 {
        let error = running.manager.obtain("no.example.com", 1_000).await.unwrap_err();
        assert!(matches!(error, ManagerError::NotAllowed(_)), "{error}");
        running.manager.obtain("yes.example.com", 1_000).await.unwrap();
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2, "answers are remembered, the negative one, too");
    for name in ["*.example.com", "127.0.0.1", "localhost", "a_b.example.com", ""] {
        assert!(running.manager.obtain(name, 10).await.is_err(), "{name}");
    }
    assert!(running.manager.get("no.example.com").is_none());
    server.abort();
}

#[tokio::test]
async fn edges_that_cannot_be_told_keep_the_order_and_are_told_later() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let running = world.manager(world.config(), Arc::new(MemoryVault::new())).await;
    world.front.break_with(Some("edge two does not answer"));
    running.manager.add(NAME).await.unwrap();
    let wanted = "ordering (the edges cannot be told: edge two does not answer)";
    running.until(NAME, |view| view.state.to_string() == wanted).await;
    world.front.break_with(None);
    running.until_valid(NAME).await;
    assert_eq!(world.pebble.orders(), 1);
}

#[tokio::test]
async fn a_domain_that_is_removed_is_forgotten_with_all_that_was_kept_of_it() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let vault = Arc::new(MemoryVault::new());
    let running = world.manager(world.config(), Arc::clone(&vault) as _).await;
    running.manager.add(NAME).await.unwrap();
    running.until_valid(NAME).await;
    eventually("publishing", || world.front.published(NAME).is_some()).await;
    running.until(NAME, |view| view.state.to_string().starts_with("valid")).await;
    running.manager.remove(NAME).await.unwrap();
    let left = vault.list("").await.unwrap();
    let left: Vec<&str> = left.iter().map(|record| record.key.as_str()).collect();
    assert_eq!(left, ["budget/pebble", "budget/pebble/example.com", "sealed/account/pebble"]);
    assert!(matches!(running.manager.remove(NAME).await, Err(ManagerError::NoDomain(_))));
}

#[tokio::test]
async fn an_account_at_another_directory_or_under_a_lost_key_is_replaced() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let (vault, folder) = (Arc::new(MemoryVault::new()), tempfile::tempdir().unwrap());
    for (number, name) in ["one", "two", "three"].into_iter().enumerate() {
        world.dns.a(&format!("{name}.example.com"), "127.0.0.1");
        // The first two runs have one key file each, the third has the second one's; the third has another directory.
        let other = BadCa::before(&world.pebble).await;
        let authority = if number == 2 {
            ca("ca", other.directory(), &other.root_pem)
        } else {
            ca("ca", world.pebble.directory(), &world.pebble.root_pem)
        };
        let key = folder.path().join(if number == 0 { "first.key" } else { "second.key" });
        let seal = SealKey::open_or_create(&key).unwrap();
        let config = config(&world.dns, vec![authority]);
        let running = world.manager_with(config, Arc::clone(&vault) as _, seal).await;
        running.manager.add(&format!("{name}.example.com")).await.unwrap();
        running.until_valid(&format!("{name}.example.com")).await;
        assert_eq!(other.fulfilled(Resource::NewAccount), usize::from(number == 2));
        assert_eq!(other.fulfilled(Resource::NewOrder), usize::from(number == 2));
        running.kill().await;
    }
}

#[tokio::test]
async fn names_on_demand_that_lead_elsewhere_or_fail_for_ever_are_not_remembered() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let mut config = world.config();
    config.on_demand.owned = Some(Arc::new(|_| true));
    config.dns.expected_addresses.push("127.0.0.9".parse().unwrap());
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    world.dns.a("elsewhere.example.com", "127.0.0.77");
    for name in ["elsewhere.example.com", "nowhere.example.com"] {
        let error = running.manager.obtain(name, 0).await.unwrap_err();
        assert!(matches!(error, ManagerError::NotAllowed(_)), "{error}");
        assert!(running.manager.get(name).is_none());
    }
    // It leads here, as far as we are told; whoever validates it finds nobody.
    world.dns.a("vain.example.com", "127.0.0.9");
    assert!(running.manager.obtain("vain.example.com", 0).await.is_err());
    let mut events = running.manager.events();
    running.until("vain.example.com", |view| view.failures > 0).await;
    let gone = async {
        while running.manager.get("vain.example.com").is_some() {
            let _any = events.recv().await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("it is forgotten");
}
