//! Device memory: ordinary memory, of which every byte knows whether it is allocated, already there in stream order, and
//! written. Freed memory stays where it is for a while, so that a use after free is seen.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// Addresses are aligned as the driver aligns them.
const ALIGNMENT: usize = 512;
/// Untouchable bytes before and after each allocation.
const GUARD: usize = 512;
/// How many freed bytes are kept.
const QUARANTINE: usize = 1 << 30;
/// What nobody wrote: NaN in every float.
const POISON: u8 = 0xff;

/// Something that a GPU would answer with an illegal address, if it notices.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault(pub String);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How an allocation came to be, and how it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of the pool, in the order of a stream.
    Pool,
    /// Of `cuMemAlloc`: there at once.
    Plain,
    /// A module's variable: there at once, and never freed.
    Module,
    /// Of a captured graph: comes back at each launch, at the same address.
    Graph,
}

pub struct Allocation {
    id: u64,
    base: u64,
    size: usize,
    data: Vec<u8>,
    start: usize,
    written: Vec<u8>,
    unwritten: usize,
    live: bool,
    ready: bool,
    kind: Kind,
    stream: u64,
    freed: String,
}

impl Allocation {
    /// The bytes from an address on.
    #[inline(always)]
    pub fn bytes(&self, address: u64, len: usize) -> &[u8] {
        let at = (address - self.base) as usize + self.start;
        &self.data[at..at + len]
    }

    #[inline(always)]
    pub fn bytes_mut(&mut self, address: u64, len: usize) -> &mut [u8] {
        let at = (address - self.base) as usize + self.start;
        &mut self.data[at..at + len]
    }

    #[inline(always)]
    pub fn holds(&self, low: u64, high: u64) -> bool {
        self.live && self.ready && low >= self.base && high <= self.base + self.size as u64
    }

    /// Whether every byte of the allocation was written.
    #[inline(always)]
    pub fn complete(&self) -> bool {
        self.unwritten == 0
    }

    #[inline(always)]
    pub fn was_written(&self, address: u64, len: usize) -> bool {
        let at = (address - self.base) as usize;
        self.complete() || !self.written[at..at + len].contains(&0)
    }

    #[inline(always)]
    pub fn mark(&mut self, address: u64, len: usize) {
        if !self.complete() {
            let at = (address - self.base) as usize;
            let marks = &mut self.written[at..at + len];
            self.unwritten -= marks.iter().filter(|&&mark| mark == 0).count();
            marks.fill(1);
        }
    }

    fn forget(&mut self) {
        self.written.fill(0);
        self.unwritten = self.size;
        let (start, size) = (self.start, self.size);
        self.data[start..start + size].fill(POISON);
    }
}

/// All memory of the device.
pub struct Memory {
    slots: Vec<Option<Allocation>>,
    unused: Vec<usize>,
    by_base: BTreeMap<u64, usize>,
    quarantine: VecDeque<u64>,
    quarantined: usize,
    /// Bytes of the device, bytes in use, and the most that were since the mark was reset.
    pub limit: usize,
    pub in_use: usize,
    pub peak: usize,
    pub allocations: u64,
}

