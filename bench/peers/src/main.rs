//! A minimal proxy on Pingora: one origin, clear text and TLS, and the three header fields that the others add. No access
//! log, no metrics, no health checks: the least that a program on Pingora does.
//!
//! `peregrine-peer-pingora ORIGIN ECHO PLAIN [TLS CERTIFICATE KEY]`: addresses (`/ws` goes to ECHO), and PEM files.

use std::net::SocketAddr;

use async_trait::async_trait;
use pingora_core::Result;
use pingora_core::apps::HttpServerOptions;
use pingora_core::listeners::tls::TlsSettings;
use pingora_core::server::Server;
use pingora_core::server::configuration::ServerConf;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::RequestHeader;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

/// Idle connections to the origin: more than the load ever has at once.
const ORIGIN_CONNECTIONS: usize = 512;

struct Relay {
    origin: SocketAddr,
    echo: SocketAddr,
}

#[async_trait]
impl ProxyHttp for Relay {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    async fn upstream_peer(&self, session: &mut Session, _ctx: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        let to = if session.req_header().uri.path() == "/ws" { self.echo } else { self.origin };
        Ok(Box::new(HttpPeer::new(to, false, String::new())))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        _ctx: &mut Self::CTX,
    ) -> Result<()> {
        if let Some(client) = session.client_addr().and_then(|address| address.as_inet()) {
            request.insert_header("x-forwarded-for", client.ip().to_string())?;
        }
        let is_tls = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        request.insert_header("x-forwarded-proto", if is_tls { "https" } else { "http" })?;
        // Over HTTP/2 the host is in the target alone.
        let host = request.headers.get("host").cloned();
        let host = host.or_else(|| request.uri.authority().and_then(|host| host.as_str().parse().ok()));
        if let Some(host) = host {
            request.insert_header("host", host.clone())?;
            request.insert_header("x-forwarded-host", host)?;
        }
        Ok(())
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--version" || argument == "-v") {
        println!("pingora {} ({})", env!("PINGORA_VERSION"), env!("CARGO_PKG_NAME"));
        return;
    }
    let [origin, echo, plain, tls @ ..] = &arguments[..] else {
        eprintln!("usage: peregrine-peer-pingora ORIGIN ECHO PLAIN [TLS CERTIFICATE KEY]");
        std::process::exit(2);
    };
    let address = |text: &String| text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
    let relay = Relay { origin: address(origin), echo: address(echo) };
    // One core: one thread, and nobody to steal from.
    let conf = ServerConf {
        threads: 1,
        work_stealing: false,
        upstream_keepalive_pool_size: ORIGIN_CONNECTIONS,
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(1),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, relay);
    if let Some(logic) = service.app_logic_mut() {
        let mut options = HttpServerOptions::default();
        options.h2c = true;
        logic.server_options = Some(options);
    }
    service.add_tcp(plain);
    if let [address, certificate, key] = tls {
        let mut settings = TlsSettings::intermediate(certificate, key)
            .unwrap_or_else(|error| panic!("{certificate}, {key}: {error}"));
        settings.enable_h2();
        service.add_tls_with_settings(address, None, settings);
    }
    server.add_service(service);
    server.run_forever();
}
