//! The end: streams end, what is open finishes, and it is bounded.

use std::time::Instant;

use peregrine_api::client::{ClientError, EventFilter};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{PATIENCE, Server};

#[tokio::test]
async fn an_open_stream_ends_cleanly_and_does_not_hold_the_end_up() {
    let mut server = Server::start_with(|config| config.limits.shutdown_timeout_ms = 60_000).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let request = format!(
        "GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
        server.token
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut first = [0; 16];
    stream.read_exact(&mut first).await.unwrap();
    let begun = Instant::now();
    server.stop_api().await;
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert!(rest.ends_with("0\r\n\r\n"), "the last chunk is missing: {rest:?}");
    assert!(begun.elapsed() < PATIENCE);
}

#[tokio::test]
async fn a_client_that_never_finishes_its_request_is_cut_off_at_the_limit() {
    let mut server = Server::start_with(|config| config.limits.shutdown_timeout_ms = 50).await;
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    let request = format!(
        "POST /api/v1/moves HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{",
        server.token
    );
    slow.write_all(request.as_bytes()).await.unwrap();
    server.client.version().await.unwrap(); // the server is at work
    let begun = Instant::now();
    server.stop_api().await;
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn after_the_end_the_server_is_unreachable_and_the_client_says_so() {
    let mut server = Server::start().await;
    server.stop_api().await;
    let error = server.client.version().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    let mut stream = server.client.events(&EventFilter::default());
    assert!(matches!(stream.connect().await, Err(ClientError::Unreachable { .. })));
}
