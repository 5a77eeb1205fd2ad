//! HTTP as it is written and as it comes, for what a well-behaved client would not do or not show.

use std::net::SocketAddr;

use peregrine_api::types::Problem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::PATIENCE;

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The problem, after the checks that hold for every one.
    #[track_caller]
    pub(crate) fn problem(&self) -> Problem {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let problem: Problem = serde_json::from_str(&self.body).unwrap();
        assert_eq!(problem.status, self.status, "{self:?}");
        assert_eq!(problem.type_uri, format!("urn:peregrine:problem:{}", problem.code));
        assert_eq!(self.header("x-request-id"), Some(problem.request_id.as_str()), "{self:?}");
        assert!(
            !problem.detail.is_empty() && !problem.hint.is_empty() && !problem.title.is_empty(),
            "{self:?}"
        );
        problem
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends what is given and reads to the end of the connection.
pub(crate) async fn exchange(address: SocketAddr, request: &str) -> Answer {
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    read_answer(connection).await
}

/// Reads to the end of the connection.
pub(crate) async fn read_answer(mut connection: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    // What came before a reset is the answer: a server that refuses a body need not read it.
    let read = tokio::time::timeout(PATIENCE, connection.read_to_end(&mut bytes)).await;
    drop(read.expect("an answer that ends"));
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap();
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_owned() };
    Answer { status, head: head.to_owned(), body }
}

fn unchunked(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        body.push_str(&after[..size]);
        rest = after[size..].trim_start_matches("\r\n");
        if size == 0 {
            break;
        }
    }
    body
}
