//! Limits on the processes of an instance: what the kernel enforces here, and what it does not.
//!
//! Each instance has a control group of its own, below the one that Peregrine is in, so that a limit on
//! Peregrine as a whole holds for its instances too:
//!
//! ```text
//!   version 1   <mount of memory, cpu, pids>/<our group>/peregrine-<instance>-<start>
//!   version 2   <mount>/<our group>/peregrine-<instance>-<start>, or beside us where systemd has delegated our parent
//! ```
//!
//! A control group is taken when it can be made and written; that needs root, or a delegation (systemd:
//! `Delegate=yes` and `DelegateSubgroup=`). Where there is none for memory, each process gets a limit on its
//! own writable memory instead (`RLIMIT_DATA`). It counts neither reserved addresses nor shared libraries, but
//! the stack of each thread as a whole, used or not: so it is set wide ([`DATA_FACTOR`]), and stops what
//! runs away rather than what is a little too big. It holds for one process and not for all together. CPU and pids have no such stand-in: the kernel's own
//! `RLIMIT_NPROC` counts every process of the user, whichever instance it is of.
//!
//! Every start has a new group, so that its counts begin at nought. Groups are written down in the instance's
//! record before they are made, and taken away with it, wherever Peregrine itself runs by then.
//! A process is put into its group right after it was started, with whatever it has started until then.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::procfs::ProcessStat;
use crate::model::{InstanceId, Resources};

/// Period of a CPU quota: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// Smallest quota that the kernel takes.
const MIN_CPU_QUOTA_US: u64 = 1_000;
/// Without a control group: writable memory of one process, in limits of the instance.
const DATA_FACTOR: u64 = 4;
/// Looks for processes that were started before their parent was in the group; each finds fewer.
const MAX_ADOPTIONS: usize = 20;
/// Mark of a group that systemd leaves to us.
const DELEGATED: [&str; 2] = ["user.delegate", "trusted.delegate"];

/// One kind of limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Memory,
    Cpu,
    Pids,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    /// Name of the controller.
    const fn controller(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "CPU",
            Self::Pids => "pids",
        }
    }

    fn is_wanted(self, resources: &Resources) -> bool {
        match self {
            Self::Memory => resources.memory_bytes > 0,
            Self::Cpu => resources.cpu_millis > 0,
            Self::Pids => resources.pids > 0,
        }
    }
}

/// A place below which groups can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parent {
    path: PathBuf,
    version: u8,
    kinds: Vec<Kind>,
}

/// What can be limited on this machine. Found once; nothing is made by looking but a probe that is gone at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    parents: Vec<Parent>,
}