impl Memory {
    pub fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            unused: Vec::new(),
            by_base: BTreeMap::new(),
            quarantine: VecDeque::new(),
            quarantined: 0,
            limit,
            in_use: 0,
            peak: 0,
            allocations: 0,
        }
    }

    /// The address of so many new bytes, or nothing if they are not there. They can be used once `arrive` is called, unless
    /// they are of the plain kind.
    pub fn allocate(&mut self, size: usize, kind: Kind, stream: u64) -> Option<u64> {
        if size > self.limit - self.in_use {
            return None;
        }
        let data = vec![POISON; size + 2 * GUARD + ALIGNMENT];
        let start = (data.as_ptr() as usize + GUARD).next_multiple_of(ALIGNMENT) - data.as_ptr() as usize;
        let base = data.as_ptr() as u64 + start as u64;
        self.allocations += 1;
        let allocation = Allocation {
            id: self.allocations,
            base,
            size,
            data,
            start,
            written: vec![0; size],
            unwritten: size,
            live: true,
            ready: matches!(kind, Kind::Plain | Kind::Module),
            kind,
            stream,
            freed: String::new(),
        };
        let slot = self.unused.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(allocation);
        self.by_base.insert(base, slot);
        self.in_use += size;
        self.peak = self.peak.max(self.in_use);
        Some(base)
    }

    /// The stream has come to the allocation.
    pub fn arrive(&mut self, base: u64) {
        let Some(allocation) = self.of(base) else { return };
        let (again, size) = (!allocation.live, allocation.size);
        allocation.ready = true;
        if again {
            // A launch of a graph once more.
            allocation.live = true;
            allocation.forget();
            self.in_use += size;
            self.peak = self.peak.max(self.in_use);
        }
    }

    pub fn free(&mut self, base: u64, by: &str) -> Result<(), Fault> {
        let Some(allocation) = self.of(base) else {
            return Err(Fault(format!("free of {base:#x}, which is no allocation ({by})")));
        };
        if !allocation.live {
            return Err(Fault(format!(
                "free of allocation {} again ({by}; first {})",
                allocation.id, allocation.freed
            )));
        }
        allocation.live = false;
        by.clone_into(&mut allocation.freed);
        let (size, kind) = (allocation.size, allocation.kind);
        allocation.forget();
        self.in_use -= size;
        if kind == Kind::Graph {
            return Ok(());
        }
        self.quarantine.push_back(base);
        self.quarantined += size;
        while self.quarantined > QUARANTINE {
            let Some(old) = self.quarantine.pop_front() else { break };
            let Some(slot) = self.by_base.remove(&old) else { break };
            self.quarantined -= self.slots[slot].take().map_or(0, |allocation| allocation.size);
            self.unused.push(slot);
        }
        Ok(())
    }

    fn of(&mut self, base: u64) -> Option<&mut Allocation> {
        self.slots[*self.by_base.get(&base)?].as_mut()
    }

    /// The allocation that holds `low..high`, by the number with which it can be asked for.
    pub fn find(&self, low: u64, high: u64) -> Result<usize, Fault> {
        let len = high - low;
        let Some((_, &slot)) = self.by_base.range(..=low).next_back() else {
            return Err(Fault(format!("{len} bytes at {low:#x} lie before all allocations")));
        };
        let a = self.slots[slot].as_ref().expect("listed by its base");
        if high > a.base + a.size as u64 {
            let (past, freed) = (high - (a.base + a.size as u64), if a.live { "" } else { " (freed)" });
            let text =
                format!("{len} bytes at {low:#x} end {past} bytes past allocation {} of {} bytes{freed}", a.id, a.size);
            return Err(Fault(text));
        }
        if !a.live {
            let text = format!("use after free: allocation {} of {} bytes, freed by {}", a.id, a.size, a.freed);
            return Err(Fault(text));
        }
        if !a.ready {
            let text = format!(
                "allocation {} of {} bytes is used before its stream {:#x} came to it: the program does not wait",
                a.id, a.size, a.stream
            );
            return Err(Fault(text));
        }
        Ok(slot)
    }

    /// The allocation of a number that `find` gave, if it is still there.
    #[inline(always)]
    pub fn at(&self, slot: usize) -> Option<&Allocation> {
        self.slots.get(slot)?.as_ref()
    }

    #[inline(always)]
    pub fn at_mut(&mut self, slot: usize) -> Option<&mut Allocation> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// So many bytes at an address, and whether all of them were written.
    pub fn read(&self, address: u64, len: usize) -> Result<(&[u8], bool), Fault> {
        if len == 0 {
            return Ok((&[], true));
        }
        let allocation = self.at(self.find(address, address.saturating_add(len as u64))?).expect("just found");
        Ok((allocation.bytes(address, len), allocation.was_written(address, len)))
    }

    /// So many bytes at an address, to be written.
    pub fn write(&mut self, address: u64, len: usize) -> Result<&mut [u8], Fault> {
        if len == 0 {
            return Ok(&mut []);
        }
        let slot = self.find(address, address.saturating_add(len as u64))?;
        let allocation = self.at_mut(slot).expect("just found");
        allocation.mark(address, len);
        Ok(allocation.bytes_mut(address, len))
    }

    /// Where the allocation around an address begins, and how many bytes it has.
    pub fn around(&self, address: u64) -> Option<(u64, usize)> {
        let (_, &slot) = self.by_base.range(..=address).next_back()?;
        let a = self.slots[slot].as_ref()?;
        (a.live && address <= a.base + a.size as u64).then_some((a.base, a.size))
    }

    /// Makes the allocation around an address so many bytes shorter.
    pub fn shrink(&mut self, address: u64, bytes: usize) -> bool {
        let Some((base, _)) = self.around(address) else { return false };
        let Some(a) = self.of(base) else { return false };
        let lost = bytes.min(a.size);
        a.size -= lost;
        a.unwritten -= a.written[a.size..].iter().filter(|&&mark| mark == 0).count();
        a.written.truncate(a.size);
        self.in_use -= lost;
        true
    }

    /// How many allocations of streams and of `cuMemAlloc` are alive, and how many bytes they have.
    pub fn alive(&self) -> (usize, usize) {
        let alive = self.slots.iter().flatten().filter(|a| a.live && matches!(a.kind, Kind::Pool | Kind::Plain));
        alive.fold((0, 0), |(count, bytes), a| (count + 1, bytes + a.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(memory: &mut Memory, size: usize) -> u64 {
        let base = memory.allocate(size, Kind::Pool, 1).expect("memory");
        memory.arrive(base);
        base
    }

    #[test]
    fn every_byte_is_known() {
        let mut memory = Memory::new(10_000);
        let base = ready(&mut memory, 100);
        assert_eq!(base % 512, 0);
        assert_eq!(memory.read(base, 100).map(|(bytes, written)| (bytes[0], written)), Ok((POISON, false)));
        memory.write(base, 60).expect("inside").fill(1);
        assert!(memory.read(base, 60).expect("inside").1);
        assert!(!memory.read(base, 61).expect("inside").1);
        memory.write(base + 60, 40).expect("inside").fill(2);
        assert!(memory.at(memory.find(base, base + 1).expect("inside")).expect("there").complete());
        let past = memory.read(base + 96, 8).expect_err("past the end");
        assert!(past.0.contains("4 bytes past allocation 1 of 100 bytes"), "{past}");
        assert!(memory.read(base - 4, 4).expect_err("before").0.contains("before all allocations"));
        memory.free(base, "me").expect("alive");
        assert!(
            memory
                .read(base, 4)
                .expect_err("freed")
                .0
                .contains("use after free: allocation 1 of 100 bytes, freed by me")
        );
        assert!(memory.free(base, "you").expect_err("freed").0.contains("again (you; first me)"));
        assert!(memory.free(base + 4, "you").expect_err("none").0.contains("no allocation"));
        assert_eq!((memory.in_use, memory.peak, memory.alive()), (0, 100, (0, 0)));
    }

    #[test]
    fn memory_comes_in_the_order_of_its_stream() {
        let mut memory = Memory::new(10_000);
        let base = memory.allocate(8, Kind::Pool, 7).expect("memory");
        assert!(memory.write(base, 8).expect_err("early").0.contains("before its stream 0x7 came to it"));
        memory.arrive(base);
        assert!(memory.write(base, 8).is_ok());
        let plain = memory.allocate(8, Kind::Plain, 0).expect("memory");
        assert!(memory.write(plain, 8).is_ok());
        assert_eq!(memory.alive(), (2, 16));
        assert_eq!(memory.allocate(10_000, Kind::Pool, 7), None);
    }

    #[test]
    fn memory_of_a_graph_comes_again() {
        let mut memory = Memory::new(10_000);
        let base = memory.allocate(8, Kind::Graph, 7).expect("memory");
        for _ in 0..2 {
            memory.arrive(base);
            assert!(!memory.read(base, 8).expect("there").1);
            memory.write(base, 8).expect("there").fill(0);
            memory.free(base, "graph").expect("there");
            assert!(memory.read(base, 8).is_err());
        }
    }

    #[test]
    fn shorter_memory_ends_sooner() {
        let mut memory = Memory::new(10_000);
        let base = ready(&mut memory, 100);
        assert!(memory.shrink(base + 50, 4));
        assert!(memory.read(base, 96).is_ok() && memory.read(base, 97).is_err());
        memory.write(base, 96).expect("inside").fill(0);
        assert!(memory.read(base, 96).expect("inside").1);
    }
}
