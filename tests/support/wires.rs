//! An edge and two hosts in network namespaces of their own, with wires between them that can be cut.
//!
//! ```text
//!   this machine: engine, clients, records ──┬── edge's namespace: the edge ──┬── host-a's namespace: dockerd
//!                                            ├──────────────────────────── host-a
//!                                            └──────────────────────────── host-b's namespace: dockerd ── edge's
//! ```
//!
//! Every pair has a wire of its own, so that one way can be cut and no other. A cut drops packets, as a broken line does:
//! nobody is told. All rules live in the namespaces and go with them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

use super::docker::Engines;

/// The hosts' ends and the edge's end of their wires, which are in namespaces alone: the same in every run.
const EDGE_TO_HOSTS: [[Ipv4Addr; 2]; 2] = [
    [Ipv4Addr::new(198, 19, 0, 1), Ipv4Addr::new(198, 19, 0, 2)],
    [Ipv4Addr::new(198, 19, 0, 5), Ipv4Addr::new(198, 19, 0, 6)],
];
/// Networks of four addresses for this machine's wire to the edge: 198.18.0.0/16 is for tests of networks (RFC 2544).
const NETWORKS: u32 = 1 << 14;

/// A way that can be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Tables, acknowledgements and counts do not pass.
    EngineEdge,
    /// The engine of containers cannot be asked, nor a copy be probed by the engine.
    EngineHost(usize),
    /// Requests and probes of the edge do not reach the copies there.
    EdgeHost(usize),
}

/// The edge's namespace and its wires. Taken away when dropped.
pub(crate) struct Wires {
    edge: String,
    link: String,
    near: Ipv4Addr,
    far: Ipv4Addr,
    hosts: [Host; 2],
    /// Where edges ask for the engine.
    engine_port: u16,
    /// Where origins deliver their records, on this machine.
    records_port: u16,
}

struct Host {
    namespace: String,
    /// This machine's end of its wire, where the engine asks from.
    near: Ipv4Addr,
    address: Ipv4Addr,
}

impl Wires {
    /// Makes them. The engine will listen for edges at that port.
    pub(crate) fn between(engines: &Engines, engine_port: u16) -> Self {
        let number = std::process::id() % NETWORKS;
        let network = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + number * 4;
        let name = format!("prg-{}-e", std::process::id());
        let hosts = [0, 1].map(|index| {
            let IpAddr::V4(address) = engines.machines[index].address else { panic!("IPv4") };
            let near = Ipv4Addr::from(u32::from(address) - 1);
            Host { namespace: engines.namespace(index), near, address }
        });
        let wires = Self {
            link: format!("prg{}e", std::process::id()),
            edge: name,
            near: Ipv4Addr::from(network + 1),
            far: Ipv4Addr::from(network + 2),
            hosts,
            engine_port,
            records_port: 0,
        };
        wires.make();
        wires
    }

    fn make(&self) {
        let Self { edge, link, near, far, .. } = self;
        ip(&["netns", "add", edge]);
        ip(&["-n", edge, "link", "set", "lo", "up"]);
        ip(&["link", "add", link, "type", "veth", "peer", "name", "engine", "netns", edge]);
        ip(&["addr", "add", &format!("{near}/30"), "dev", link]);
        ip(&["link", "set", link, "up"]);
        ip(&["-n", edge, "addr", "add", &format!("{far}/30"), "dev", "engine"]);
        ip(&["-n", edge, "link", "set", "engine", "up"]);
        for (host, ([ours, theirs], name)) in
            self.hosts.iter().zip(EDGE_TO_HOSTS.iter().zip(["host-a", "host-b"]))
        {
            let there = &host.namespace;
            ip(&["-n", edge, "link", "add", name, "type", "veth", "peer", "name", "edge", "netns", there]);
            ip(&["-n", edge, "addr", "add", &format!("{ours}/30"), "dev", name]);
            ip(&["-n", edge, "link", "set", name, "up"]);
            ip(&["-n", there, "addr", "add", &format!("{theirs}/30"), "dev", "edge"]);
            ip(&["-n", there, "link", "set", "edge", "up"]);
            // Copies are published at the host's one address, whichever wire a packet comes by.
            let to = format!("{}/32", host.address);
            ip(&["-n", edge, "route", "add", &to, "via", &theirs.to_string()]);
        }
    }