impl Limits {
    /// What this process can enforce on its children.
    pub(super) fn find() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mut parents = Vec::new();
        for mut parent in candidates(&mounts, &own) {
            let known: BTreeSet<Kind> = parents.iter().flat_map(|p: &Parent| p.kinds.clone()).collect();
            parent.kinds.retain(|kind| !known.contains(kind));
            if !parent.kinds.is_empty() && parent.is_usable() {
                parents.push(parent);
            }
        }
        Self { parents }
    }

    /// For people: what holds and what does not.
    pub(super) fn words(&self) -> String {
        let held = |kind: &Kind| self.parents.iter().any(|parent| parent.kinds.contains(kind));
        let names = |wanted: bool| -> Vec<&str> {
            Kind::ALL.iter().filter(|kind| held(kind) == wanted).map(|kind| kind.name()).collect()
        };
        let (yes, no) = (names(true), names(false));
        let mut words = Vec::new();
        if !yes.is_empty() {
            words.push(format!("{} limited by cgroups", yes.join(", ")));
        }
        if no.contains(&Kind::Memory.name()) {
            words.push(format!("each process limited to {DATA_FACTOR} times the memory"));
        }
        let no: Vec<&str> = no.into_iter().filter(|name| *name != Kind::Memory.name()).collect();
        if !no.is_empty() {
            words.push(format!("{} not limited", no.join(", ")));
        }
        words.join("; ")
    }

    /// The groups of one start of an instance, which need not be there.
    pub(super) fn groups(&self, id: &InstanceId, start: u64) -> Vec<PathBuf> {
        self.parents.iter().map(|parent| parent.path.join(format!("peregrine-{id}-{start}"))).collect()
    }

    /// Makes the groups with their limits.
    pub(super) fn prepare(&self, groups: &[PathBuf], resources: &Resources) -> io::Result<()> {
        for (parent, group) in self.parents.iter().zip(groups) {
            fs::create_dir(group).map_err(|error| at(group, &error))?;
            for kind in parent.kinds.iter().filter(|kind| kind.is_wanted(resources)) {
                limit(group, parent.version, *kind, resources)?;
            }
        }
        Ok(())
    }

    /// Puts a process that was just started under its limits, and those that it has started by then.
    /// `all` looks for them.
    pub(super) fn hold(
        &self,
        groups: &[PathBuf],
        resources: &Resources,
        pid: i32,
        all: impl Fn() -> io::Result<Vec<ProcessStat>>,
    ) -> io::Result<()> {
        let mut held = BTreeSet::from([pid]);
        self.take(groups, resources, pid)?;
        for _ in 0..MAX_ADOPTIONS {
            let new: Vec<i32> =
                all()?.iter().map(|process| process.pid).filter(|pid| held.insert(*pid)).collect();
            if new.is_empty() {
                break;
            }
            for pid in new {
                self.take(groups, resources, pid)?;
            }
        }
        Ok(())
    }

    fn take(&self, groups: &[PathBuf], resources: &Resources, pid: i32) -> io::Result<()> {
        for group in groups {
            match fs::write(group.join("cgroup.procs"), pid.to_string()) {
                Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {} // it has ended
                done => done.map_err(|error| at(group, &error))?,
            }
        }
        let in_group = self.parents.iter().any(|parent| parent.kinds.contains(&Kind::Memory));
        if let Some(pid) = Pid::from_raw(pid).filter(|_| !in_group && Kind::Memory.is_wanted(resources)) {
            let bytes = Some(resources.memory_bytes.saturating_mul(DATA_FACTOR));
            match prlimit(Some(pid), Resource::Data, Rlimit { current: bytes, maximum: bytes }) {
                Ok(_) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whether the kernel has ended a process in these groups because of their limit on memory.
pub(super) fn ran_out_of_memory(groups: &[PathBuf]) -> bool {
    let files =
        groups.iter().flat_map(|group| ["memory.oom_control", "memory.events"].map(|f| group.join(f)));
    files.filter_map(|file| fs::read_to_string(file).ok()).any(|text| {
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills.trim() != "0")
    })
}

/// The processes in these groups: also those that have left their process group and hide their environment.
pub(super) fn members(groups: &[PathBuf]) -> BTreeSet<i32> {
    let lists = groups.iter().filter_map(|group| fs::read_to_string(group.join("cgroup.procs")).ok());
    lists.flat_map(|list| list.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// Takes groups away; those that cannot be, because a process is still on its way out of them.
pub(super) fn remove(groups: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    let mut busy = Vec::new();
    for group in groups {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => busy.push(group.clone()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(group, &error)),
            _ => {}
        }
    }
    Ok(busy)
}

impl Parent {
    /// Tries it: a group is made, the files of every kind are looked for, and it is taken away again.
    fn is_usable(&self) -> bool {
        if self.version == 2 {
            let on = fs::read_to_string(self.path.join("cgroup.subtree_control")).unwrap_or_default();
            for kind in &self.kinds {
                let switch = format!("+{}", kind.controller());
                if !on.split_whitespace().any(|word| word == kind.controller())
                    && fs::write(self.path.join("cgroup.subtree_control"), switch).is_err()
                {
                    return false; // processes are in it, or it is not ours
                }
            }
        }
        let probe = self.path.join(format!("peregrine-probe-{}", uuid::Uuid::new_v4().simple()));
        if fs::create_dir(&probe).is_err() {
            return false;
        }
        let fine = self.kinds.iter().all(|kind| {
            let (file, _) = setting(self.version, *kind, &Resources::default());
            fs::OpenOptions::new().write(true).open(probe.join(file)).is_ok()
        });
        fs::remove_dir(&probe).is_ok() && fine
    }
}

/// Where groups could be made, the best place first, from `/proc/self/mounts` and `/proc/self/cgroup`.
fn candidates(mounts: &str, own: &str) -> Vec<Parent> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, at, kind, options, ..] = fields[..] else { continue };
        let has = |name: &str| options.split(',').any(|option| option == name);
        match kind {
            "cgroup" => {
                let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| has(kind.controller())).collect();
                let of = |controllers: &str| {
                    kinds.iter().any(|kind| controllers.split(',').any(|name| name == kind.controller()))
                };
                if let Some(path) = own_group(own, of) {
                    found.push(Parent { path: below(at, path), version: 1, kinds });
                }
            }
            "cgroup2" => {
                let Some(path) = own_group(own, str::is_empty) else { continue };
                let own = below(at, path);
                let beside = own.parent().filter(|parent| parent.starts_with(at) && is_delegated(parent));
                for path in [Some(own.as_path()), beside].into_iter().flatten() {
                    let controllers = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
                    let has = |kind: &Kind| controllers.split_whitespace().any(|c| c == kind.controller());
                    let kinds = Kind::ALL.into_iter().filter(has).collect();
                    found.push(Parent { path: path.to_owned(), version: 2, kinds });
                }
            }
            _ => {}
        }
    }
    found
}

