//! An exhaustive model of one move: two hosts, an engine that may die between any two of its deeds, an edge in a
//! process of its own that may die and starts from the last table that it has saved, messages that are lost, doubled
//! and overtaken, copies that die, and a client that writes.
//!
//! Small on purpose, and complete: every order of everything is visited. The steps, where each leaves the traffic,
//! how it is undone and which way health sends it are those of the engine itself (`peregrine_engine::order`).

use std::collections::HashMap;

use peregrine_engine::order::{Kind, Traffic, Undo, Vital, is_stranded, to_undo, turns_back};
use peregrine_routing::{Evidence, RetryClass};
use stateright::{Checker, Model, Property};

/// A move with a soak, as the planner makes it.
const PLAN: [Kind; 7] =
    [Kind::Claim, Kind::Start, Kind::Warm, Kind::Shift, Kind::Shift, Kind::Drain, Kind::Release];

/// A move of a service of which one copy may run.
const CUTOVER: [Kind; 7] =
    [Kind::Claim, Kind::Hold, Kind::Stop, Kind::Start, Kind::Warm, Kind::Switch, Kind::Release];

/// How much may go wrong in one history.
#[derive(Clone, Copy)]
struct Bounds {
    engine_deaths: u8,
    copy_deaths: u8,
    edge_deaths: u8,
    lost: u8,
    doubled: u8,
    aborts: u8,
    writes: u8,
}

/// What a test may take of memory: some hundred bytes each.
const MAX_STATES: usize = 3_000_000;
/// Messages that are under way at once.
const MAX_UNDER_WAY: usize = 2;

const OLD: usize = 0;
const NEW: usize = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Host {
    Empty,
    Runs,
    Dead,
}

/// What a table says of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Named {
    Not,
    /// With a share of 0, and not a standby.
    Warming,
    Share,
}

/// A table, with the term of the engine that made it and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Stamp(u8, u8);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Table {
    stamp: Stamp,
    names: [Named; 2],
}

/// What is stored: it survives every engine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Journal {
    step: u8,
    begun: u8,
    back: bool,
    /// Undos that are settled, as bits.
    undone: u8,
    end: Option<bool>,
    abort: bool,
}

