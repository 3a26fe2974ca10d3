//! Memory: what a stage holds, and what the process holds.
//!
//! Several stages run at once, each in a thread pool of its own, so the process's own figures are everybody's, and its
//! peak never falls. The allocator therefore counts for each pool: the bytes that its threads ask for less those that they
//! give back. That is the heap without what the allocator adds; files that are mapped and the stacks are not in it.
//! A stage on a GPU has the peak of the GPU's memory instead, where its tensors are.
//!
//! A model that stays loaded counts for every stage that starts from it, as what the stage that loaded it asked for, and
//! for no other stage. Each job has a model of its own, also where several run in one process, so that what a stage drops
//! was counted for it.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::path::{Component, Path};
use std::sync::atomic::{AtomicIsize, AtomicU64, Ordering};

use candle_core::Device;
use titer_core::device::memory_peak;

/// What the threads of a stage hold.
#[derive(Debug)]
pub struct Meter {
    held: AtomicIsize,
    peak: AtomicIsize,
}

thread_local! {
    // Nothing to drop and nothing to initialise, so the allocator may read it at any moment of a thread's life.
    static METER: Cell<Option<&'static Meter>> = const { Cell::new(None) };
}

impl Meter {
    /// A stage begins that finds a model of `kept` bytes. The meter lives as long as the process, since threads count to
    /// their very end, which may come after that of their stage.
    pub fn begin(kept: isize) -> &'static Self {
        Box::leak(Box::new(Self { held: kept.into(), peak: kept.into() }))
    }

    /// Counts what this thread does from now on.
    pub fn attach(&'static self) {
        METER.set(Some(self));
    }

    fn count(&self, bytes: isize) {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if bytes > 0 {
            self.peak.fetch_max(held, Ordering::Relaxed);
        }
    }
}

/// The most bytes that the stage on this thread held at once where its tensors are. `None` where nothing counts them: on
/// the host, outside of the executor's pools, and with the feature `dynamic`, whose allocator is not ours.
pub fn stage_peak(device: &Device) -> Option<u64> {
    if !device.is_cpu() {
        return memory_peak(device);
    }
    let peak = METER.get()?.peak.load(Ordering::Relaxed);
    u64::try_from(peak).ok().filter(|peak| *peak > 0)
}

/// The bytes that the stage on this thread holds now; 0 where nothing counts them.
pub fn stage_held() -> isize {
    METER.get().map_or(0, |meter| meter.held.load(Ordering::Relaxed))
}

/// An allocator that counts for the thread's [`Meter`].
#[derive(Debug)]
pub struct Counting<A>(pub A);

fn count(bytes: isize) {
    // A thread that is about to end has no meter any more.
    if let Ok(Some(meter)) = METER.try_with(Cell::get) {
        meter.count(bytes);
    }
}

// SAFETY: every call goes to the inner allocator with the same arguments and its result comes back unchanged; counting
// neither allocates nor panics.
#[expect(unsafe_code, reason = "an allocator is an unsafe trait")]
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.cast_signed() - layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}

/// The most memory this process has held so far, in bytes, as the kernel counts it; `None` where it does not tell.
pub fn process_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kilobytes * 1024)
}

/// The jobs that share the memory that is left.
static JOBS: AtomicU64 = AtomicU64::new(1);

/// Says how many jobs run at once, in this process and beside it.
pub fn share(jobs: usize) {
    JOBS.store(jobs.max(1) as u64, Ordering::Relaxed);
}

/// How many jobs share the memory.
pub fn sharing() -> u64 {
    JOBS.load(Ordering::Relaxed)
}

