//! A reverse proxy for one upstream, to measure the edge with: `edge LISTEN UPSTREAM [CORES] [LOG-FILE]`.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;

use peregrine_proxy::{AccessLogConfig, AccessLogFormat, AccessLogTarget, Config, Edge};
use peregrine_routing::{
    Address, Balance, Change, Generation, HostPattern, PoolSpec, RouteSpec, ServicePolicy, ServiceSpec,
    UpstreamProtocol, UpstreamSpec,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [listen, upstream, rest @ ..] = &args[..] else {
        return Err("usage: edge LISTEN UPSTREAM [CORES] [LOG-FILE]".into());
    };
    let (mut writer, reader) = peregrine_routing::table();
    writer.apply(&[Change::Put(service(upstream.parse()?))])?;
    let access_log = rest.get(1).map(|file| AccessLogConfig {
        target: AccessLogTarget::File(file.into()),
        format: AccessLogFormat::Json,
    });
    let config = Config {
        http: vec![listen.parse()?],
        cores: rest.first().map_or(Ok(1), |cores| cores.parse())?,
        access_log,
        ..Config::default()
    };
    let edge = Edge::bind(config, reader)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(edge.run(async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            eprintln!("cannot wait for Ctrl-C: {error}");
        }
    }))?;
    Ok(())
}

fn service(upstream: SocketAddr) -> ServiceSpec {
    let upstream = UpstreamSpec {
        generation: Generation(1),
        name: "origin".into(),
        address: Address::Socket(upstream),
        protocol: UpstreamProtocol::Http1,
        weight: 1,
        ready_connections: 0,
    };
    let pool = PoolSpec { name: "main".into(), weight: 1, standby: false, upstreams: vec![upstream] };
    ServiceSpec {
        name: Arc::from("web"),
        routes: vec![RouteSpec { host: HostPattern::Any, path_prefix: "/".into() }],
        pools: vec![pool],
        balance: Balance::default(),
        policy: ServicePolicy::default(),
    }
}
