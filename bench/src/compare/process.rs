//! A server under measurement: started on one core, its tree's processor time and memory, ended for certain.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::CompareError;

/// How long a server may take to end after SIGTERM, in milliseconds; then it is killed.
const STOP_TIMEOUT_MS: u64 = 5_000;
const US_PER_S: u64 = 1_000_000;

/// The cores of a comparison: one for the server under measurement, one for everything else.
#[derive(Debug, Clone, Copy)]
pub(super) struct Core(pub(super) usize);

/// A running server and its child processes.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pid: Pid,
}

impl Process {
    /// Starts `program` on `core` with `folder` as its working folder; what it says goes to `output.log` there.
    ///
    /// It is started through `setpriv`, so that it ends with this process however that ends, and `taskset`.
    pub(super) fn start(
        core: Core,
        folder: &Path,
        program: &Path,
        arguments: &[&OsStr],
        environment: &[(&str, &str)],
    ) -> Result<Self, CompareError> {
        let failed = |why| CompareError::start(program, why);
        let log = File::create(folder.join("output.log")).map_err(failed)?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "taskset", "--cpu-list", &core.0.to_string()])
            .arg(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let pid = pid.ok_or_else(|| failed(io::Error::other("it has no process id")))?;
        Ok(Self { child, pid })
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// Processor time of the whole tree since its start, children that ended included, in microseconds.
    ///
    /// The kernel counts it in ticks of 10 ms, so a window of some seconds is needed to tell contenders apart.
    pub(super) fn cpu_us(&self) -> u64 {
        let ticks: u64 = self.tree().iter().map(|stat| stat.ticks).sum();
        ticks * US_PER_S / rustix::param::clock_ticks_per_second()
    }

    /// Memory of the whole tree, shared pages counted once (PSS), in KiB.
    pub(super) fn memory_kib(&self) -> u64 {
        self.tree().iter().filter_map(|stat| pss_kib(stat.pid)).sum()
    }

    /// Ends it politely, then for certain.
    pub(super) async fn stop(mut self) {
        let deadline = Duration::from_millis(STOP_TIMEOUT_MS);
        if self.signal(Signal::TERM).is_ok()
            && tokio::time::timeout(deadline, self.child.wait()).await.is_ok()
        {
            return;
        }
        for stat in self.tree() {
            // Whoever is gone by now needs no signal.
            if let Some(pid) = Pid::from_raw(stat.pid)
                && kill_process(pid, Signal::KILL).is_ok()
            {
                eprintln!("killed process {}, which did not end on SIGTERM", stat.pid);
            }
        }
        drop(self.child.wait().await);
    }

    fn tree(&self) -> Vec<Stat> {
        let all: Vec<Stat> =
            fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(Stat::read).collect();
        let mut children: HashMap<i32, Vec<&Stat>> = HashMap::new();
        for stat in &all {
            children.entry(stat.parent).or_default().push(stat);
        }
        let root = self.pid.as_raw_nonzero().get();
        let mut tree: Vec<Stat> = all.iter().filter(|stat| stat.pid == root).copied().collect();
        let mut at = 0;
        while let Some(stat) = tree.get(at) {
            tree.extend(children.get(&stat.pid).into_iter().flatten().copied());
            at += 1;
        }
        tree
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.has_ended() {
            drop(self.signal(Signal::TERM));
        }
    }
}

/// The parts of `/proc/PID/stat` that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    pid: i32,
    parent: i32,
    /// utime, stime, cutime and cstime together.
    ticks: u64,
}

impl Stat {
    #[expect(clippy::needless_pass_by_value, reason = "it is mapped over the entries of a folder")]
    fn read(entry: fs::DirEntry) -> Option<Self> {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Self::parse(pid, &fs::read_to_string(entry.path().join("stat")).ok()?)
    }

    fn parse(pid: i32, stat: &str) -> Option<Self> {
        // The name, in parentheses, may itself hold spaces and parentheses; fields count from behind it (proc(5)).
        let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
        let parent = fields.get(1)?.parse().ok()?;
        let ticks = fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        Some(Self { pid, parent, ticks })
    }
}

fn pss_kib(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// What a core did since the machine started, everybody's work together, in microseconds.
pub(super) fn core_busy_us(core: Core) -> Option<u64> {
    parse_core_busy(&fs::read_to_string("/proc/stat").ok()?, core)
}

fn parse_core_busy(stat: &str, core: Core) -> Option<u64> {
    let label = format!("cpu{} ", core.0);
    let line = stat.lines().find_map(|line| line.strip_prefix(&label))?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().filter_map(|ticks| ticks.parse().ok()).collect();
    // user, nice, system, (idle, iowait,) irq, softirq, steal: proc_stat(5).
    let busy: u64 = ticks.get(..3)?.iter().chain(ticks.get(5..8)?).sum();
    Some(busy * US_PER_S / rustix::param::clock_ticks_per_second())
}

/// The path of an installed program: Debian puts servers where an ordinary user's PATH does not look.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_name_is_hostile_is_still_read() {
        let stat = "7 (a) b (c) S 3 7 7 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 5 0 0";
        assert_eq!(Stat::parse(7, stat), Some(Stat { pid: 7, parent: 3, ticks: 110 }));
    }

    #[test]
    fn a_core_is_busy_with_everything_but_waiting() {
        let stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 8 8 8 8 8 8 8 8 0 0\ncpu1 1 2 3 1000 1000 4 5 6 0 0\n";
        assert_eq!(
            parse_core_busy(stat, Core(1)),
            Some(21 * US_PER_S / rustix::param::clock_ticks_per_second())
        );
        assert_eq!(parse_core_busy(stat, Core(2)), None);
    }

    #[tokio::test]
    async fn a_tree_is_measured_and_ended() {
        let scratch = tempfile::tempdir().expect("a scratch folder");
        let shell = find_program("sh").expect("a shell");
        let script = "while :; do :; done & child=$!; trap 'kill $child; exit' TERM; wait";
        let arguments = [OsStr::new("-c"), OsStr::new(script)];
        let process = Process::start(Core(0), scratch.path(), &shell, &arguments, &[]).expect("started");
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while process.cpu_us() < 50_000 || process.tree().len() < 2 {
            assert!(std::time::Instant::now() < deadline, "{:?}", process.tree());
            tokio::task::yield_now().await;
        }
        assert!(process.memory_kib() > 0);
        let tree = process.tree();
        process.stop().await;
        while tree.iter().any(|stat| Path::new(&format!("/proc/{}", stat.pid)).exists()) {
            assert!(std::time::Instant::now() < deadline, "the tree outlived its stop");
            tokio::task::yield_now().await;
        }
    }
}