/// Our group in the hierarchy whose controllers are the wanted ones: `4:memory:/a/b`.
fn own_group(own: &str, wanted: impl Fn(&str) -> bool) -> Option<&str> {
    own.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        wanted(controllers).then_some(path)
    })
}

fn below(mount: &str, path: &str) -> PathBuf {
    Path::new(mount).join(path.trim_start_matches('/'))
}

fn is_delegated(group: &Path) -> bool {
    let mut value = [0_u8; 8];
    DELEGATED.iter().any(|name| {
        rustix::fs::getxattr(group, *name, &mut value).is_ok_and(|length| value[..length] == *b"1")
    })
}

/// File and value of a limit.
fn setting(version: u8, kind: Kind, resources: &Resources) -> (&'static str, String) {
    let quota = (u64::from(resources.cpu_millis) * CPU_PERIOD_US / 1_000).max(MIN_CPU_QUOTA_US);
    match (version, kind) {
        (1, Kind::Memory) => ("memory.limit_in_bytes", resources.memory_bytes.to_string()),
        (1, Kind::Cpu) => ("cpu.cfs_quota_us", quota.to_string()),
        (_, Kind::Memory) => ("memory.max", resources.memory_bytes.to_string()),
        (_, Kind::Cpu) => ("cpu.max", format!("{quota} {CPU_PERIOD_US}")),
        (_, Kind::Pids) => ("pids.max", resources.pids.to_string()),
    }
}

