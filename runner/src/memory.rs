//! Memory: what a stage holds, and what the process holds.
//!
//! Several stages run at once, each in a thread pool of its own, so the process's own figures are everybody's, and its
//! peak never falls. The allocator therefore counts for each pool: the bytes that its threads ask for less those that they
//! give back, since the stage began. That is the heap without what the allocator adds; files that are mapped, the stacks
//! and a device's memory are not in it.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::sync::atomic::{AtomicIsize, Ordering};

/// What the threads of one pool hold.
#[derive(Debug, Default)]
pub struct Meter {
    held: AtomicIsize,
    peak: AtomicIsize,
}

thread_local! {
    // Nothing to drop and nothing to initialise, so the allocator may read it at any moment of a thread's life.
    static METER: Cell<Option<&'static Meter>> = const { Cell::new(None) };
}

impl Meter {
    /// A meter for as long as the process lives: threads may count to their very end.
    pub fn leak() -> &'static Self {
        Box::leak(Box::default())
    }

    /// Counts what this thread does from now on.
    pub fn attach(&'static self) {
        METER.set(Some(self));
    }

    /// A stage begins. What is held by now counts: it is the model that stays loaded for it.
    pub fn begin(&self) {
        self.peak.store(self.held.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    fn count(&self, bytes: isize) {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if bytes > 0 {
            self.peak.fetch_max(held, Ordering::Relaxed);
        }
    }
}

/// The most bytes that the stage on this thread held at once; `None` where nothing counts them: outside of the executor's
/// pools, and with the feature `dynamic`, whose allocator is not ours.
pub fn stage_peak() -> Option<u64> {
    let peak = METER.get()?.peak.load(Ordering::Relaxed);
    u64::try_from(peak).ok().filter(|peak| *peak > 0)
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

/// The memory that the system could still give, in bytes; `None` where it does not tell.
pub fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, not(feature = "dynamic")))]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn pool() -> (rayon::ThreadPool, &'static Meter) {
        let meter = Meter::leak();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(|_| meter.attach()).build();
        (pool.expect("threads"), meter)
    }

    /// A stage that holds so many MiB at once, half of them on each of two threads, and as much again one after the other.
    fn stage(pool: &rayon::ThreadPool, meter: &Meter, mib: usize) -> u64 {
        pool.install(|| {
            meter.begin();
            let half = || std::hint::black_box(vec![1u8; mib << 19]);
            let both = rayon::join(half, half);
            drop(both);
            drop(std::hint::black_box(vec![1u8; mib << 19]));
            stage_peak().expect("a peak") / MIB
        })
    }

    #[test]
    fn a_stage_has_its_own_peak_whatever_ran_before_and_beside_it() {
        let ((one, one_meter), (other, other_meter)) = (pool(), pool());
        // What threads take and give back beside the stage counts as well, but it is little.
        let holds = |peak: u64, expected: u64, what: &str| assert!(peak.abs_diff(expected) <= 1, "{what}: {peak} MiB");
        holds(stage(&one, one_meter, 64), 64, "a stage");
        holds(stage(&one, one_meter, 8), 8, "after a large stage");
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| stage(&other, other_meter, 128));
            holds(stage(&one, one_meter, 16), 16, "beside a large stage");
            holds(beside.join().expect("a stage"), 128, "the large stage");
        });
        // A model that stays loaded is held by every stage that uses it.
        let kept = one.install(|| vec![1u8; 32 << 20]);
        holds(stage(&one, one_meter, 8), 32 + 8, "with a model that stays");
        one.install(|| drop(kept));
        holds(stage(&one, one_meter, 8), 8, "when it is gone");
    }

    #[test]
    fn nothing_is_counted_where_no_stage_runs() {
        assert_eq!(std::thread::spawn(stage_peak).join().expect("a thread"), None);
        assert!(process_peak().is_none_or(|peak| peak > MIB));
    }
}
