//! The access log. A request leaves a plain record in its core's batch; a thread of its own makes lines
//! of it and writes them. When the writer cannot keep up, whole batches are dropped and counted: a full
//! disk or a slow pipe never holds up a request.

use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{Method, Version};

use crate::clock::now_us;
use crate::config::{AccessLogConfig, AccessLogFormat, AccessLogTarget};
use crate::error::Reason;
use crate::inflight::Flight;

/// Records that a core collects before it hands them over; it also does so at every tick.
const BATCH_RECORDS: usize = 512;
/// Batches that may wait for the writer, over all cores.
const WAITING_BATCHES: usize = 64;
/// Empty batches that a core keeps.
const SPARE_BATCHES: usize = 2;
/// Lines are written in pieces of this size.
const WRITE_BYTES: usize = 128 * 1024;
/// Longest text of one field; what is longer is cut.
const MAX_FIELD_BYTES: usize = 4 * 1024;

/// A log file that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the access log {}: {source}; check that its folder exists and may be written", path.display())]
pub struct LogError {
    path: PathBuf,
    source: io::Error,
}

/// One request, as numbers and as positions in the batch's text.
struct Record {
    started_us: u64,
    total_us: u64,
    head_us: u64,
    held_us: u64,
    bytes_in: u64,
    bytes_out: u64,
    generation: Option<u64>,
    method: Method,
    version: Version,
    status: u16,
    reason: Option<Reason>,
    attempts: u8,
    /// Lengths of the texts, in the order of [`Texts`].
    lengths: [u16; TEXTS],
}

/// How many texts a record has.
const TEXTS: usize = 9;

/// The texts of a record, in the order in which they are stored.
struct Texts<'a> {
    client: &'a [u8],
    request_id: &'a [u8],
    trace_id: &'a [u8],
    host: &'a [u8],
    path: &'a [u8],
    service: &'a [u8],
    upstream: &'a [u8],
    referer: &'a [u8],
    agent: &'a [u8],
}

/// Records on their way to the writer.
#[derive(Default)]
pub(crate) struct Batch {
    records: Vec<Record>,
    text: Vec<u8>,
}

/// A core's end of the log.
pub(crate) struct CoreLog {
    batch: RefCell<Batch>,
    sender: SyncSender<(Batch, Giver)>,
    giver: Giver,
    given: Receiver<Batch>,
    dropped: Cell<u64>,
    /// Whether lines name referer and user agent.
    pub(crate) wants_agent: bool,
}

/// How a batch goes back to its core when it is written, so that its memory is used again.
type Giver = SyncSender<Batch>;

/// Where cores get their end of the log from.
#[derive(Clone)]
pub(crate) struct LogSender {
    sender: SyncSender<(Batch, Giver)>,
    wants_agent: bool,
}

impl LogSender {
    pub(crate) fn core(&self) -> CoreLog {
        let (giver, given) = sync_channel(SPARE_BATCHES);
        CoreLog {
            batch: RefCell::default(),
            sender: self.sender.clone(),
            giver,
            given,
            dropped: Cell::new(0),
            wants_agent: self.wants_agent,
        }
    }
}