/// What the engine is about to do; forgotten with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Deed {
    /// To decide what comes next, from the journal.
    Decide,
    /// The intent is stored: forward, or back.
    Begun(u8, bool),
    /// The traffic goes back first, then the new copy is drained.
    Restored(u8),
    /// A table is out; when it is acknowledged and `leaves` is empty, the deed goes on.
    Waits { step: u8, back: bool, leaves: Option<u8> },
    /// It is done and not yet settled.
    Done(u8, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Table(Stamp, [u8; 2]),
    /// What the edge uses, and who is inside of which copy.
    Used(Stamp, [bool; 2]),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    plan: &'static [Kind],
    journal: Journal,
    engine: Option<Deed>,
    term: u8,
    published: Table,
    /// The last thing that the engine heard of the edge, in this term.
    heard: Option<(Stamp, [bool; 2])>,
    edge: Table,
    edge_lives: bool,
    /// What the edge has on its disk, and starts from.
    saved: Table,
    /// The lease of the edge has ended, and it has not been heard since: nobody waits for it.
    gone: bool,
    /// That was so once. An edge that comes back then sends by its old table until it is connected: what it loses by that, it
    /// loses by its own death.
    was_gone: bool,
    hosts: [Host; 2],
    inside: [bool; 2],
    /// Of the present write: it was sent to nobody yet, it is under way, and how often it was executed.
    write: Write,
    net: Vec<Message>,
    left: [u8; 7],
    /// Said by whoever saw something that must not be.
    wrong: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Write {
    None,
    /// It looks for a copy; it may have been executed before.
    Waits {
        executed: u8,
    },
    Inside {
        copy: u8,
        executed: u8,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Action {
    Engine,
    EngineDies,
    EngineStarts,
    Deliver(usize),
    Lose(usize),
    Double(usize),
    Again,
    EdgeSays,
    EdgeSaves,
    EdgeDies,
    EdgeStarts,
    LeaseEnds,
    CopyDies(usize),
    Abort,
    ClientWrites,
    WriteGoes(usize),
    WriteEnds,
}

struct Move(Bounds, &'static [Kind]);

fn named_of(traffic: Traffic, step: Kind) -> [Named; 2] {
    match (traffic, step) {
        (Traffic::Old, Kind::Claim | Kind::Prepare) => [Named::Share, Named::Not],
        (Traffic::Old, _) => [Named::Share, Named::Warming],
        (Traffic::Both, _) => [Named::Share, Named::Share],
        (Traffic::New, _) => [Named::Not, Named::Share],
    }
}

const fn code(named: Named) -> u8 {
    named as u8
}

const fn decode(code: u8) -> Named {
    match code {
        0 => Named::Not,
        1 => Named::Warming,
        _ => Named::Share,
    }
}

fn vital(host: Host) -> Option<Vital> {
    match host {
        Host::Empty => None,
        Host::Runs => Some(Vital::Good),
        Host::Dead => Some(Vital::Dead),
    }
}

impl State {
    fn publish(&mut self, names: [Named; 2]) {
        if self.published.names != names {
            let Stamp(_, number) = self.published.stamp;
            self.published = Table { stamp: Stamp(self.term, number + 1), names };
        }
        self.send_table();
    }

    fn send_table(&mut self) {
        let table = Message::Table(self.published.stamp, self.published.names.map(code));
        self.send(table);
    }

    /// The network is a set: what is under way already is not sent again. What finds it full, or nobody there, is lost.
    fn send(&mut self, message: Message) {
        if self.edge_lives
            && let Err(at) = self.net.binary_search(&message)
            && self.net.len() < MAX_UNDER_WAY
        {
            self.net.insert(at, message);
        }
    }

    /// Whether the edge uses the present table and nobody is inside of a copy, or there is no edge.
    fn is_clear(&self, leaves: Option<u8>) -> bool {
        if self.gone {
            return true;
        }
        let Some((stamp, inside)) = self.heard else { return false };
        stamp == self.published.stamp && leaves.is_none_or(|copy| !inside[usize::from(copy)])
    }

    fn remove(&mut self, copy: usize) {
        if self.hosts[copy] == Host::Runs && self.inside[copy] && !self.was_gone {
            self.wrong = Some("a copy was stopped with a request inside");
        }
        let sends = self.edge_lives && self.edge.names[copy] == Named::Share;
        if self.hosts[copy] == Host::Runs && sends && !self.was_gone {
            self.wrong = Some("a copy was stopped that the edge still sends requests to");
        }
        self.hosts[copy] = Host::Empty;
        self.breaks_off(copy);
    }

    /// A copy is no more. What was inside of it is lost, and nobody knows whether it was done: the edge's own rule says
    /// what follows.
    fn breaks_off(&mut self, copy: usize) {
        self.inside[copy] = false;
        if let Write::Inside { copy: at, executed } = self.write
            && usize::from(at) == copy
        {
            let again = matches!(Evidence::Ambiguous.class(), RetryClass::A | RetryClass::B);
            self.write = if again { Write::Waits { executed } } else { Write::None };
        }
    }

    fn run(&mut self, copy: usize) {
        self.hosts[copy] = Host::Runs;
        if self.is_cutover() && self.hosts == [Host::Runs, Host::Runs] {
            self.wrong = Some("two copies of a single writer run");
        }
    }

    fn is_cutover(&self) -> bool {
        self.plan.contains(&Kind::Hold)
    }

    /// Nobody is meant to be reachable: from the hold to the switch, or to the end of the way back.
    fn is_held(&self) -> bool {
        let at = |kind: Kind| self.plan.iter().position(|step| *step == kind);
        let (Some(hold), Some(switch)) = (at(Kind::Hold), at(Kind::Switch)) else { return false };
        let switched = usize::from(self.journal.step) > switch;
        self.begun(hold) && !switched && self.journal.undone & (1 << hold) == 0
    }

    fn begun(&self, step: usize) -> bool {
        self.journal.begun & (1 << step) != 0
    }

    fn had_shifted(&self) -> bool {
        (0..self.plan.len()).any(|step| self.begun(step) && self.plan[step].row().traffic != Traffic::Old)
    }

    fn past_return(&self) -> bool {
        (0..self.plan.len()).any(|step| self.begun(step) && !self.plan[step].row().returns)
    }

    fn next_undo(&self) -> Option<u8> {
        let all = to_undo(self.plan, |step| self.begun(step));
        let left = all.into_iter().find(|step| self.journal.undone & (1 << step) == 0)?;
        u8::try_from(left).ok()
    }

    /// One thing that the engine does; `None` if it waits.
    fn engine_acts(&mut self) -> Option<()> {
        let deed = self.engine?;
        let (old, new) = (vital(self.hosts[OLD]), vital(self.hosts[NEW]));
        let forward = matches!(deed, Deed::Decide | Deed::Begun(_, false) | Deed::Waits { back: false, .. });
        if forward && !self.journal.back && self.journal.end.is_none() && !self.past_return() {
            let kind = self.plan.get(usize::from(self.journal.step)).copied().unwrap_or(Kind::Release);
            let aborted = self.journal.abort && !(kind.row().by_health && is_stranded(old, new));
            if aborted || turns_back(kind, old, new) {
                self.journal.back = true;
                self.journal.undone = 0;
                self.engine = Some(Deed::Decide);
                return Some(());
            }
        }
        if self.journal.back && is_stranded(old, new) && self.had_shifted() && self.journal.end.is_none() {
            self.journal.back = false;
            self.journal.abort = false;
            let last = self.plan.iter().rposition(|kind| *kind == Kind::Shift).unwrap_or(0);
            self.journal.step = u8::try_from(last).unwrap_or(0);
            self.engine = Some(Deed::Decide);
            return Some(());
        }
        self.engine = Some(match deed {
            Deed::Decide => return self.decide(),
            Deed::Begun(step, false) => self.forward(step)?,
            Deed::Begun(step, true) => self.back(step),
            Deed::Restored(step) => {
                self.is_clear(None).then_some(())?;
                self.publish([Named::Share, Named::Not]);
                Deed::Waits { step, back: true, leaves: Some(1) }
            }
            Deed::Waits { step, back, leaves } => {
                self.is_clear(leaves).then_some(())?;
                if !back && matches!(self.plan[usize::from(step)], Kind::Stop | Kind::Release) {
                    self.remove(OLD);
                }
                Deed::Done(step, back)
            }
            Deed::Done(step, back) => {
                if back {
                    self.journal.undone |= 1 << step;
                } else {
                    self.journal.step = step + 1;
                }
                Deed::Decide
            }
        });
        Some(())
    }

    fn decide(&mut self) -> Option<()> {
        if self.journal.end.is_some() {
            // The table of the end: whoever serves has all of it.
            let names = self.names_at_the_end();
            let says_so = self.published.names == names;
            self.publish(names);
            return (!says_so).then_some(());
        }
        let next = if self.journal.back { self.next_undo() } else { Some(self.journal.step) };
        match next {
            Some(step) if self.journal.back => self.engine = Some(Deed::Begun(step, true)),
            Some(step) if usize::from(step) < self.plan.len() => {
                self.journal.begun |= 1 << step;
                self.engine = Some(Deed::Begun(step, false));
            }
            _ => self.journal.end = Some(!self.journal.back),
        }
        Some(())
    }

    fn names_at_the_end(&self) -> [Named; 2] {
        if self.journal.end == Some(true) { [Named::Not, Named::Share] } else { [Named::Share, Named::Not] }
    }

    fn forward(&mut self, step: u8) -> Option<Deed> {
        let kind = self.plan[usize::from(step)];
        let names = named_of(kind.row().traffic, kind);
        Some(match kind {
            Kind::Claim | Kind::Prepare => Deed::Done(step, false),
            // What waits at the edge is not modelled: who has no share gets nothing, and that is all there is to a hold.
            Kind::Hold => {
                self.publish([Named::Warming, Named::Not]);
                Deed::Waits { step, back: false, leaves: None }
            }
            Kind::Stop => {
                self.publish([Named::Not, Named::Not]);
                Deed::Waits { step, back: false, leaves: Some(0) }
            }
            Kind::Start => {
                self.run(NEW);
                self.publish(if self.is_cutover() { [Named::Not, Named::Warming] } else { names });
                Deed::Done(step, false)
            }
            Kind::Warm if self.hosts[NEW] != Host::Runs => {
                self.journal.back = true;
                self.journal.undone = 0;
                Deed::Decide
            }
            Kind::Warm => Deed::Done(step, false),
            Kind::Shift => {
                // The last shift leaves nothing to the old copy, nor does any if it is dead.
                let last = self.plan[usize::from(step) + 1..].iter().all(|kind| *kind != Kind::Shift);
                let names = if last || self.hosts[OLD] != Host::Runs {
                    [Named::Warming, Named::Share]
                } else {
                    names
                };
                self.publish(names);
                Deed::Waits { step, back: false, leaves: None }
            }
            Kind::Switch => {
                self.publish(names);
                Deed::Waits { step, back: false, leaves: None }
            }
            Kind::Drain | Kind::Soak | Kind::Release => {
                self.publish(names);
                Deed::Waits { step, back: false, leaves: Some(0) }
            }
        })
    }

    fn back(&mut self, step: u8) -> Deed {
        match self.plan[usize::from(step)].row().undo {
            Undo::Nothing => Deed::Done(step, true),
            Undo::Restart => {
                self.run(OLD);
                Deed::Done(step, true)
            }
            Undo::Release => {
                self.publish([Named::Share, Named::Not]);
                Deed::Waits { step, back: true, leaves: None }
            }
            Undo::Remove => {
                self.publish(if self.is_cutover() {
                    [Named::Not, Named::Not]
                } else {
                    [Named::Share, Named::Not]
                });
                self.remove_new_when_clear(step)
            }
            Undo::Traffic => {
                self.publish([Named::Share, Named::Warming]);
                Deed::Restored(step)
            }
        }
    }

    fn remove_new_when_clear(&mut self, step: u8) -> Deed {
        // A copy that never had a share has nobody inside; one that had was drained by the undo of its shift.
        self.remove(NEW);
        Deed::Done(step, true)
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Table(stamp, names) => {
                if stamp > self.edge.stamp {
                    self.edge = Table { stamp, names: names.map(decode) };
                }
                // Who does not die never reads it: then it makes no difference when it is saved, only more states.
                if self.left[6] == 0 {
                    self.saved = self.edge;
                }
                self.edge_says();
            }
            Message::Used(stamp, inside) => {
                self.gone &= self.engine.is_none();
                if self.engine.is_some() && stamp == self.published.stamp {
                    // Words of one table may overtake one another: who has left does not come back.
                    let before = self.heard.filter(|(of, _)| *of == stamp).map(|(_, inside)| inside);
                    let less = |copy: usize| {
                        inside[copy]
                            && before
                                .is_none_or(|before| before[copy] || self.published.names[copy] != Named::Not)
                    };
                    self.heard = Some((stamp, [less(OLD), less(NEW)]));
                }
            }
        }
    }

    /// A table is acknowledged when it is saved, so that nobody starts again from one before.
    fn edge_says(&mut self) {
        if self.saved == self.edge {
            self.send(Message::Used(self.edge.stamp, self.inside));
        }
    }

    /// A copy that the edge would send to and that runs.
    fn is_reachable(&self) -> bool {
        let shares = |copy: usize| self.edge.names[copy] == Named::Share && self.hosts[copy] == Host::Runs;
        self.edge_lives && (shares(OLD) || shares(NEW))
    }
}

impl Model for Move {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let table = Table { stamp: Stamp(1, 0), names: [Named::Share, Named::Not] };
        let bounds = self.0;
        vec![State {
            plan: self.1,
            journal: Journal { step: 0, begun: 0, back: false, undone: 0, end: None, abort: false },
            engine: Some(Deed::Decide),
            term: 1,
            published: table,
            heard: None,
            edge: table,
            edge_lives: true,
            saved: table,
            gone: false,
            was_gone: false,
            hosts: [Host::Runs, Host::Empty],
            inside: [false, false],
            write: Write::None,
            net: Vec::new(),
            left: [
                bounds.engine_deaths,
                bounds.copy_deaths,
                bounds.lost,
                bounds.doubled,
                bounds.aborts,
                bounds.writes,
                bounds.edge_deaths,
            ],
            wrong: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let [engine_deaths, copy_deaths, lost, doubled, aborts, writes, edge_deaths] = state.left;
        if state.engine.is_some() {
            actions.push(Action::Engine);
            if !state.edge_lives && !state.gone {
                actions.push(Action::LeaseEnds);
            }
            if engine_deaths > 0 && state.journal.end.is_none() {
                actions.push(Action::EngineDies);
            }
            if aborts > 0 && !state.journal.abort && !state.journal.back && !state.past_return() {
                actions.push(Action::Abort);
            }
        } else {
            actions.push(Action::EngineStarts);
        }
        for at in 0..state.net.len() {
            actions.push(Action::Deliver(at));
            if lost > 0 {
                actions.push(Action::Lose(at));
            }
            if doubled > 0 {
                actions.push(Action::Double(at));
            }
        }
        // Whoever waits says it again; said once more while it is under way would be no other state.
        if state.engine.is_some() && state.net.is_empty() {
            actions.push(Action::Again);
        }
        for copy in [OLD, NEW] {
            if copy_deaths > 0 && state.hosts[copy] == Host::Runs {
                actions.push(Action::CopyDies(copy));
            }
        }
        if !state.edge_lives {
            actions.push(Action::EdgeStarts);
            return;
        }
        if edge_deaths > 0 && state.journal.end.is_none() {
            actions.push(Action::EdgeDies);
        }
        if state.saved != state.edge {
            actions.push(Action::EdgeSaves);
        }
        match state.write {
            Write::None if writes > 0 => actions.push(Action::ClientWrites),
            Write::None => {}
            Write::Waits { .. } => {
                for copy in [OLD, NEW] {
                    if state.edge.names[copy] == Named::Share {
                        actions.push(Action::WriteGoes(copy));
                    }
                }
            }
            Write::Inside { .. } => actions.push(Action::WriteEnds),
        }
        if state.write == Write::None && state.net.is_empty() {
            actions.push(Action::EdgeSays);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Engine => state.engine_acts()?,
            Action::EngineDies => {
                state.left[0] -= 1;
                state.engine = None;
                state.heard = None;
            }
            Action::EngineStarts => {
                state.term += 1;
                state.engine = Some(Deed::Decide);
                // Rendered from what is stored: the table of the last deed, under a new stamp.
                state.published.stamp = Stamp(state.term, 0);
                state.send_table();
            }
            Action::Deliver(at) => {
                let message = state.net.remove(at);
                state.deliver(message);
            }
            Action::Lose(at) => {
                state.left[2] -= 1;
                state.net.remove(at);
            }
            Action::Double(at) => {
                state.left[3] -= 1;
                let message = state.net[at];
                state.deliver(message);
            }
            Action::Again => state.send_table(),
            Action::EdgeSays => state.edge_says(),
            Action::EdgeSaves => {
                state.saved = state.edge;
                state.edge_says();
            }
            // Its connections are over, and all that was on them: to the engine, to copies, of clients.
            Action::EdgeDies => {
                state.left[6] -= 1;
                state.edge_lives = false;
                state.net.clear();
                state.inside = [false, false];
                state.write = Write::None;
            }
            Action::EdgeStarts => {
                state.edge_lives = true;
                state.edge = state.saved;
                state.edge_says();
            }
            Action::LeaseEnds => {
                state.gone = true;
                state.was_gone = true;
            }
            Action::CopyDies(copy) => {
                state.left[1] -= 1;
                state.hosts[copy] = Host::Dead;
                state.breaks_off(copy);
            }
            Action::Abort => {
                state.left[4] -= 1;
                state.journal.abort = true;
            }
            Action::ClientWrites => {
                state.left[5] -= 1;
                state.write = Write::Waits { executed: 0 };
            }
            Action::WriteGoes(copy) => {
                if state.hosts[copy] != Host::Runs {
                    return None; // nobody listens: nothing was sent, and another one is tried (class A)
                }
                state.inside[copy] = true;
                let executed = if let Write::Waits { executed } = state.write { executed } else { 0 };
                let copy = u8::try_from(copy).unwrap_or(0);
                state.write = Write::Inside { copy, executed: executed + 1 };
            }
            Action::WriteEnds => {
                if let Write::Inside { copy, .. } = state.write {
                    state.inside[usize::from(copy)] = false;
                }
                state.write = Write::None;
            }
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nobody is inside of a copy that is stopped", |_, state: &State| {
                state.wrong.is_none()
            }),
            Property::always("never two writers", |_, state: &State| {
                let both = state.inside[OLD] && state.inside[NEW];
                let twice = matches!(state.write, Write::Inside { executed, .. } if executed > 1);
                !both && !twice
            }),
            Property::always("while nobody dies, a copy is reachable", |model: &Self, state: &State| {
                let died = state.left[1] < model.0.copy_deaths || state.left[6] < model.0.edge_deaths;
                died || state.is_held() || state.is_reachable()
            }),
            Property::always(
                "at the end, the copy that holds the service is reachable",
                |_, state: &State| {
                    let Some(succeeded) = state.journal.end else { return true };
                    let holder = if succeeded { NEW } else { OLD };
                    let told = state.edge_lives
                        && state.edge == state.published
                        && state.published.names == state.names_at_the_end();
                    !told || state.hosts[holder] != Host::Runs || state.is_reachable()
                },
            ),
            Property::sometimes("it succeeds", |_, state: &State| state.journal.end == Some(true)),
            Property::sometimes("it goes back", |_, state: &State| state.journal.end == Some(false)),
            Property::sometimes("it goes back and forward again", |_, state: &State| {
                state.journal.end == Some(true) && state.journal.undone != 0
            }),
        ]
    }
}

/// Every state that can be reached; whether an end can be reached from each of them. With messages that are said
/// again until they are heard, this is what "it always ends" means.
fn ends_from_everywhere(model: &Move) -> usize {
    let mut known: HashMap<State, usize> = HashMap::new();
    let mut states: Vec<State> = Vec::new();
    let mut came_from: Vec<Vec<usize>> = Vec::new();
    for state in model.init_states() {
        known.insert(state.clone(), states.len());
        states.push(state);
        came_from.push(Vec::new());
    }
    let mut at = 0;
    let mut actions = Vec::new();
    while at < states.len() {
        let state = states[at].clone();
        model.actions(&state, &mut actions);
        for action in actions.drain(..) {
            let Some(next) = model.next_state(&state, action) else { continue };
            let number = *known.entry(next).or_insert_with_key(|next| {
                states.push(next.clone());
                came_from.push(Vec::new());
                states.len() - 1
            });
            came_from[number].push(at);
        }
        at += 1;
        assert!(states.len() <= MAX_STATES, "more than {MAX_STATES} states: the bounds are too wide");
    }
    let mut ends: Vec<usize> =
        (0..states.len()).filter(|state| states[*state].journal.end.is_some()).collect();
    let mut can_end = vec![false; states.len()];
    ends.iter().for_each(|state| can_end[*state] = true);
    while let Some(state) = ends.pop() {
        for before in &came_from[state] {
            if !std::mem::replace(&mut can_end[*before], true) {
                ends.push(*before);
            }
        }
    }
    let stuck = (0..states.len()).find(|state| !can_end[*state]).map(|state| &states[state]);
    assert_eq!(stuck, None, "from here no end can be reached");
    states.len()
}

fn check(bounds: Bounds) {
    check_plan(bounds, &PLAN);
}

fn check_plan(bounds: Bounds, plan: &'static [Kind]) {
    let states = ends_from_everywhere(&Move(bounds, plan));
    let checker = Move(bounds, plan).checker().threads(2).spawn_bfs().join();
    checker.assert_no_discovery("nobody is inside of a copy that is stopped");
    checker.assert_no_discovery("never two writers");
    checker.assert_no_discovery("while nobody dies, a copy is reachable");
    checker.assert_no_discovery("at the end, the copy that holds the service is reachable");
    checker.assert_any_discovery("it succeeds");
    if bounds.aborts > 0 || bounds.copy_deaths > 0 {
        checker.assert_any_discovery("it goes back");
    }
    if bounds.copy_deaths > 0 && bounds.aborts > 0 && plan == PLAN {
        checker.assert_any_discovery("it goes back and forward again");
    }
    println!("{states} states");
    assert!(states > 100, "only {states} states");
}

const NOTHING: Bounds =
    Bounds { engine_deaths: 0, copy_deaths: 0, edge_deaths: 0, lost: 0, doubled: 0, aborts: 0, writes: 1 };

#[test]
fn an_engine_that_dies_anywhere_on_any_way_ends_its_move_and_stops_nobody() {
    check(Bounds { engine_deaths: 2, aborts: 1, ..NOTHING });
}

#[test]
fn a_copy_that_dies_anywhere_leaves_the_traffic_with_the_other_one() {
    check(Bounds { copy_deaths: 1, engine_deaths: 1, aborts: 1, ..NOTHING });
}

#[test]
fn messages_that_are_lost_and_doubled_change_nothing() {
    check(Bounds { lost: 1, doubled: 1, aborts: 1, ..NOTHING });
}

#[test]
fn an_edge_that_dies_anywhere_and_comes_back_or_does_not_stops_no_move_and_no_request_but_its_own() {
    check(Bounds { edge_deaths: 1, aborts: 1, ..NOTHING });
    check(Bounds { edge_deaths: 1, engine_deaths: 1, ..NOTHING });
    check(Bounds { edge_deaths: 1, copy_deaths: 1, ..NOTHING });
    check(Bounds { edge_deaths: 1, lost: 1, ..NOTHING });
    check_plan(Bounds { edge_deaths: 1, engine_deaths: 1, ..NOTHING }, &CUTOVER);
    check_plan(Bounds { edge_deaths: 1, copy_deaths: 1, ..NOTHING }, &CUTOVER);
}

#[test]
fn both_copies_may_die() {
    check(Bounds { copy_deaths: 2, aborts: 1, ..NOTHING });
}

#[test]
fn of_a_single_writer_never_two_copies_run_whoever_dies_and_whatever_is_lost() {
    check_plan(Bounds { engine_deaths: 2, aborts: 1, ..NOTHING }, &CUTOVER);
    check_plan(Bounds { copy_deaths: 2, engine_deaths: 1, aborts: 1, ..NOTHING }, &CUTOVER);
    check_plan(Bounds { lost: 1, doubled: 1, aborts: 1, ..NOTHING }, &CUTOVER);
}

#[test]
fn the_plan_of_the_model_is_one_that_the_table_allows() {
    assert!(PLAN.windows(2).all(|pair| pair[0].may_precede(pair[1])));
    assert!(CUTOVER.windows(2).all(|pair| pair[0].may_precede(pair[1])));
}
