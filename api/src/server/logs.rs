//! Merging the output of instances: history by time, then new lines as they come, also those of copies that
//! start while somebody follows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{self, BoxStream, SelectAll};
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
/// Longest time to read what one instance has written.
const HISTORY_TIMEOUT_MS: u64 = 15_000;
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
        let limit = Duration::from_millis(HISTORY_TIMEOUT_MS);
        // Side by side: a machine that does not answer holds up the others for a while, not for its turn.
        let reads =
            join_all(instances.iter().map(|instance| tokio::time::timeout(limit, self.read(instance)))).await;
        for (index, (instance, read)) in instances.iter().zip(reads).enumerate() {
            match read {
                Ok(Ok(read)) => {
                    places.insert(instance.id.clone(), Place::after(&read));
                    lines.extend(read.into_iter().map(|line| (line, index)));
                }
                Ok(Err(error)) => tell(sender, &notice(instance, &error.to_string())).await?,
                Err(_) => {
                    let why = format!("nothing came within {HISTORY_TIMEOUT_MS} ms");
                    tell(sender, &notice(instance, &why)).await?;
                }
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
        let mut followed: BTreeMap<InstanceId, Followed> = BTreeMap::new();
        let mut pieces = SelectAll::new();
        let mut silence = tokio::time::interval(heartbeat);
        loop {
            for instance in self.instances() {
                if !followed.contains_key(&instance.id) {
                    let new = Followed::after(places.remove(&instance.id).unwrap_or_default(), instance);
                    self.open(sender, &new, &mut pieces).await?;
                    followed.insert(new.instance.id.clone(), new);
                }
            }
            if !self.is_still_there() && pieces.is_empty() {
                return Ok(());
            }
            tokio::select! {
                Some((id, piece)) = pieces.next(), if !pieces.is_empty() => {
                    if let Some(followed) = followed.get_mut(&id) {
                        followed.take(sender, piece).await?;
                    }
                }
                event = events.next() => if event.is_none() { return Ok(()) },
                _ = silence.tick() => {
                    sender.send(Bytes::from_static(b"\n")).await.map_err(|_| Gone)?;
                    self.open_again(sender, &mut followed, &mut pieces).await?;
                }
            }
        }
    }

    /// Output ends with a container or process that stops; the same instance may be started again.
    async fn open_again(
        &self,
        sender: &Sender,
        followed: &mut BTreeMap<InstanceId, Followed>,
        pieces: &mut SelectAll<BoxStream<'static, (InstanceId, Piece)>>,
    ) -> Result<(), Gone> {
        let there: BTreeSet<InstanceId> = self.instances().into_iter().map(|instance| instance.id).collect();
        followed.retain(|id, followed| !followed.ended || there.contains(id));
        for followed in followed.values_mut().filter(|followed| followed.ended) {
            *followed = Followed::after(followed.place, followed.instance.clone());
            self.open(sender, followed, pieces).await?;
        }
        Ok(())
    }

    async fn open(
        &self,
        sender: &Sender,
        followed: &Followed,
        pieces: &mut SelectAll<BoxStream<'static, (InstanceId, Piece)>>,
    ) -> Result<(), Gone> {
        let since = Some(followed.place).filter(|place| place.told > 0).map(|place| place.at).or(self.since);
        let options = LogOptions { follow: true, tail: None, since };
        let id = followed.instance.id.clone();
        match self.engine.logs(&id, options).await {
            Ok(lines) => {
                let pieces_of_it = lines.map(Piece::Line).chain(stream::once(std::future::ready(Piece::End)));
                pieces.push(pieces_of_it.map(move |piece| (id.clone(), piece)).boxed());
                Ok(())
            }
            Err(error) => tell(sender, &notice(&followed.instance, &error.to_string())).await,
        }
    }
}

/// What comes from an instance.
enum Piece {
    Line(Result<Told, EngineError>),
    End,
}

/// An instance whose output is followed.
struct Followed {
    instance: Instance,
    /// Up to where it was told.
    place: Place,
    /// What comes again before something new does.
    again: Option<Place>,
    ended: bool,
}

impl Followed {
    fn after(place: Place, instance: Instance) -> Self {
        Self { instance, place, again: Some(place), ended: false }
    }

    async fn take(&mut self, sender: &Sender, piece: Piece) -> Result<(), Gone> {
        match piece {
            Piece::Line(Ok(line)) if self.is_new(&line) => tell(sender, &told(&self.instance, line)).await,
            Piece::Line(Ok(_)) => Ok(()),
            Piece::Line(Err(error)) => tell(sender, &notice(&self.instance, &error.to_string())).await,
            Piece::End => {
                self.ended = true;
                Ok(())
            }
        }
    }

    fn is_new(&mut self, line: &Told) -> bool {
        if self.again.as_mut().is_some_and(|again| again.skips(line)) {
            return false;
        }
        self.again = None;
        if line.at == self.place.at {
            self.place.told += 1;
        } else {
            self.place = Place { at: line.at, told: 1 };
        }
        true
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
            return line.at < self.at;
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

fn notice(instance: &Instance, why: &str) -> LogLine {
    LogLine {
        time: jiff::Timestamp::now(),
        service: instance.service.clone(),
        instance: instance.id.to_string(),
        machine: instance.machine.clone(),
        source: LogSource::Notice,
        text: format!("the output of {} on {} cannot be read: {why}", instance.id, instance.machine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(at: UnixMs, text: &str) -> Told {
        Told { at, stderr: false, text: text.to_owned() }
    }

    fn instance() -> Instance {
        Instance {
            id: InstanceId("ins_1".into()),
            service: "shop".into(),
            version: 1,
            machine: "host-a".into(),
            epoch: 1,
            rollout: peregrine_engine::model::RolloutId("mov_1".into()),
            address: None,
            generation: 0,
            former: Vec::new(),
            state: InstanceState::Serving,
            created_at: 0,
        }
    }

    fn new_ones<'a>(followed: &mut Followed, lines: &'a [Told]) -> Vec<&'a str> {
        lines.iter().filter(|line| followed.is_new(line)).map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn following_after_the_history_tells_no_line_twice_and_leaves_none_out() {
        let history = VecDeque::from([line(1, "a"), line(2, "b"), line(2, "c")]);
        let mut followed = Followed::after(Place::after(&history), instance());
        let again = [line(2, "b"), line(2, "c"), line(2, "d"), line(3, "e")];
        assert_eq!(new_ones(&mut followed, &again), ["d", "e"]);
        let mut restarted = Followed::after(followed.place, instance());
        assert_eq!(
            new_ones(&mut restarted, &[line(3, "e"), line(3, "f"), line(2, "out of order")]),
            ["f", "out of order"]
        );
    }

    #[test]
    fn without_a_history_every_line_is_new() {
        let mut followed = Followed::after(Place::after(&VecDeque::new()), instance());
        assert_eq!(new_ones(&mut followed, &[line(0, "a"), line(5, "b"), line(5, "c")]), ["a", "b", "c"]);
    }
}
