//! Calls of gRPC when their upstream leaves: they end with a status that their clients can read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use peregrine_routing::{TrafficClass, Upstream};
use tokio::sync::mpsc;

use super::support::{TestEdge, h2c, service, until};

/// What an origin does next with its one call.
enum Next {
    Head,
    Data(Vec<u8>),
    End,
}

/// An origin of calls, whose test says how the answer to each goes on.
fn origin() -> (SocketAddr, mpsc::UnboundedSender<Next>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = listener.local_addr().expect("address");
    listener.set_nonblocking(true).expect("non-blocking");
    let (tell, script) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            let mut script = Some(script);
            while let Ok((socket, _)) = listener.accept().await {
                let mut conn = h2::server::handshake(socket).await.expect("handshake");
                while let Some(Ok((_, respond))) = conn.accept().await {
                    tokio::spawn(play(respond, script.take().expect("one call")));
                }
            }
        });
    });
    (addr, tell)
}

async fn play(mut respond: h2::server::SendResponse<Bytes>, mut script: mpsc::UnboundedReceiver<Next>) {
    let mut stream = None;
    while let Some(next) = script.recv().await {
        match next {
            Next::Head => {
                let head = Response::builder().header("content-type", "application/grpc").body(());
                stream = respond.send_response(head.expect("a head"), false).ok();
            }
            Next::Data(bytes) => {
                if let Some(stream) = &mut stream {
                    drop(stream.send_data(bytes.into(), false));
                }
            }
            Next::End => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                if let Some(stream) = &mut stream {
                    drop(stream.send_trailers(trailers));
                }
            }
        }
    }
    // The test is over.
}

fn message(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    [&[0][..], &length, payload].concat()
}

/// How a call came to its end.
#[derive(Debug)]
struct Ended {
    head: Response<()>,
    data: Vec<u8>,
    trailers: Option<HeaderMap>,
    error: Option<h2::Error>,
}

impl Ended {
    fn status(&self) -> Option<&str> {
        let fields = self.trailers.as_ref().unwrap_or(self.head.headers());
        fields.get("grpc-status").and_then(|status| status.to_str().ok())
    }
}

/// A call with its upload still open; `progress` is told the bytes that have come.
struct Call {
    edge: TestEdge,
    inside: Arc<Upstream>,
    origin: mpsc::UnboundedSender<Next>,
    came: std::sync::mpsc::Receiver<usize>,
    ended: std::thread::JoinHandle<Ended>,
}

impl Call {
    fn start() -> Self {
        Self::start_as("application/grpc+proto")
    }

    fn start_as(content_type: &'static str) -> Self {
        let (addr, origin) = origin();
        let spec = h2c(addr);
        let edge = TestEdge::start(service(vec![spec.clone()]));
        let inside = edge.upstream(&spec);
        let (tell, came) = std::sync::mpsc::channel();
        let edge_addr = edge.addr;
        let ended = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(call(edge_addr, content_type, tell))
        });
        until("it is inside", || inside.in_flight() == 1);
        Self { edge, inside, origin, came, ended }
    }

    fn origin_does(&self, next: Next) {
        self.origin.send(next).expect("the origin runs");
    }

    fn came(&self, bytes: usize) {
        let mut came = 0;
        until("the client has it", || {
            came += self.came.try_iter().sum::<usize>();
            came >= bytes
        });
    }

    fn retire(&mut self) {
        let version = self.edge.put(service(Vec::new()));
        self.edge.wait_acknowledged(version);
    }

    fn ended(self) -> (Ended, Arc<Upstream>) {
        let ended = self.ended.join().expect("no panic");
        until("it is empty", || self.inside.is_empty());
        (ended, self.inside)
    }
}

async fn call(addr: SocketAddr, content_type: &str, tell: std::sync::mpsc::Sender<usize>) -> Ended {
    let socket = tokio::net::TcpStream::connect(addr).await.expect("connects");
    let (client, conn) = h2::client::handshake(socket).await.expect("handshake");
    tokio::spawn(conn);
    let mut client = client.ready().await.expect("ready");
    let request = Request::post("http://a.test/pkg.Service/Watch")
        .header("content-type", content_type)
        .header("te", "trailers")
        .header("x-request-id", "call");
    let (answer, _upload) =
        client.send_request(request.body(()).expect("a request"), false).expect("is sent");
    let (head, mut body) = answer.await.expect("an answer").into_parts();
    let (mut data, mut error) = (Vec::new(), None);
    while let Some(piece) = body.data().await {
        match piece {
            Ok(piece) => {
                drop(body.flow_control().release_capacity(piece.len()));
                data.extend_from_slice(&piece);
                let _ = tell.send(piece.len());
            }
            Err(broken) => {
                error = Some(broken);
                break;
            }
        }
    }
    let trailers = if error.is_none() { body.trailers().await.expect("a clean end") } else { None };
    Ended { head: Response::from_parts(head, ()), data, trailers, error }
}

