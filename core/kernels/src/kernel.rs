//! Units that not every processor has.

/// A unit of the processor. Having a value of the type is the proof that this processor has the unit, so code that holds
/// one may use its instructions.
///
/// # Safety
/// [`Kernel::new`] gives a value only if this processor and this system have the unit.
pub unsafe trait Kernel: Copy {
    /// The unit, if this processor has it.
    fn new() -> Option<Self>;

    /// Its name in the identity of native arithmetic.
    fn name(self) -> &'static str;
}

// SAFETY: `try_new` asks the processor.
#[cfg(target_arch = "x86_64")]
unsafe impl Kernel for pulp::x86::V3 {
    #[inline]
    fn new() -> Option<Self> {
        Self::try_new()
    }

    fn name(self) -> &'static str {
        "avx2"
    }
}

// SAFETY: as above.
#[cfg(target_arch = "x86_64")]
unsafe impl Kernel for pulp::x86::V4 {
    #[inline]
    fn new() -> Option<Self> {
        Self::try_new()
    }

    fn name(self) -> &'static str {
        "avx512"
    }
}
