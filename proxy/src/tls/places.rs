//! How many handshakes a core works at, at a time: in all, and for each network that they come from. Who finds no place
//! waits in the line of its network, and the lines are served in turn, so that one that floods waits for itself.
//!
//! A place is taken when a hello is whole: whoever sends nothing, or a byte a second, takes none.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A network that is counted as one: /24 of IPv4, /48 of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Network(u64);

impl Network {
    pub(crate) fn of(address: IpAddr) -> Self {
        /// No /48 of IPv6 has this bit.
        const IPV4: u64 = 1 << 63;
        match address.to_canonical() {
            IpAddr::V4(address) => {
                let [a, b, c, _] = address.octets();
                Self(IPV4 | u64::from(u32::from_be_bytes([0, a, b, c])))
            }
            IpAddr::V6(address) => {
                let [a, b, c, ..] = address.segments();
                Self(u64::from(a) << 32 | u64::from(b) << 16 | u64::from(c))
            }
        }
    }
}

/// Somebody who waits.
#[derive(Default)]
struct Waiting {
    granted: Cell<bool>,
    left: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// What is known of a network while a handshake of it is under way.
#[derive(Default)]
struct Line {
    held: u32,
    waiting: VecDeque<Rc<Waiting>>,
    /// It is among those whose turn comes.
    in_turn: bool,
}

#[derive(Default)]
struct Inner {
    held: u32,
    lines: HashMap<Network, Line>,
    /// Networks with somebody who waits and may go on as soon as the core has a place.
    turns: VecDeque<Network>,
}

/// The places of a core.
pub(crate) struct Places {
    max: u32,
    max_per_network: u32,
    inner: RefCell<Inner>,
}

/// A place; free again when it is dropped.
pub(crate) struct Place {
    places: Rc<Places>,
    network: Network,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.free(self.network);
    }
}

/// Somebody in a line, who may leave it.
struct InLine<'a> {
    places: &'a Rc<Places>,
    network: Network,
    waiting: Rc<Waiting>,
    taken: bool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.waiting.left.set(true);
        if self.waiting.granted.get() && !self.taken {
            self.places.free(self.network);
        }
    }
}

impl Places {
    pub(crate) fn new(max: u32, max_per_network: u32) -> Rc<Self> {
        Rc::new(Self { max, max_per_network, inner: RefCell::default() })
    }

    /// Takes a place, when there is one; `delayed` is called if that is not now.
    pub(crate) async fn enter(self: &Rc<Self>, network: Network, delayed: impl FnOnce()) -> Place {
        if !self.try_enter(network) {
            delayed();
            let mut in_line = InLine { places: self, network, waiting: self.queue(network), taken: false };
            poll_fn(|cx| {
                if in_line.waiting.granted.get() {
                    return Poll::Ready(());
                }
                *in_line.waiting.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            })
            .await;
            in_line.taken = true;
        }
        Place { places: Rc::clone(self), network }
    }

    fn try_enter(&self, network: Network) -> bool {
        let mut inner = self.inner.borrow_mut();
        if inner.held >= self.max {
            return false;
        }
        let line = inner.lines.entry(network).or_default();
        if line.held >= self.max_per_network || !line.waiting.is_empty() {
            return false;
        }
        line.held += 1;
        inner.held += 1;
        true
    }

    fn queue(&self, network: Network) -> Rc<Waiting> {
        let waiting = Rc::<Waiting>::default();
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let line = inner.lines.entry(network).or_default();
        line.waiting.push_back(Rc::clone(&waiting));
        if line.held < self.max_per_network && !std::mem::replace(&mut line.in_turn, true) {
            inner.turns.push_back(network);
        }
        waiting
    }

