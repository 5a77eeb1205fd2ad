//! The origin's memory: every execution of a request that carries an id.
//!
//! An execution is recorded when the request arrives and before any byte of an answer: an answer that gets lost on the
//! way still counts, and so does a request whose process is killed a moment later. Records are never merged or dropped.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::TcpStream;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use http::Method;
use serde::{Deserialize, Serialize};

/// The protocol that a request arrived over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    H1,
    /// HTTP/2.
    H2,
}

impl Protocol {
    const fn as_str(self) -> &'static str {
        match self {
            Self::H1 => "h1",
            Self::H2 => "h2",
        }
    }
}

/// One execution of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Arrival, nanoseconds since 1970.
    pub unix_ns: u64,
    /// The request's `x-req-id`.
    pub id: Arc<str>,
    /// The request's method.
    pub method: Method,
    /// The protocol of the connection.
    pub protocol: Protocol,
    /// The connection's number, counted from 1 in this origin.
    pub connection: u64,
    /// The status that the origin set out to answer with.
    pub status: u16,
}

impl fmt::Display for Record {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unix_ns, id, method, protocol, connection, status } = self;
        write!(out, "{unix_ns} {id} {method} {} {connection} {status}", protocol.as_str())
    }
}

impl FromStr for Record {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let fields: Vec<&str> = line.split(' ').collect();
        let [unix_ns, id, method, protocol, connection, status] = fields[..] else {
            return Err(format!("6 fields expected, found {}", fields.len()));
        };
        Ok(Self {
            unix_ns: number("unix_ns", unix_ns)?,
            id: id.into(),
            method: method.parse().map_err(|_| format!("`{method}` is not a method"))?,
            protocol: match protocol {
                "h1" => Protocol::H1,
                "h2" => Protocol::H2,
                other => return Err(format!("`{other}` is neither h1 nor h2")),
            },
            connection: number("conn", connection)?,
            status: number("status", status)?,
        })
    }
}

fn number<N: FromStr>(field: &str, text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{field} `{text}` is not a number"))
}

/// What an origin did so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// The origin's name.
    pub instance: String,
    /// Requests with and without an id; health probes and `/__origin` are not counted.
    pub requests: u64,
    /// Different ids executed.
    pub distinct_ids: u64,
    /// Executions beyond the first of their id.
    pub duplicates: u64,
    /// Requests without an `x-req-id`.
    pub without_id: u64,
    /// Arrival of the first counted request, nanoseconds since 1970.
    pub first_arrival_unix_ns: Option<u64>,
    /// Arrival of the newest counted request, nanoseconds since 1970.
    pub last_arrival_unix_ns: Option<u64>,
    /// Connections accepted so far.
    pub connections: u64,
    /// Connections open now.
    pub open_connections: u64,
    /// Counted requests whose answer has not ended yet.
    pub in_flight: u64,
}

/// Collects records in memory and, if asked, in a file that several origins may share.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: Mutex<Entries>,
    sink: Option<Sink>,
}

/// Where records go besides memory.
#[derive(Debug)]
enum Sink {
    /// A file opened for appending, which several origins may share.
    File(File),
    /// A [`crate::collector::Collector`]: for origins whose files nobody can read afterwards, as in a container.
    Collector(Mutex<TcpStream>),
}

/// Begin of a record target that is a collector's address.
const COLLECTOR_SCHEME: &str = "tcp://";

#[derive(Debug, Default)]
struct Entries {
    records: Vec<Record>,
    executions: HashMap<Arc<str>, u64>,
    without_id: u64,
    first_arrival_unix_ns: Option<u64>,
    last_arrival_unix_ns: Option<u64>,
}

impl Ledger {
    pub(super) fn open(target: Option<&Path>, instance: &str) -> io::Result<Self> {
        let sink = target.map(|target| Sink::open(target, instance)).transpose()?;
        Ok(Self { entries: Mutex::default(), sink })
    }

    /// Records one arrival.
    ///
    /// The line goes out in one `write` to a file opened for appending: lines of several processes do not mix, and
    /// nothing waits in a buffer that a signal could lose. The page cache takes it, so no disk is waited for.
    pub(super) fn arrived(
        &self,
        id: Option<&str>,
        method: &Method,
        (protocol, connection): (Protocol, u64),
        status: u16,
    ) -> io::Result<()> {
        let unix_ns = unix_ns();
        let Some(id) = id else {
            self.lock().count_without_id(unix_ns);
            return Ok(());
        };
        let record = Record { unix_ns, id: id.into(), method: method.clone(), protocol, connection, status };
        let written = match &self.sink {
            Some(sink) => sink.write(&record),
            None => Ok(()),
        };
        self.lock().count(record);
        written
    }