/// The memory that a job could still take, in bytes: its share of what the system can give, or of what the limits of control
/// groups leave if that is less. `None` where nothing tells.
pub fn available() -> Option<u64> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let groups = left_in_groups(&read("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
    let left = [left_in_system(&read("/proc/meminfo")), groups].into_iter().flatten().min();
    Some(left? / sharing())
}

fn left_in_system(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// Where a version of control groups says what a group may take and what it has taken.
struct Group {
    limit: &'static str,
    usage: &'static str,
    /// The entries of `memory.stat` that count files which the kernel drops before it refuses memory.
    cached: [&'static str; 2],
}

const VERSION_1: Group = Group {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_active_file", "total_inactive_file"],
};
const VERSION_2: Group =
    Group { limit: "memory.max", usage: "memory.current", cached: ["active_file", "inactive_file"] };

/// What the control groups of a process leave it, given its `/proc/self/cgroup` and where groups are mounted: the least of
/// its own group and all above it. In a container the group's path may be one of the host, of which only the end or nothing
/// is mounted.
fn left_in_groups(groups: &str, root: &Path) -> Option<u64> {
    let of_line = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let (root, version) = match controllers {
            "" => (root.to_owned(), &VERSION_2),
            _ if controllers.split(',').any(|controller| controller == "memory") => (root.join("memory"), &VERSION_1),
            _ => return None,
        };
        let names = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
        let folder = root.join(names.collect::<std::path::PathBuf>());
        folder
            .ancestors()
            .take_while(|folder| folder.starts_with(&root))
            .filter_map(|folder| version.left(folder))
            .min()
    };
    groups.lines().filter_map(of_line).min()
}

impl Group {
    fn left(&self, folder: &Path) -> Option<u64> {
        let read = |name| std::fs::read_to_string(folder.join(name)).ok();
        // Version 2 says `max` where there is no limit, version 1 a number beyond all memory.
        let number = |name| read(name)?.trim().parse::<u64>().ok();
        let (limit, usage) = (number(self.limit)?, number(self.usage)?);
        let stat = read("memory.stat").unwrap_or_default();
        let entries = stat.lines().filter_map(|line| line.split_once(' '));
        let cached =
            entries.filter(|(name, _)| self.cached.contains(name)).filter_map(|(_, bytes)| bytes.parse::<u64>().ok());
        Some(limit.saturating_sub(usage.saturating_sub(cached.sum::<u64>())))
    }
}

#[cfg(all(test, not(feature = "dynamic")))]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A stage that finds something, drops it and then holds so many MiB at once, half of them on each of two threads, and
    /// as much again one after the other.
    fn stage(found: Vec<u8>, mib: usize) -> u64 {
        let meter = Meter::begin(found.len().cast_signed());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(|_| meter.attach()).build();
        pool.expect("threads").install(|| {
            drop(found);
            let half = || std::hint::black_box(vec![1u8; mib << 19]);
            let both = rayon::join(half, half);
            drop(both);
            drop(std::hint::black_box(vec![1u8; mib << 19]));
            stage_peak(&Device::Cpu).expect("a peak") / MIB
        })
    }

    #[test]
    fn a_stage_has_its_own_peak_whatever_ran_before_and_beside_it() {
        // What threads take and give back beside the stage counts as well, but it is little.
        let holds = |peak: u64, expected: u64, what: &str| assert!(peak.abs_diff(expected) <= 1, "{what}: {peak} MiB");
        let (nothing, model) = (Vec::new, || vec![1u8; 32 << 20]);
        holds(stage(nothing(), 64), 64, "a stage");
        holds(stage(nothing(), 8), 8, "after a large stage");
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| stage(nothing(), 128));
            holds(stage(nothing(), 16), 16, "beside a large stage");
            holds(beside.join().expect("a stage"), 128, "the large stage");
        });
        holds(stage(model(), 8), 32, "with a model that was loaded before");
        holds(stage(model(), 40), 40, "with more than the model, once that is dropped");
    }

    #[test]
    fn what_is_left_is_the_least_of_system_and_groups() {
        assert_eq!(left_in_system("MemTotal: 9 kB\nMemAvailable:    7 kB\n"), Some(7 * 1024));
        assert_eq!(left_in_system(""), None);
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        let write = |group: &str, files: [(&str, &str); 3]| {
            std::fs::create_dir_all(root.join(group)).expect("a folder");
            for (name, text) in files {
                std::fs::write(root.join(group).join(name), text).expect("a file");
            }
        };
        let two = |limit, usage| {
            [
                ("memory.max", limit),
                ("memory.current", usage),
                ("memory.stat", "anon 5\nactive_file 20\ninactive_file 10\n"),
            ]
        };
        write("a/b", two("1000\n", "600\n"));
        assert_eq!(left_in_groups("0::/a/b\n", root), Some(430), "cached files can go");
        assert_eq!(left_in_groups("0::/a/b/../b\n", root), Some(430));
        write("a", two("700\n", "620\n"));
        assert_eq!(left_in_groups("0::/a/b\n", root), Some(110), "the group above has less");
        write("a", two("max\n", "620\n"));
        assert_eq!(left_in_groups("0::/a/b\n", root), Some(430), "no limit");
        write("a/b", two("500\n", "600\n"));
        assert_eq!(left_in_groups("0::/a/b\n", root), Some(0), "the limit was lowered");
        assert_eq!((left_in_groups("0::/elsewhere\n", root), left_in_groups("", root)), (None, None));
        // A container has its own group where the host has the first.
        write("", two("100\n", "60\n"));
        assert_eq!(left_in_groups("0::/docker/1234\n", root), Some(70));
        let one = |limit, usage| {
            [
                ("memory.limit_in_bytes", limit),
                ("memory.usage_in_bytes", usage),
                ("memory.stat", "active_file 9\ntotal_active_file 2\ntotal_inactive_file 3\n"),
            ]
        };
        write("memory/job", one("50\n", "40\n"));
        write("memory", one("9223372036854771712\n", "400\n"));
        assert_eq!(left_in_groups("3:cpu,cpuacct:/x\n2:memory,hugetlb:/job\n", root), Some(15));
        assert_eq!(left_in_groups("2:memory:/job\n0::/a\n", root), Some(15), "of both versions");
    }

    #[test]
    fn nothing_is_counted_where_no_stage_runs() {
        assert_eq!(std::thread::spawn(|| stage_peak(&Device::Cpu)).join().expect("a thread"), None);
        assert!(process_peak().is_none_or(|peak| peak > MIB));
    }
}