impl CoreLog {
    pub(crate) fn push(&self, flight: &Flight, total_us: u64) {
        let mut batch = self.batch.borrow_mut();
        let service = flight.service.borrow();
        let upstream = flight.upstream.borrow();
        let host = flight.host.borrow();
        let agent = |second: bool| {
            let pair = flight.agent.as_deref()?;
            let value = if second { &pair.1 } else { &pair.0 };
            value.as_ref().map(http::HeaderValue::as_bytes)
        };
        // As text already, unless a trusted proxy has named another.
        let peer = &flight.conn;
        let named = (flight.client != peer.peer_ip()).then(|| flight.client.to_string());
        let client = named.as_deref().map_or(peer.peer_text.as_bytes(), str::as_bytes);
        let texts = [
            client,
            flight.ids.request.as_bytes(),
            flight.ids.trace(),
            host.as_bytes(),
            flight.path.as_ref().map_or(&b"-"[..], |path| path.as_str().as_bytes()),
            service.as_ref().map_or(&b""[..], |entry| entry.service.name().as_bytes()),
            upstream.as_ref().map_or(&b""[..], |upstream| upstream.name().as_bytes()),
            agent(false).unwrap_or_default(),
            agent(true).unwrap_or_default(),
        ];
        let lengths = texts.map(|text| batch.add_text(text));
        batch.records.push(Record {
            started_us: flight.started_us,
            total_us,
            head_us: flight.head_us.get(),
            held_us: flight.held_us.get(),
            bytes_in: flight.bytes_in.get(),
            bytes_out: flight.bytes_out.get(),
            generation: upstream.as_ref().map(|upstream| upstream.generation().0),
            method: flight.method.clone(),
            version: flight.version,
            status: flight.status.get(),
            reason: flight.reason.get(),
            attempts: flight.attempts.get(),
            lengths,
        });
        let full = batch.records.len() >= BATCH_RECORDS;
        drop(batch);
        if full {
            self.flush();
        }
    }

    /// A request whose head could not be read.
    pub(crate) fn push_rejected(&self, client: IpAddr, status: u16, reason: Reason) {
        let mut batch = self.batch.borrow_mut();
        let client = client.to_string();
        let texts = [client.as_bytes(), b"", b"", b"", b"-", b"", b"", b"", b""];
        let lengths = texts.map(|text| batch.add_text(text));
        batch.records.push(Record {
            started_us: now_us(),
            total_us: 0,
            head_us: 0,
            held_us: 0,
            bytes_in: 0,
            bytes_out: 0,
            generation: None,
            method: Method::from_bytes(b"-").unwrap_or_default(),
            version: Version::HTTP_11,
            status,
            reason: Some(reason),
            attempts: 0,
            lengths,
        });
    }

    /// Hands the batch over, or drops it if the writer has too many.
    pub(crate) fn flush(&self) {
        let mut batch = self.batch.borrow_mut();
        if batch.records.is_empty() {
            return;
        }
        let next = self.given.try_recv().unwrap_or_default();
        let full = std::mem::replace(&mut *batch, next);
        let lines = full.records.len() as u64;
        if self.sender.try_send((full, self.giver.clone())).is_err() {
            self.dropped.set(self.dropped.get() + lines);
        }
    }

    /// Lines dropped since the last call.
    pub(crate) fn take_dropped(&self) -> u64 {
        self.dropped.replace(0)
    }
}

impl Drop for CoreLog {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Batch {
    fn add_text(&mut self, text: &[u8]) -> u16 {
        let text = &text[..text.len().min(MAX_FIELD_BYTES)];
        self.text.extend_from_slice(text);
        u16::try_from(text.len()).unwrap_or(0)
    }
}

/// Starts the writer. It ends when every core's end has been dropped and all lines are written.
///
/// # Errors
/// [`LogError`] when the file cannot be opened.
pub(crate) fn start(config: &AccessLogConfig) -> Result<(LogSender, JoinHandle<()>), LogError> {
    let target: Box<dyn Write + Send> = match &config.target {
        AccessLogTarget::Stdout => Box::new(io::stdout()),
        AccessLogTarget::File(path) => Box::new(open(path)?),
    };
    let (sender, receiver) = sync_channel(WAITING_BATCHES);
    let format = config.format;
    let thread = std::thread::Builder::new()
        .name("edge-log".into())
        .spawn(move || write_all(&receiver, target, format))
        .map_err(|source| LogError { path: "(thread)".into(), source })?;
    Ok((LogSender { sender, wants_agent: format == AccessLogFormat::Combined }, thread))
}

fn open(path: &PathBuf) -> Result<File, LogError> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.map_err(|source| LogError { path: path.clone(), source })
}