    /// Says where origins deliver their records: that way is never cut.
    pub(crate) fn keep_open(&mut self, records_port: u16) {
        self.records_port = records_port;
    }

    /// Where an edge that listens at this port is reached.
    pub(crate) fn edge_at(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.far, port))
    }

    /// Where the edge finds the engine.
    pub(crate) fn engine(&self) -> SocketAddr {
        SocketAddr::from((self.near, self.engine_port))
    }

    /// The edge's namespace.
    pub(crate) fn edge_namespace(&self) -> &str {
        &self.edge
    }

    /// Cuts a way.
    pub(crate) fn cut(&self, cut: Cut) {
        for rule in self.rules(cut) {
            rule.run("-I");
        }
    }

    /// Heals it; how many packets the cut has swallowed.
    pub(crate) fn heal(&self, cut: Cut) -> u64 {
        let rules = self.rules(cut);
        let mut chains: Vec<&Rule> = rules.iter().collect();
        chains.dedup_by_key(|rule| rule.chain);
        let dropped = chains.into_iter().map(Rule::dropped).sum();
        for rule in rules {
            rule.run("-D");
        }
        dropped
    }

    fn rules(&self, cut: Cut) -> Vec<Rule> {
        let rule = |namespace: &str, table, chain, matches: &[&str]| Rule {
            namespace: namespace.to_owned(),
            table,
            chain,
            matches: matches.iter().map(|word| (*word).to_owned()).collect(),
        };
        match cut {
            Cut::EngineEdge => {
                let port = self.engine_port.to_string();
                vec![
                    rule(&self.edge, "filter", "INPUT", &["-p", "tcp", "--sport", &port]),
                    rule(&self.edge, "filter", "OUTPUT", &["-p", "tcp", "--dport", &port]),
                ]
            }
            // Before any translation of addresses, so that what is addressed to a copy is met too; but not the records,
            // which go to this machine by the same wire.
            Cut::EngineHost(index) => {
                let host = &self.hosts[index];
                let (near, records) = (host.near.to_string(), self.records_port.to_string());
                let from = ["-s", &near, "-p", "tcp", "!", "--sport", &records];
                let to = ["-d", &near, "-p", "tcp", "!", "--dport", &records];
                vec![
                    rule(&host.namespace, "raw", "PREROUTING", &from),
                    rule(&host.namespace, "raw", "PREROUTING", &to),
                    rule(&host.namespace, "raw", "OUTPUT", &to),
                ]
            }
            Cut::EdgeHost(index) => {
                let address = self.hosts[index].address.to_string();
                vec![
                    rule(&self.edge, "filter", "INPUT", &["-s", &address]),
                    rule(&self.edge, "filter", "OUTPUT", &["-d", &address]),
                ]
            }
        }
    }
}

/// A rule that drops packets inside of a namespace.
struct Rule {
    namespace: String,
    table: &'static str,
    chain: &'static str,
    matches: Vec<String>,
}

impl Rule {
    fn run(&self, verb: &str) {
        done(self.iptables().args([verb, self.chain]).args(&self.matches).args(["-j", "DROP"]));
    }

    /// Packets that the rules of its chain have dropped: nobody else drops any there.
    fn dropped(&self) -> u64 {
        let listed = done(self.iptables().args(["-L", self.chain, "-v", "-x", "-n"]));
        let dropping = listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let dropping = dropping.filter(|words| words.get(2) == Some(&"DROP"));
        dropping.map(|words| words[0].parse::<u64>().expect("a count of packets")).sum()
    }

    fn iptables(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/var/run/netns/{}", self.namespace));
        command.args(["--", "iptables", "-w", "-t", self.table]);
        command
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        // With the namespace go its ends of the wires, and with an end the other one.
        for arguments in [&["link", "del", &self.link][..], &["netns", "del", &self.edge]] {
            let gone = Command::new("ip").args(arguments).output().expect("ip runs");
            if !gone.status.success() && !std::thread::panicking() {
                panic!("{}", String::from_utf8_lossy(&gone.stderr));
            }
        }
    }
}

fn ip(arguments: &[&str]) {
    done(Command::new("ip").args(arguments));
}

#[track_caller]
fn done(command: &mut Command) -> String {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
