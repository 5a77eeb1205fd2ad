//! A thousand switches of upstreams under load: no error, and every id executed once.

use std::net::SocketAddr;

use peregrine_api::client::{Client, ClientConfig, PutService};
use peregrine_bench::load::{Expect, Load, LoadHandle, LoadOptions, Pace, Protocol};
use peregrine_bench::origin::{Origin, OriginOptions};
use serde_json::json;

use crate::support::server::Peregrine;
use crate::support::traffic::assert_nothing_lost;

/// Of two services, in turns.
const SWITCHES: usize = 1_000;
/// In all, of three kinds.
const REQUESTS_PER_SECOND: u32 = 5_000;

fn traffic(edge: SocketAddr) -> Vec<LoadHandle> {
    let kind = |host: &str, share: u32, protocol, expect| {
        let options = LoadOptions {
            host: host.to_owned(),
            path: if expect == Expect::Call { "/trailers" } else { "/bytes/100" }.to_owned(),
            protocol,
            connections: if protocol == Protocol::Http1 { 16 } else { 2 },
            pace: Pace::Open { per_second: REQUESTS_PER_SECOND / 5 * share },
            post_percent: 10,
            expect,
            ..LoadOptions::new(edge)
        };
        Load::start(options).expect("options are fine")
    };
    vec![
        kind("web.test", 2, Protocol::Http1, Expect::Pattern(100)),
        kind("web.test", 2, Protocol::H2c, Expect::Pattern(100)),
        kind("calls.test", 1, Protocol::H2c, Expect::Call),
    ]
}

#[test]
fn a_thousand_switches_under_http1_http2_and_grpc_lose_nothing() {
    let server = Peregrine::start_logging("", "warn");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut origins = Vec::new();
        for name in ["one", "other"] {
            origins.push(Origin::bind(OriginOptions::named(name)).await.expect("an origin"));
        }
        let api = ClientConfig::new(format!("http://{}", server.api()), Some(server.token()));
        let api = Client::new(&api).expect("a client");
        let put = async |host: &str, protocol: &str, origin: &Origin| {
            let spec = json!({
                "name": host.split('.').next(),
                "routes": [{"host": host, "path": "/"}],
                "workload": {"kind": "fixed", "upstreams": [{"address": origin.addr().to_string()}]},
                "health": {"probe": "none"},
                "traffic": {"protocol": protocol},
            });
            let spec = serde_json::from_value(spec).expect("a service");
            api.put_service(&spec, &PutService::default()).await.expect("the service is switched");
        };
        let services = [("web.test", "http1"), ("calls.test", "h2c")];
        for (host, protocol) in services {
            put(host, protocol, &origins[0]).await;
        }
        let loads = traffic(server.edge());
        for switch in 0..SWITCHES {
            let (host, protocol) = services[switch % 2];
            put(host, protocol, &origins[(switch / 2 + 1) % 2]).await;
        }
        let mut summaries = Vec::new();
        for load in loads {
            summaries.push(load.stop().await);
        }
        let records: Vec<_> = origins.iter().flat_map(Origin::records).collect();
        assert_nothing_lost(&summaries, &records);
        for summary in &summaries {
            assert!(summary.ok > 100, "there was traffic all along: {summary:?}");
        }
        for origin in &origins {
            let share = origin.records().len() * 100 / records.len();
            assert!((20..=80).contains(&share), "{share} % of the requests went to {origin:?}");
        }
    });
}