fn limit(group: &Path, version: u8, kind: Kind, resources: &Resources) -> io::Result<()> {
    let (file, value) = setting(version, kind, resources);
    let file = group.join(file);
    fs::write(&file, &value).map_err(|error| at(&file, &error))?;
    if kind == Kind::Memory {
        // Memory and swap together; where swap is not counted there is no such file.
        let (file, value) = if version == 1 {
            ("memory.memsw.limit_in_bytes", value)
        } else {
            ("memory.swap.max", "0".to_owned())
        };
        let file = group.join(file);
        if file.exists() {
            fs::write(&file, value).map_err(|error| at(&file, &error))?;
        }
    }
    Ok(())
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "4:memory:/a/b\n3:cpuset:/\n1:cpu,cpuacct:/c\n8:pids:/\n0::/d/e\n";

    #[test]
    fn groups_of_version_1_are_below_our_own_ones() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
                      cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n";
        let parent = |path: &str, kind| Parent { path: path.into(), version: 1, kinds: vec![kind] };
        assert_eq!(
            candidates(mounts, OWN),
            [
                parent("/sys/fs/cgroup/memory/a/b", Kind::Memory),
                parent("/sys/fs/cgroup/cpu,cpuacct/c", Kind::Cpu),
                parent("/sys/fs/cgroup/pids", Kind::Pids),
            ]
        );
    }

    /// Our group of version 2 as a folder of plain files.
    fn version_2(own: &Path) -> Parent {
        fs::create_dir_all(own).unwrap();
        fs::write(own.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        fs::write(own.join("cgroup.subtree_control"), "cpu memory pids\n").unwrap();
        Parent { path: own.to_owned(), version: 2, kinds: Kind::ALL.to_vec() }
    }

    #[test]
    fn groups_of_version_2_are_below_our_own_one_and_not_beside_it_without_a_delegation() {
        let mount = tempfile::tempdir().unwrap();
        let parent = version_2(&mount.path().join("d/e"));
        let mounts = format!("cgroup2 {} cgroup2 rw,nsdelegate 0 0\n", mount.path().display());
        assert_eq!(candidates(&mounts, OWN), [parent]);
    }

    #[test]
    fn limits_are_written_as_each_version_wants_them() {
        let resources = Resources { memory_bytes: 64 << 20, cpu_millis: 250, pids: 7 };
        let values = |version| Kind::ALL.map(|kind| setting(version, kind, &resources));
        let text = |(file, value): (&'static str, &str)| (file, value.to_owned());
        assert_eq!(
            values(1),
            [("memory.limit_in_bytes", "67108864"), ("cpu.cfs_quota_us", "25000"), ("pids.max", "7")]
                .map(text)
        );
        assert_eq!(
            values(2),
            [("memory.max", "67108864"), ("cpu.max", "25000 100000"), ("pids.max", "7")].map(text)
        );
    }

    #[test]
    fn an_instance_of_version_2_is_limited_and_its_end_is_explained() {
        let own = tempfile::tempdir().unwrap();
        let limits = Limits { parents: vec![version_2(own.path())] };
        let id = InstanceId::generate();
        let groups = limits.groups(&id, 1);
        limits.prepare(&groups, &Resources { memory_bytes: 1 << 20, cpu_millis: 0, pids: 5 }).unwrap();
        let group = &groups[0];
        assert_eq!(fs::read_to_string(group.join("memory.max")).unwrap(), "1048576");
        assert_eq!(fs::read_to_string(group.join("pids.max")).unwrap(), "5");
        assert!(!group.join("cpu.max").exists(), "no limit, nothing written");
        fs::write(group.join("memory.events"), "low 0\noom 3\noom_kill 0\n").unwrap();
        assert!(!ran_out_of_memory(&groups));
        fs::write(group.join("memory.events"), "low 0\noom 3\noom_kill 2\n").unwrap();
        assert!(ran_out_of_memory(&groups));
    }

    #[test]
    fn what_holds_and_what_does_not_is_said() {
        let parent = |kinds: &[Kind]| Parent { path: "/x".into(), version: 1, kinds: kinds.to_vec() };
        let words = |parents| Limits { parents }.words();
        assert_eq!(words(vec![parent(&Kind::ALL)]), "memory, CPU, pids limited by cgroups");
        assert_eq!(
            words(vec![parent(&[Kind::Pids])]),
            "pids limited by cgroups; each process limited to 4 times the memory; CPU not limited"
        );
        assert_eq!(words(Vec::new()), "each process limited to 4 times the memory; CPU, pids not limited");
    }

    #[test]
    fn without_a_control_group_a_process_gets_a_limit_on_its_own_memory() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let resources = Resources { memory_bytes: 64 << 20, cpu_millis: 100, pids: 5 };
        Limits::default().hold(&[], &resources, pid, || Ok(Vec::new())).unwrap();
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let data = limits.lines().find(|line| line.starts_with("Max data size")).unwrap();
        assert_eq!(data.split_whitespace().filter(|word| *word == "268435456").count(), 2, "{data}");
    }

    #[test]
    fn a_process_that_has_ended_needs_no_limits() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        Limits::default().hold(&[], &Resources::default(), pid, || Ok(Vec::new())).unwrap();
    }
}