fn write_all(batches: &Receiver<(Batch, Giver)>, mut target: Box<dyn Write + Send>, format: AccessLogFormat) {
    let mut out = Vec::with_capacity(WRITE_BYTES);
    let mut date = DateCache::default();
    while let Ok((mut batch, giver)) = batches.recv() {
        let offset_us = unix_offset_us();
        let mut text = &batch.text[..];
        for record in &batch.records {
            let texts = split(&mut text, &record.lengths);
            let unix_us = record.started_us.saturating_add_signed(offset_us);
            match format {
                AccessLogFormat::Json => json_line(&mut out, record, &texts, date.rfc3339(unix_us), unix_us),
                AccessLogFormat::Combined => combined_line(&mut out, record, &texts, date.common(unix_us)),
            }
            if out.len() >= WRITE_BYTES {
                write_out(&mut *target, &mut out);
            }
        }
        write_out(&mut *target, &mut out);
        batch.records.clear();
        batch.text.clear();
        // A core that has ended, or has enough of them, takes none.
        drop(giver.try_send(batch));
    }
}

fn write_out(target: &mut dyn Write, out: &mut Vec<u8>) {
    // A log that cannot be written must not end the edge; the next piece is tried again.
    if let Err(error) = target.write_all(out).and_then(|()| target.flush()) {
        tracing::warn!(%error, "access log lines could not be written");
    }
    out.clear();
}

/// What has to be added to the monotonic clock for the time of day.
fn unix_offset_us() -> i64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(unix.as_micros()).unwrap_or(0) - i64::try_from(now_us()).unwrap_or(0)
}

fn split<'a>(text: &mut &'a [u8], lengths: &[u16; TEXTS]) -> Texts<'a> {
    let mut next = |at: usize| {
        let (field, rest) = text.split_at(usize::from(lengths[at]).min(text.len()));
        *text = rest;
        field
    };
    Texts {
        client: next(0),
        request_id: next(1),
        trace_id: next(2),
        host: next(3),
        path: next(4),
        service: next(5),
        upstream: next(6),
        referer: next(7),
        agent: next(8),
    }
}

fn json_line(out: &mut Vec<u8>, record: &Record, texts: &Texts<'_>, second: &str, unix_us: u64) {
    let millis = unix_us / 1_000 % 1_000;
    let millis = [100, 10, 1].map(|digit| b'0' + (millis / digit % 10) as u8);
    push(out, &[b"{\"time\":\"", second.as_bytes(), b".", &millis]);
    // Ids, addresses and methods hold nothing to escape: they were checked before they were kept.
    push(out, &[b"Z\",\"id\":\"", texts.request_id, b"\",\"trace\":\"", texts.trace_id]);
    push(out, &[b"\",\"client\":\"", texts.client, b"\",\"method\":\"", record.method.as_str().as_bytes()]);
    out.extend_from_slice(b"\",\"host\":\"");
    json_escape(out, texts.host);
    out.extend_from_slice(b"\",\"path\":\"");
    json_escape(out, texts.path);
    push(out, &[b"\",\"protocol\":\"", protocol(record.version).as_bytes(), b"\",\"status\":"]);
    push_number(out, u64::from(record.status));
    if let Some(reason) = record.reason {
        push(out, &[b",\"reason\":\"", reason.as_str().as_bytes(), b"\""]);
    }
    if !texts.service.is_empty() {
        out.extend_from_slice(b",\"service\":\"");
        json_escape(out, texts.service);
        out.push(b'"');
    }
    if let Some(generation) = record.generation {
        out.extend_from_slice(b",\"upstream\":\"");
        json_escape(out, texts.upstream);
        out.extend_from_slice(b"\",\"generation\":");
        push_number(out, generation);
    }
    let numbers: [(&[u8], u64); 5] = [
        (b",\"attempts\":", u64::from(record.attempts)),
        (b",\"bytes_in\":", record.bytes_in),
        (b",\"bytes_out\":", record.bytes_out),
        (b",\"duration_us\":", record.total_us),
        (b",\"upstream_head_us\":", record.head_us),
    ];
    for (key, number) in numbers {
        out.extend_from_slice(key);
        push_number(out, number);
    }
    if record.held_us > 0 {
        out.extend_from_slice(b",\"held_us\":");
        push_number(out, record.held_us);
    }
    out.extend_from_slice(b"}\n");
}

