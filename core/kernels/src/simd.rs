//! Vector instructions, chosen at run time, and no wider than [`arithmetic::limit`](crate::arithmetic::limit) allows.

use pulp::{Scalar, Scalar128b, WithSimd};

use crate::arithmetic::{Level, widest};

/// Runs `work` compiled for the widest vectors that may be used. Rust never contracts `a·b + c`, so what it computes does
/// not depend on the choice.
///
/// The closure, and every closure that it calls, has to be `#[inline(always)]`: code that stays a function of its own is
/// compiled for the processor that all others are.
#[inline(always)]
pub(crate) fn simd<R>(work: impl FnOnce() -> R) -> R {
    match widest() {
        Level::Scalar | Level::Bits128 => work(),
        #[cfg(target_arch = "x86_64")]
        Level::Bits256 => match pulp::x86::V3::try_new() {
            Some(v3) => v3.vectorize(work),
            None => work(),
        },
        _ => pulp::Arch::new().dispatch(work),
    }
}

/// As [`simd`], for kernels that are written for vectors of any width.
#[inline(always)]
pub(crate) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    match widest() {
        Level::Scalar => op.with_simd(Scalar),
        Level::Bits128 => op.with_simd(Scalar128b),
        #[cfg(target_arch = "x86_64")]
        Level::Bits256 => match pulp::x86::V3::try_new() {
            Some(v3) => pulp::Simd::vectorize(v3, op),
            None => op.with_simd(Scalar),
        },
        _ => pulp::Arch::new().dispatch(op),
    }
}

/// Asks for the line of memory at `address`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
