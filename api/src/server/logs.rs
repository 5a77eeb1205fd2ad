//! Merging the output of instances: history by time, then new lines as they come, also those of copies that
//! start while somebody follows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{BoxStream, FusedStream, SelectAll};
use futures_util::{Stream, StreamExt};
use peregrine_engine::model::{Instance, InstanceId, InstanceState, UnixMs};
use peregrine_engine::runtime::{LogLine as Told, LogOptions};
use peregrine_engine::{EngineError, EngineHandle};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::types::{LogLine, LogSource, instant};

/// Lines that wait for a slow reader; the instances' own output waits behind them.
const WAITING_LINES: usize = 256;
/// Most lines of history that are sorted in memory, of all instances together.
const MAX_HISTORY_LINES: usize = 200_000;

/// Whose lines.
#[derive(Clone)]
pub(super) enum Which {
    /// Every instance of a service, those to come included.
    Service(String),
    /// One instance.
    Instance(InstanceId),
}

/// Lines to be read.
pub(super) struct Lines {
    pub(super) engine: EngineHandle,
    pub(super) which: Which,
    /// So many of the last lines.
    pub(super) tail: Option<usize>,
    /// Lines since then.
    pub(super) since: Option<UnixMs>,
}

/// Where a reader stands in the output of an instance, which is in order of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    at: UnixMs,
    /// Lines of that very millisecond that were told.
    told: usize,
}

type Sender = mpsc::Sender<Bytes>;

/// The reader is gone.
struct Gone;

impl Lines {
    /// The lines as NDJSON. Ends with the history, or, if followed, with the service or the server.
    pub(super) fn stream(
        self,
        follow: bool,
        heartbeat: Duration,
        closing: CancellationToken,
    ) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        let (sender, receiver) = mpsc::channel(WAITING_LINES);
        tokio::spawn(async move {
            let work = async {
                let places = self.history(&sender).await?;
                if follow { self.follow(&sender, places, heartbeat).await } else { Ok(()) }
            };
            tokio::select! {
                _ = work => {}
                () = sender.closed() => {}
                () = closing.cancelled() => {}
            }
        });
        ReceiverStream::new(receiver).map(Ok)
    }

    fn instances(&self) -> Vec<Instance> {
        let state = self.engine.state();
        let wanted = |instance: &&Instance| match &self.which {
            Which::Service(name) => instance.service == *name,
            Which::Instance(id) => instance.id == *id,
        };
        // Nothing runs yet behind a planned one, and asking for its output would only fail.
        let runs = |instance: &&Instance| instance.state != InstanceState::Planned;
        state.instances.values().filter(wanted).filter(runs).cloned().collect()
    }

    fn is_still_there(&self) -> bool {
        let state = self.engine.state();
        match &self.which {
            Which::Service(name) => state.services.contains_key(name),
            Which::Instance(id) => state.instances.contains_key(id),
        }
    }

    /// Tells what has been written, in order of time, and says where each instance's output stands.
    async fn history(&self, sender: &Sender) -> Result<BTreeMap<InstanceId, Place>, Gone> {
        let mut places = BTreeMap::new();
        let mut lines: Vec<(Told, usize)> = Vec::new();
        let instances = self.instances();
        for (index, instance) in instances.iter().enumerate() {
            match self.read(instance).await {
                Ok(read) => {
                    places.insert(instance.id.clone(), Place::after(&read));
                    lines.extend(read.into_iter().map(|line| (line, index)));
                }
                Err(error) => tell(sender, &notice(instance, &error)).await?,
            }
        }
        lines.sort_by_key(|(line, _)| line.at); // stable: lines of one instance keep their order
        let skipped = self.tail.map_or(0, |tail| lines.len().saturating_sub(tail));
        for (line, index) in lines.drain(skipped..) {
            tell(sender, &told(&instances[index], line)).await?;
        }
        Ok(places)
    }

    /// The last lines of one instance.
    async fn read(&self, instance: &Instance) -> Result<VecDeque<Told>, EngineError> {
        let options = LogOptions { follow: false, tail: self.tail, since: self.since };
        let mut stream = self.engine.logs(&instance.id, options).await?;
        let mut lines = VecDeque::new();
        let most = self.tail.unwrap_or(MAX_HISTORY_LINES).min(MAX_HISTORY_LINES);
        while let Some(line) = stream.next().await {
            lines.push_back(line?);
            if lines.len() > most {
                lines.pop_front();
            }
        }
        Ok(lines)
    }

    /// Tells new lines until the service or instance is gone.
    async fn follow(
        &self,
        sender: &Sender,
        mut places: BTreeMap<InstanceId, Place>,
        heartbeat: Duration,
    ) -> Result<(), Gone> {
        let mut events = self.engine.events(self.engine.last_event());
        let mut followed = BTreeSet::new();
        let mut lines = SelectAll::new();
        let mut silence = tokio::time::interval(heartbeat);
        loop {
            for instance in self.instances() {
                if followed.insert(instance.id.clone()) {
                    let place = places.remove(&instance.id);
                    match self.new_lines(&instance, place).await {
                        Ok(stream) => lines.push(stream),
                        Err(error) => tell(sender, &notice(&instance, &error)).await?,
                    }
                }
            }
            if !self.is_still_there() && lines.is_terminated() {
                return Ok(());
            }
            tokio::select! {
                Some(line) = lines.next(), if !lines.is_terminated() => tell(sender, &line).await?,
                event = events.next() => if event.is_none() { return Ok(()) },
                _ = silence.tick() => sender.send(Bytes::from_static(b"\n")).await.map_err(|_| Gone)?,
            }
        }
    }

    /// Lines of one instance after a place, for as long as it writes.
    async fn new_lines(
        &self,
        instance: &Instance,
        place: Option<Place>,
    ) -> Result<BoxStream<'static, LogLine>, EngineError> {
        let since = place.filter(|place| place.told > 0).map(|place| place.at).or(self.since);
        let options = LogOptions { follow: true, tail: None, since };
        let stream = self.engine.logs(&instance.id, options).await?;
        let instance = instance.clone();
        let mut place = place.unwrap_or_default();
        let told = stream.filter_map(move |line| {
            let line = match line {
                Ok(line) if place.skips(&line) => None,
                Ok(line) => Some(told(&instance, line)),
                Err(error) => Some(notice(&instance, &error)),
            };
            std::future::ready(line)
        });
        Ok(told.boxed())
    }
}

