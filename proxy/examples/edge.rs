//! A reverse proxy for one upstream, to measure the edge with: `edge [--tls] LISTEN UPSTREAM [CORES] [LOG-FILE]`. With
//! `--tls` it presents a certificate of its own making (ECDSA P-256) to whoever asks, for `localhost`.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use peregrine_proxy::{
    AccessLogConfig, AccessLogFormat, AccessLogTarget, Certificate, CertificateSource, Config, Edge,
    SourceError, certificate_id,
};
use peregrine_routing::{
    Address, Balance, CertificateId, Change, DomainPolicy, DomainSpec, Generation, HostPattern, PoolSpec,
    RouteSpec, ServicePolicy, ServiceSpec, UpstreamProtocol, UpstreamSpec,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let tls = args.first().is_some_and(|first| first == "--tls");
    args.drain(..usize::from(tls));
    let [listen, upstream, rest @ ..] = &args[..] else {
        return Err("usage: edge [--tls] LISTEN UPSTREAM [CORES] [LOG-FILE]".into());
    };
    let (mut writer, reader) = peregrine_routing::table();
    writer.apply(&[Change::Put(service(upstream.parse()?))])?;
    let access_log = rest.get(1).map(|file| AccessLogConfig {
        target: AccessLogTarget::File(file.into()),
        format: AccessLogFormat::Json,
    });
    let address = vec![listen.parse()?];
    let (http, https) = if tls { (Vec::new(), address) } else { (address, Vec::new()) };
    let config = Config {
        http,
        https,
        cores: rest.first().map_or(Ok(1), |cores| cores.parse())?,
        access_log,
        ..Config::default()
    };
    let mut edge = Edge::bind(config, reader)?;
    if tls {
        let own = OwnCertificate::make()?;
        writer.apply(&[Change::PutDomain(DomainSpec {
            name: HostPattern::Any,
            certificate: Some(certificate_id(&own.0.chain[0])),
            staple: None,
            policy: DomainPolicy::default(),
        })])?;
        edge = edge.with_certificates(Arc::new(own));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(edge.run(async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            eprintln!("cannot wait for Ctrl-C: {error}");
        }
    }))?;
    Ok(())
}

/// A certificate that signs itself.
struct OwnCertificate(Certificate);

impl OwnCertificate {
    fn make() -> Result<Self, rcgen::Error> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let chain = vec![made.cert.der().to_vec()];
        Ok(Self(Certificate { chain, key: made.signing_key.serialize_der(), staple: None }))
    }
}

impl CertificateSource for OwnCertificate {
    fn load<'a>(
        &'a self,
        _id: CertificateId,
        _domain: &'a HostPattern,
    ) -> BoxFuture<'a, Result<Certificate, SourceError>> {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
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