    pub(super) fn records(&self) -> Vec<Record> {
        self.lock().records.clone()
    }

    pub(super) fn executions(&self) -> HashMap<Arc<str>, u64> {
        self.lock().executions.clone()
    }

    pub(super) fn stats(&self, instance: &str) -> Stats {
        let entries = self.lock();
        let identified = entries.records.len() as u64;
        let distinct_ids = entries.executions.len() as u64;
        Stats {
            instance: instance.to_owned(),
            requests: identified + entries.without_id,
            distinct_ids,
            duplicates: identified - distinct_ids,
            without_id: entries.without_id,
            first_arrival_unix_ns: entries.first_arrival_unix_ns,
            last_arrival_unix_ns: entries.last_arrival_unix_ns,
            connections: 0,
            open_connections: 0,
            in_flight: 0,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink {
    fn open(target: &Path, instance: &str) -> io::Result<Self> {
        let Some(address) = target.to_str().and_then(|text| text.strip_prefix(COLLECTOR_SCHEME)) else {
            return Ok(Self::File(OpenOptions::new().create(true).append(true).open(target)?));
        };
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        writeln!(stream, "{instance}")?;
        Ok(Self::Collector(Mutex::new(stream)))
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let line = format!("{record}\n");
        match self {
            Self::File(file) => (&*file).write_all(line.as_bytes()),
            Self::Collector(stream) => {
                stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes())
            }
        }
    }
}

impl Entries {
    fn count(&mut self, record: Record) {
        self.seen(record.unix_ns);
        *self.executions.entry(record.id.clone()).or_default() += 1;
        self.records.push(record);
    }

    fn count_without_id(&mut self, unix_ns: u64) {
        self.seen(unix_ns);
        self.without_id += 1;
    }

    fn seen(&mut self, unix_ns: u64) {
        self.first_arrival_unix_ns.get_or_insert(unix_ns);
        self.last_arrival_unix_ns = Some(unix_ns);
    }
}

/// Nanoseconds since 1970, the clock of every record.
#[must_use]
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_line_reads_back_as_the_same_record() {
        let record = Record {
            unix_ns: 1_763_800_000_123_456_789,
            id: "run-7".into(),
            method: Method::POST,
            protocol: Protocol::H2,
            connection: 3,
            status: 201,
        };
        assert_eq!(record.to_string().parse::<Record>(), Ok(record));
    }

    #[test]
    fn a_line_with_a_bad_field_says_which_field() {
        let error = "x run-7 GET h1 1 200".parse::<Record>().expect_err("a bad time");
        assert!(error.contains("unix_ns"), "{error}");
        let error = "1 run-7 GET h3 1 200".parse::<Record>().expect_err("a bad protocol");
        assert!(error.contains("h3"), "{error}");
    }

    #[test]
    fn two_ledgers_append_whole_lines_to_one_file() {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let path = dir.path().join("records");
        let ledgers =
            [Ledger::open(Some(&path), "o").expect("open"), Ledger::open(Some(&path), "o").expect("open")];
        std::thread::scope(|scope| {
            for (at, ledger) in ledgers.iter().enumerate() {
                scope.spawn(move || {
                    for number in 0..500 {
                        let id = format!("run{at}-{number}");
                        ledger.arrived(Some(&id), &Method::GET, (Protocol::H1, 1), 200).expect("recorded");
                    }
                });
            }
        });
        let records = crate::oracle::read_records(&path).expect("whole lines");
        assert_eq!(records.len(), 1000);
    }

    #[test]
    fn stats_count_executions_beyond_the_first_as_duplicates() {
        let ledger = Ledger::open(None, "o").expect("open");
        for id in [Some("a-1"), Some("a-1"), Some("a-2"), None] {
            ledger.arrived(id, &Method::GET, (Protocol::H1, 1), 200).expect("recorded");
        }
        let stats = ledger.stats("o");
        assert_eq!((stats.requests, stats.distinct_ids, stats.duplicates, stats.without_id), (4, 2, 1, 1));
        assert!(stats.first_arrival_unix_ns <= stats.last_arrival_unix_ns);
    }
}