impl Place {
    fn after(lines: &VecDeque<Told>) -> Self {
        let Some(last) = lines.back() else { return Self::default() };
        let told = lines.iter().rev().take_while(|line| line.at == last.at).count();
        Self { at: last.at, told }
    }

    /// Whether a line that comes again was told before.
    fn skips(&mut self, line: &Told) -> bool {
        if line.at != self.at || self.told == 0 {
            return line.at < self.at && self.told > 0;
        }
        self.told -= 1;
        true
    }
}

async fn tell(sender: &Sender, line: &LogLine) -> Result<(), Gone> {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    sender.send(text.into()).await.map_err(|_| Gone)
}

fn told(instance: &Instance, line: Told) -> LogLine {
    LogLine {
        time: instant(line.at),
        service: instance.service.clone(),
        instance: instance.id.to_string(),
        machine: instance.machine.clone(),
        source: if line.stderr { LogSource::Stderr } else { LogSource::Stdout },
        text: line.text,
    }
}

fn notice(instance: &Instance, error: &EngineError) -> LogLine {
    LogLine {
        time: jiff::Timestamp::now(),
        service: instance.service.clone(),
        instance: instance.id.to_string(),
        machine: instance.machine.clone(),
        source: LogSource::Notice,
        text: format!("the output of {} on {} cannot be read: {error}", instance.id, instance.machine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(at: UnixMs, text: &str) -> Told {
        Told { at, stderr: false, text: text.to_owned() }
    }

    #[test]
    fn following_after_the_history_tells_no_line_twice_and_leaves_none_out() {
        let history = VecDeque::from([line(1, "a"), line(2, "b"), line(2, "c")]);
        let mut place = Place::after(&history);
        assert_eq!(place, Place { at: 2, told: 2 });
        let again = [line(2, "b"), line(2, "c"), line(2, "d"), line(3, "e")];
        let new: Vec<_> =
            again.iter().filter(|line| !place.skips(line)).map(|line| line.text.as_str()).collect();
        assert_eq!(new, ["d", "e"]);
    }

    #[test]
    fn without_a_history_every_line_is_new() {
        let mut place = Place::after(&VecDeque::new());
        assert!(!place.skips(&line(0, "a")) && !place.skips(&line(5, "b")));
    }
}
