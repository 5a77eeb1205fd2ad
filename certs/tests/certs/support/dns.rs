//! A small DNS server: what a test puts into it, over UDP.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

type Zone = Arc<Mutex<HashMap<(String, RecordType), Vec<RData>>>>;

pub(crate) struct Dns {
    pub(crate) address: SocketAddr,
    zone: Zone,
    server: JoinHandle<()>,
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Dns {
    pub(crate) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a UDP socket");
        let address = socket.local_addr().expect("its address");
        let zone = Zone::default();
        let server = tokio::spawn(serve(socket, Arc::clone(&zone)));
        Self { address, zone, server }
    }

    pub(crate) fn set(&self, name: &str, data: RData) {
        let key = (name.to_owned(), data.record_type());
        self.zone.lock().unwrap().insert(key, vec![data]);
    }

    pub(crate) fn a(&self, name: &str, address: &str) {
        let data = match address.parse().expect("an address") {
            std::net::IpAddr::V4(a) => RData::A(A(a)),
            std::net::IpAddr::V6(a) => RData::AAAA(AAAA(a)),
        };
        self.set(name, data);
    }

    pub(crate) fn cname(&self, name: &str, target: &str) {
        self.set(name, RData::CNAME(CNAME(Name::from_ascii(format!("{target}.")).unwrap())));
    }

    pub(crate) fn caa(&self, name: &str, issuer: &str) {
        self.set(
            name,
            RData::CAA(CAA::new_issue(false, Some(Name::from_ascii(issuer).unwrap()), Vec::new())),
        );
    }
}

async fn serve(socket: UdpSocket, zone: Zone) {
    let mut buffer = [0; 4096];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let Ok(question) = Message::from_vec(&buffer[..length]) else { continue };
        let answer = answer(&question, &zone);
        if let Ok(bytes) = answer.to_vec() {
            let _gone = socket.send_to(&bytes, from).await;
        }
    }
}

fn answer(question: &Message, zone: &Zone) -> Message {
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.recursion_desired = question.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.authoritative = true;
    let zone = zone.lock().unwrap();
    for query in &question.queries {
        answer.add_query(query.clone());
        let mut name = query.name().clone();
        let mut known = false;
        for _ in 0..8 {
            let text = name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
            known |= zone.keys().any(|(other, _)| *other == text);
            if let Some(alias) = zone.get(&(text.clone(), RecordType::CNAME)).and_then(|all| all.first()) {
                answer.add_answer(Record::from_rdata(name.clone(), 1, alias.clone()));
                let RData::CNAME(target) = alias else { break };
                name = target.0.clone();
                continue;
            }
            for data in zone.get(&(text, query.query_type())).into_iter().flatten() {
                answer.add_answer(Record::from_rdata(name.clone(), 1, data.clone()));
            }
            break;
        }
        if !known {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
    }
    answer
}