#[test]
fn a_silent_call_ends_with_unavailable_in_its_trailers() {
    let mut call = Call::start();
    call.origin_does(Next::Head);
    call.origin_does(Next::Data(message(b"one")));
    call.came(8);
    call.retire();
    call.inside.cut_class(TrafficClass::Request);
    let (ended, inside) = call.ended();
    assert_eq!((ended.status(), &*ended.data), (Some("14"), &*message(b"one")), "{ended:?}");
    let receipt = inside.receipt();
    assert_eq!(receipt.soft_closed[TrafficClass::Request], 1);
    assert_eq!(receipt.hard_cut, [] as [String; 0]);
}

#[test]
fn a_call_ends_behind_the_message_that_is_under_way() {
    let mut call = Call::start();
    call.origin_does(Next::Head);
    call.origin_does(Next::Data(message(b"begun")[..7].to_vec()));
    call.came(7);
    call.retire();
    call.inside.close_class(TrafficClass::Request);
    call.origin_does(Next::Data([&message(b"begun")[7..], &message(b"next")].concat()));
    let (ended, inside) = call.ended();
    assert_eq!(ended.status(), Some("14"), "{ended:?}");
    // Whether the edge has heard of the deadline before the rest came is its own matter.
    let both = [message(b"begun"), message(b"next")].concat();
    assert!(ended.data == message(b"begun") || ended.data == both, "{ended:?}");
    assert_eq!(inside.receipt().soft_closed.total(), 1);
}

#[test]
fn a_call_that_stays_inside_a_message_still_ends_with_a_status() {
    let mut call = Call::start();
    call.origin_does(Next::Head);
    call.origin_does(Next::Data(message(b"never whole")[..9].to_vec()));
    call.came(9);
    call.retire();
    call.inside.close_class(TrafficClass::Request);
    call.inside.cut_class(TrafficClass::Request);
    let (ended, _) = call.ended();
    assert_eq!(ended.status(), Some("14"), "{ended:?}");
    assert!(ended.error.is_none());
}

#[test]
fn a_call_without_a_head_gets_an_answer_of_trailers_only() {
    let mut call = Call::start();
    call.retire();
    call.inside.cut_class(TrafficClass::Request);
    let (ended, inside) = call.ended();
    assert_eq!((ended.head.status().as_u16(), ended.status()), (200, Some("14")), "{ended:?}");
    assert!(ended.data.is_empty() && ended.trailers.is_none());
    assert_eq!(ended.head.headers()["content-type"], "application/grpc");
    // So young a call is a request: it got no answer, and that is told.
    assert_eq!(inside.receipt().hard_cut, ["call"]);
}

#[test]
fn a_call_that_comes_to_its_end_in_time_has_its_own_status() {
    let mut call = Call::start();
    call.origin_does(Next::Head);
    call.retire();
    call.origin_does(Next::Data(message(b"last")));
    call.origin_does(Next::End);
    let (ended, inside) = call.ended();
    assert_eq!((ended.status(), &*ended.data), (Some("0"), &*message(b"last")));
    assert_eq!(inside.receipt().completed.total(), 1);
}

#[test]
fn an_exchange_of_another_kind_is_cut_without_a_status() {
    let mut call = Call::start_as("application/grpc-web");
    call.origin_does(Next::Head);
    call.origin_does(Next::Data(message(b"one")));
    call.came(8);
    call.retire();
    call.inside.cut_class(TrafficClass::Request);
    let (ended, inside) = call.ended();
    assert!(ended.error.is_some() && ended.status().is_none(), "{ended:?}");
    assert_eq!(inside.receipt().hard_cut, ["call"]);
}

#[test]
fn a_call_that_has_been_silent_for_long_has_the_time_of_a_stream() {
    let mut call = Call::start();
    call.origin_does(Next::Head);
    std::thread::park_timeout(Duration::from_millis(10_500));
    call.retire();
    call.inside.cut_class(TrafficClass::Request);
    until("it is a stream", || call.inside.receipt().in_flight[TrafficClass::GrpcStream] == 1);
    call.origin_does(Next::Data(message(b"still there")));
    call.came(16);
    call.inside.close_class(TrafficClass::GrpcStream);
    let (ended, inside) = call.ended();
    assert_eq!(ended.status(), Some("14"), "{ended:?}");
    let receipt = inside.receipt();
    assert_eq!((receipt.soft_closed[TrafficClass::GrpcStream], receipt.hard_cut.len()), (1, 0));
}

#[test]
fn a_stream_without_a_head_ends_politely_at_its_own_deadline() {
    let mut call = Call::start();
    std::thread::park_timeout(Duration::from_millis(10_500));
    call.retire();
    call.inside.cut_class(TrafficClass::Request);
    call.inside.close_class(TrafficClass::GrpcStream);
    let (ended, inside) = call.ended();
    assert_eq!((ended.head.status().as_u16(), ended.status()), (200, Some("14")), "{ended:?}");
    let receipt = inside.receipt();
    assert_eq!((receipt.soft_closed[TrafficClass::GrpcStream], receipt.hard_cut.len()), (1, 0));
}