fn push(out: &mut Vec<u8>, pieces: &[&[u8]]) {
    pieces.iter().for_each(|piece| out.extend_from_slice(piece));
}

/// Whether a text needs no escaping in JSON; eight bytes at a time.
fn is_plain(text: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = ONES << 7;
    // Sets the high bit of each byte that is below `limit`, or above 0x7f; exact enough for a question
    // about all of them, as a borrow comes only from a byte that is below itself.
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) | word;
    let equal = |word: u64, byte: u64| below(word ^ (ONES * byte), 1);
    let odd = |word: u64| {
        (below(word, 0x20) | equal(word, b'"'.into()) | equal(word, b'\\'.into()) | equal(word, 0x7f)) & HIGH
    };
    let (words, rest) = text.as_chunks::<8>();
    let mut last = [b' '; 8];
    last[..rest.len()].copy_from_slice(rest);
    words.iter().chain([&last]).fold(0, |any, word| any | odd(u64::from_ne_bytes(*word))) == 0
}

fn json_escape(out: &mut Vec<u8>, text: &[u8]) {
    if is_plain(text) {
        out.extend_from_slice(text);
        return;
    }
    for character in String::from_utf8_lossy(text).chars() {
        match character {
            '"' | '\\' => out.extend_from_slice(&[b'\\', character as u8]),
            '\u{0}'..='\u{1f}' | '\u{7f}' => {
                out.extend_from_slice(format!("\\u{:04x}", u32::from(character)).as_bytes());
            }
            _ => out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn combined_line(out: &mut Vec<u8>, record: &Record, texts: &Texts<'_>, time: &str) {
    out.extend_from_slice(texts.client);
    out.extend_from_slice(b" - - [");
    out.extend_from_slice(time.as_bytes());
    out.extend_from_slice(b"] \"");
    out.extend_from_slice(record.method.as_str().as_bytes());
    out.push(b' ');
    quoted(out, texts.path);
    out.push(b' ');
    out.extend_from_slice(protocol(record.version).as_bytes());
    out.extend_from_slice(b"\" ");
    push_number(out, u64::from(record.status));
    out.push(b' ');
    push_number(out, record.bytes_out);
    for text in [texts.referer, texts.agent] {
        out.extend_from_slice(b" \"");
        quoted(out, if text.is_empty() { b"-" } else { text });
        out.push(b'"');
    }
    out.push(b'\n');
}

/// Escapes what could forge a line or end the quotes.
fn quoted(out: &mut Vec<u8>, text: &[u8]) {
    for byte in text {
        if (0x20..0x7f).contains(byte) && *byte != b'"' && *byte != b'\\' {
            out.push(*byte);
        } else {
            out.extend_from_slice(format!("\\x{byte:02x}").as_bytes());
        }
    }
}

const fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}

fn push_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// The time of day as text, made once a second.
#[derive(Default)]
struct DateCache {
    second: u64,
    text: String,
}

impl DateCache {
    fn rfc3339(&mut self, unix_us: u64) -> &str {
        self.cached(unix_us, |d| {
            format!("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}", d.year, d.month, d.day, d.hour, d.minute, d.second)
        })
    }

    fn common(&mut self, unix_us: u64) -> &str {
        const MONTHS: [&str; 12] =
            ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        self.cached(unix_us, |d| {
            let month = MONTHS[d.month as usize - 1];
            format!("{:02}/{month}/{:04}:{:02}:{:02}:{:02} +0000", d.day, d.year, d.hour, d.minute, d.second)
        })
    }

    fn cached(&mut self, unix_us: u64, format: impl Fn(Date) -> String) -> &str {
        let second = unix_us / 1_000_000;
        if second != self.second || self.text.is_empty() {
            self.second = second;
            self.text = format(Date::of(second));
        }
        &self.text
    }
}

struct Date {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Date {
    /// Days to a civil date by 400-year cycles that begin on 1 March, so that the leap day comes last.
    const fn of(unix: u64) -> Self {
        let days = unix / 86_400 + 719_468;
        let (cycle, day_of_cycle) = (days / 146_097, days % 146_097);
        let year_of_cycle =
            (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
        let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = cycle * 400 + year_of_cycle + (month <= 2) as u64;
        Self {
            year,
            month,
            day: day_of_year - (153 * shifted + 2) / 5 + 1,
            hour: unix / 3_600 % 24,
            minute: unix / 60 % 60,
            second: unix % 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            started_us: 0,
            total_us: 1_500,
            head_us: 1_200,
            held_us: 0,
            bytes_in: 0,
            bytes_out: 100,
            generation: Some(7),
            method: Method::GET,
            version: Version::HTTP_11,
            status: 200,
            reason: None,
            attempts: 1,
            lengths: [0; TEXTS],
        }
    }

    fn texts<'a>(path: &'a [u8]) -> Texts<'a> {
        let (request_id, trace_id, host) = (&b"id-1"[..], &b"t"[..], &b"shop.example.com"[..]);
        let (service, upstream) = (&b"web"[..], &b"web-1"[..]);
        let client = &b"203.0.113.9"[..];
        Texts {
            client,
            request_id,
            trace_id,
            host,
            path,
            service,
            upstream,
            referer: b"",
            agent: b"curl/8\"\n",
        }
    }

    #[test]
    fn a_json_line_is_one_object_with_every_field() {
        let mut out = Vec::new();
        json_line(&mut out, &record(), &texts(b"/a?b=\"c\\\n"), "2026-11-22T16:01:22", 1_000_007_000);
        let line = String::from_utf8(out).expect("is UTF-8");
        assert_eq!(
            line,
            concat!(
                r#"{"time":"2026-11-22T16:01:22.007Z","id":"id-1","trace":"t","client":"203.0.113.9","#,
                r#""method":"GET","host":"shop.example.com","path":"/a?b=\"c\\\u000a","protocol":"HTTP/1.1","#,
                r#""status":200,"service":"web","upstream":"web-1","generation":7,"attempts":1,"#,
                r#""bytes_in":0,"bytes_out":100,"duration_us":1500,"upstream_head_us":1200}"#,
                "\n"
            )
        );
    }

    #[test]
    fn every_byte_that_needs_escaping_is_seen_wherever_it_stands() {
        for byte in 0..=u8::MAX {
            let odd = !(0x20..0x7f).contains(&byte) || matches!(byte, b'"' | b'\\');
            for length in 0..20 {
                for at in 0..length {
                    let mut text = vec![b'a'; length];
                    text[at] = byte;
                    assert_eq!(is_plain(&text), !odd, "{byte:#04x} at {at} of {length}");
                }
            }
        }
    }

    #[test]
    fn a_combined_line_cannot_be_forged() {
        let mut out = Vec::new();
        combined_line(&mut out, &record(), &texts(b"/"), "22/Nov/2026:16:01:22 +0000");
        assert_eq!(
            String::from_utf8(out).expect("is ASCII"),
            "203.0.113.9 - - [22/Nov/2026:16:01:22 +0000] \"GET / HTTP/1.1\" 200 100 \"-\" \"curl/8\\x22\\x0a\"\n"
        );
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let shown = |unix: u64| DateCache::default().rfc3339(unix * 1_000_000).to_owned();
        assert_eq!(shown(0), "1970-01-01T00:00:00");
        assert_eq!(shown(951_782_400), "2000-02-29T00:00:00");
        assert_eq!(shown(1_709_251_199), "2024-02-29T23:59:59");
        assert_eq!(shown(4_102_444_800), "2100-01-01T00:00:00");
    }

    #[test]
    fn a_writer_that_is_stuck_costs_lines_and_not_time() {
        let (sender, receiver) = sync_channel(1);
        let log = LogSender { sender, wants_agent: false }.core();
        for _ in 0..3 {
            for _ in 0..10 {
                log.push_rejected("::1".parse().expect("address"), 400, Reason::BadRequestHead);
            }
            log.flush();
        }
        assert_eq!(log.take_dropped(), 20);
        assert_eq!(receiver.recv().expect("the first batch").0.records.len(), 10);
    }
}