    fn free(&self, network: Network) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        inner.held -= 1;
        if let Some(line) = inner.lines.get_mut(&network) {
            line.held -= 1;
            if !line.waiting.is_empty() && !std::mem::replace(&mut line.in_turn, true) {
                inner.turns.push_back(network);
            }
        }
        self.grant(inner);
        if inner
            .lines
            .get(&network)
            .is_some_and(|line| line.held == 0 && line.waiting.is_empty() && !line.in_turn)
        {
            inner.lines.remove(&network);
        }
    }

    /// Gives what is free to those whose turn it is.
    fn grant(&self, inner: &mut Inner) {
        while inner.held < self.max {
            let Some(network) = inner.turns.pop_front() else { return };
            let Some(line) = inner.lines.get_mut(&network) else { continue };
            line.in_turn = false;
            let next = loop {
                match line.waiting.pop_front() {
                    Some(waiting) if waiting.left.get() => {}
                    next => break next,
                }
            };
            let Some(next) = next else {
                if line.held == 0 {
                    inner.lines.remove(&network);
                }
                continue;
            };
            line.held += 1;
            inner.held += 1;
            next.granted.set(true);
            if let Some(waker) = next.waker.take() {
                waker.wake();
            }
            if line.held < self.max_per_network && !line.waiting.is_empty() {
                line.in_turn = true;
                inner.turns.push_back(network);
            }
        }
    }

    #[cfg(test)]
    fn is_clean(&self) -> bool {
        let inner = self.inner.borrow();
        inner.held == 0 && inner.lines.is_empty() && inner.turns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Context;

    use super::*;

    type Entering = Pin<Box<dyn Future<Output = Place>>>;

    fn network(text: &str) -> Network {
        Network::of(text.parse().unwrap())
    }

    fn enter(places: &Rc<Places>, from: &str) -> Entering {
        let (places, network) = (Rc::clone(places), network(from));
        Box::pin(async move { places.enter(network, || {}).await })
    }

    fn now(entering: &mut Entering) -> Option<Place> {
        match entering.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => Some(place),
            Poll::Pending => None,
        }
    }

    #[test]
    fn neighbours_are_one_network_and_others_are_not() {
        assert_eq!(network("192.0.2.1"), network("192.0.2.255"));
        assert_eq!(network("192.0.2.1"), network("::ffff:192.0.2.9"));
        assert_ne!(network("192.0.2.1"), network("192.0.3.1"));
        assert_eq!(network("2001:db8:1::1"), network("2001:db8:1:ffff::1"));
        assert_ne!(network("2001:db8:1::1"), network("2001:db8:2::1"));
        assert_ne!(network("0.0.1.0"), network("::1:0"));
    }

    #[test]
    fn a_network_that_floods_waits_for_itself_and_leaves_places_to_others() {
        let places = Places::new(4, 2);
        let mut flood: Vec<_> = (0..100).map(|_| enter(&places, "192.0.2.1")).collect();
        let mut inside: Vec<_> = flood.iter_mut().map(now).collect();
        assert_eq!(inside.iter().flatten().count(), 2);
        let other = now(&mut enter(&places, "198.51.100.1"));
        assert!(other.is_some(), "another network gets in at once");
        inside[0] = None;
        assert!(
            now(&mut flood[2]).is_some_and(|place| {
                inside.push(Some(place));
                true
            }),
            "first come, first served"
        );
        assert!(now(&mut flood[3]).is_none());
        drop((inside, other, flood));
        assert!(places.is_clean());
    }

    #[test]
    fn where_the_core_is_full_networks_take_turns() {
        let places = Places::new(1, 1);
        let held = now(&mut enter(&places, "192.0.2.1")).unwrap();
        let mut many: Vec<_> = (0..3).map(|_| enter(&places, "192.0.2.1")).collect();
        let mut one = enter(&places, "198.51.100.1");
        assert!(many.iter_mut().all(|entering| now(entering).is_none()) && now(&mut one).is_none());
        // The network that held the place comes into the line again when it is free: after the other one.
        drop(held);
        let first = now(&mut one).expect("whose turn it is");
        assert!(now(&mut many[0]).is_none());
        drop(first);
        let second = now(&mut many[0]).expect("the next in turn");
        assert!(now(&mut many[1]).is_none());
        drop((second, one, many));
        assert!(places.is_clean());
    }

    #[test]
    fn who_leaves_the_line_is_passed_over_also_when_it_was_just_given_a_place() {
        let places = Places::new(1, 1);
        let held = now(&mut enter(&places, "192.0.2.1")).unwrap();
        let (mut left, mut granted, mut last) =
            (enter(&places, "192.0.2.1"), enter(&places, "192.0.2.1"), enter(&places, "192.0.2.1"));
        assert!(now(&mut left).is_none() && now(&mut granted).is_none() && now(&mut last).is_none());
        drop(left);
        drop(held);
        drop(granted); // it has been given the place, and does not know it yet
        assert!(now(&mut last).is_some());
        drop(last);
        assert!(places.is_clean());
    }
}
