//! The shared memory of a block, of which every byte knows who read and who wrote it since the last barrier.

/// Who touched a byte, in the lower bits of a tag: a warp's number and one, or one of these.
const SEVERAL: u32 = 63;
const ATOMIC: u32 = 62;
const WHO: u32 = 63;

/// What an access found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// A byte that nobody wrote was read.
    pub unwritten: bool,
    /// Another warp uses the same byte, and no barrier is between.
    pub race: Option<String>,
}

impl Seen {
    pub fn join(&mut self, other: Seen) {
        self.unwritten |= other.unwritten;
        if self.race.is_none() {
            self.race = other.race;
        }
    }
}

#[derive(Default)]
pub struct Shared {
    bytes: Vec<u8>,
    written: Vec<u8>,
    writers: Vec<u32>,
    readers: Vec<u32>,
    /// Goes on by one at each barrier and each block.
    epoch: u32,
}

impl Shared {
    pub fn new(size: usize) -> Self {
        Self {
            bytes: vec![0xff; size],
            written: vec![0; size],
            writers: vec![0; size],
            readers: vec![0; size],
            epoch: 0,
        }
    }

    /// A new block: nothing is written.
    pub fn clear(&mut self) {
        self.bytes.fill(0xff);
        self.written.fill(0);
        self.epoch += 1;
    }

    pub fn barrier(&mut self) {
        self.epoch += 1;
    }

    fn check(&self, at: u64, len: usize) -> Result<usize, String> {
        let size = self.bytes.len() as u64;
        if at.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(format!("{len} bytes at {at:#x} of shared memory, which has {size}"));
        }
        Ok(at as usize)
    }

    /// Looks for another warp's tag of this epoch.
    #[inline(always)]
    fn other(&self, tags: &[u32], warp: u32) -> Option<u32> {
        let mine = self.epoch << 6 | (warp + 1);
        let clash = |&tag: &u32| tag >> 6 == self.epoch && tag != mine && tag & WHO != 0;
        if tags.iter().any(clash) { tags.iter().copied().find(clash) } else { None }
    }

    fn race(&self, at: usize, warp: u32, does: &str, tag: u32, did: &str) -> Option<String> {
        let who = match tag & WHO {
            SEVERAL => "several warps".to_owned(),
            ATOMIC => "an atomic operation".to_owned(),
            other => format!("warp {}", other - 1),
        };
        Some(format!(
            "race: shared memory at {at} is {does} by warp {warp} and {did} by {who} without a barrier between"
        ))
    }

    pub fn read(&mut self, at: u64, out: &mut [u8], warp: u32) -> Result<Seen, String> {
        let from = self.check(at, out.len())?;
        let range = from..from + out.len();
        out.copy_from_slice(&self.bytes[range.clone()]);
        let race = self.other(&self.writers[range.clone()], warp);
        let race = race.and_then(|tag| self.race(from, warp, "read", tag, "written"));
        let (epoch, mine) = (self.epoch, self.epoch << 6 | (warp + 1));
        for tag in &mut self.readers[range.clone()] {
            *tag = if *tag >> 6 == epoch && *tag != mine { epoch << 6 | SEVERAL } else { mine };
        }
        Ok(Seen { unwritten: self.written[range].contains(&0), race })
    }

    pub fn write(&mut self, at: u64, bytes: &[u8], warp: u32) -> Result<Seen, String> {
        let from = self.check(at, bytes.len())?;
        let race = self.claim(from, bytes.len(), warp);
        self.bytes[from..from + bytes.len()].copy_from_slice(bytes);
        self.written[from..from + bytes.len()].fill(1);
        Ok(Seen { unwritten: false, race })
    }

    fn claim(&mut self, from: usize, len: usize, warp: u32) -> Option<String> {
        let range = from..from + len;
        let written = self.other(&self.writers[range.clone()], warp).map(|tag| (tag, "written"));
        let used = written.or_else(|| self.other(&self.readers[range.clone()], warp).map(|tag| (tag, "read")));
        let race = used.and_then(|(tag, did)| self.race(from, warp, "written", tag, did));
        let mine = self.epoch << 6 | (warp + 1);
        self.writers[range].fill(mine);
        race
    }

    /// A copy is on its way here: nobody may use the bytes until it has come.
    pub fn expect(&mut self, at: u64, len: usize, warp: u32) -> Result<Seen, String> {
        let from = self.check(at, len)?;
        let race = self.claim(from, len, warp);
        self.bytes[from..from + len].fill(0xff);
        self.written[from..from + len].fill(0);
        Ok(Seen { unwritten: false, race })
    }

    /// The bytes for an atomic operation, which races with all but others of its kind.
    pub fn atomic(&mut self, at: u64, len: usize) -> Result<(&mut [u8], Seen), String> {
        let from = self.check(at, len)?;
        let range = from..from + len;
        let (epoch, atomic) = (self.epoch, self.epoch << 6 | ATOMIC);
        let clash = |tag: &&u32| **tag >> 6 == epoch && **tag != atomic;
        let tags = self.writers[range.clone()].iter().chain(&self.readers[range.clone()]);
        let race =
            tags.copied().find(|tag| clash(&tag)).and_then(|tag| self.race(from, 0, "changed atomically", tag, "used"));
        self.writers[range.clone()].fill(atomic);
        let unwritten = self.written[range.clone()].contains(&0);
        self.written[range.clone()].fill(1);
        Ok((&mut self.bytes[range], Seen { unwritten, race }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_must_lie_between_two_warps() {
        let mut shared = Shared::new(16);
        shared.clear();
        let mut out = [0; 4];
        assert!(shared.read(0, &mut out, 0).expect("inside").unwritten);
        shared.clear();
        assert_eq!(shared.write(0, &[1; 4], 0), Ok(Seen::default()));
        assert_eq!(shared.read(0, &mut out, 0), Ok(Seen::default()));
        let race = shared.read(2, &mut out[..2], 1).expect("inside").race.expect("a race");
        assert!(race.contains("at 2 is read by warp 1 and written by warp 0"), "{race}");
        shared.barrier();
        assert_eq!(shared.read(0, &mut out, 1), Ok(Seen::default()));
        assert_eq!(shared.read(0, &mut out, 2), Ok(Seen::default()));
        let race = shared.write(3, &[1], 2).expect("inside").race.expect("a race");
        assert!(race.contains("written by warp 2 and read by several warps"), "{race}");
        assert!(shared.write(4, &[1; 2], 0).expect("inside").race.is_none());
        assert!(shared.write(6, &[1; 2], 1).expect("inside").race.is_none(), "another byte of the same word");
        assert!(shared.write(15, &[1; 2], 0).expect_err("outside").contains("which has 16"));
        assert!(shared.read(u64::MAX, &mut out, 0).is_err());
    }

    #[test]
    fn atomic_operations_do_not_race_with_each_other() {
        let mut shared = Shared::new(4);
        shared.clear();
        shared.write(0, &[0; 4], 0).expect("inside");
        shared.barrier();
        assert!(shared.atomic(0, 4).expect("inside").1.race.is_none());
        assert!(shared.atomic(0, 4).expect("inside").1.race.is_none());
        let mut out = [0; 4];
        assert!(shared.read(0, &mut out, 1).expect("inside").race.expect("a race").contains("an atomic operation"));
    }
}
