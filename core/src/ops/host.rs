//! What the host kernels share: access to the elements, vector instructions chosen at run time, and threads.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::gemm::Matrix;
use super::portable::Lanes;
pub(super) use super::simd::simd;
use super::{CandleResult, math};
use crate::Result;

/// Real numbers that the host kernels compute with.
pub(super) trait Real:
    WithDType + Lanes + std::iter::Sum + std::ops::AddAssign + std::ops::MulAssign + Send + Sync
{
    /// The number nearest to `value`.
    fn of(value: f64) -> Self {
        <Self as WithDType>::from_f64(value)
    }

    /// `eˣ`, fast where that costs no more than rounding; the same bits on every processor.
    fn fast_exp(self) -> Self;

    /// Likewise, also where it is nearly zero or infinite.
    fn portable_exp(self) -> Self {
        self.fast_exp()
    }

    /// `ln x`, the same bits on every processor, unlike the C library's.
    fn portable_ln(self) -> Self {
        Self::of(libm::log(self.to_f64()))
    }

    /// The elements of a storage of this type.
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]>;

    /// Computes `C (+)= alpha A B` by a kernel of this type's own, if one suits the product; says whether.
    ///
    /// # Safety
    /// As [`multiply`](super::gemm::multiply).
    #[allow(unsafe_code, reason = "products take pointers")]
    unsafe fn multiply_specially(
        _: Matrix<*mut Self>,
        _accumulate: bool,
        _alpha: Self,
        _: Matrix<*const Self>,
        _: Matrix<*const Self>,
        _threads: usize,
    ) -> bool {
        false
    }
}

impl Real for f32 {
    #[inline(always)]
    fn fast_exp(self) -> Self {
        math::exp(self)
    }

    fn portable_exp(self) -> Self {
        if (-87. ..=88.).contains(&self) { math::exp(self) } else { libm::expf(self) }
    }

    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(data) = storage { Some(data) } else { None }
    }

    #[allow(unsafe_code, reason = "products take pointers")]
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "other processors have no tile unit"))]
    unsafe fn multiply_specially(
        c: Matrix<*mut Self>,
        accumulate: bool,
        alpha: Self,
        a: Matrix<*const Self>,
        b: Matrix<*const Self>,
        threads: usize,
    ) -> bool {
        // SAFETY: the caller's, and what `suits` says.
        unsafe {
            if super::skinny::multiply(c, accumulate, alpha, a, b) {
                return true;
            }
            #[cfg(target_arch = "x86_64")]
            if crate::arithmetic::chosen() == crate::arithmetic::Arithmetic::Native && super::amx::suits(&c, &a, &b) {
                super::amx::multiply(c, accumulate, alpha, a, b, threads);
                return true;
            }
        }
        false
    }
}

impl Real for f64 {
    #[inline(always)]
    fn fast_exp(self) -> Self {
        libm::exp(self)
    }

    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F64(data) = storage { Some(data) } else { None }
    }
}

/// Calls `$kernel::<f32>` or `$kernel::<f64>` by the element type.
macro_rules! by_dtype {
    ($dtype:expr, $kernel:ident ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            candle_core::DType::F32 => $kernel::<f32>($($arg),*),
            candle_core::DType::F64 => $kernel::<f64>($($arg),*),
            other => Err(crate::Error::device(format!("no host kernel for {other:?}")).help("use dtype = \"f32\" on the CPU")),
        }
    };
}
pub(super) use by_dtype;

/// The elements of a contiguous host tensor, lent to `f`.
pub(super) fn read<T: Real, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(crate::Error::run("a host kernel was given a tensor of another device"));
    };
    let (from, to) = layout.contiguous_offsets().expect("made contiguous above");
    f(&storage.as_slice::<T>()?[from..to])
}

/// The elements of a contiguous host tensor, lent to `f` for writing. No other tensor may share the storage while
/// `f` reads it.
pub(super) fn write<T: Real>(tensor: &Tensor, f: impl FnOnce(&mut [T])) -> Result<()> {
    struct Lend<F>(Cell<Option<F>>);

    impl<F: FnOnce(&mut CpuStorage, &Layout) -> CandleResult<()>> InplaceOp1 for Lend<F> {
        fn name(&self) -> &'static str {
            "write"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
            self.0.take().expect("called once")(storage, layout)
        }
    }

    let lend = move |storage: &mut CpuStorage, layout: &Layout| {
        match (T::elements(storage), layout.contiguous_offsets()) {
            (Some(data), Some((from, to))) => f(&mut data[from..to]),
            _ => candle_core::bail!("only a contiguous tensor of the kernel's type can be written in place"),
        }
        Ok(())
    };
    Ok(tensor.inplace_op1(&Lend(Cell::new(Some(lend))))?)
}

/// A host tensor of `values`.
pub(super) fn tensor<T: Real>(values: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
}

/// Elements that one thread takes at a time. The split never depends on the number of threads, so that sums over the
/// parts do not either.
const GRAIN: usize = 1 << 14;

/// Rows of `width` that one task takes.
fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Fills the rows of `out` (`width` elements each): `f(first, rows)` is called, in parallel, for runs of rows that
/// begin at row `first`.
pub(super) fn rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let step = rows_per_task(width);
    let run = |(index, part): (usize, &mut [T])| {
        simd(
            #[inline(always)]
            || f(index * step, part),
        );
    };
    if out.len() <= 2 * GRAIN {
        out.chunks_mut(step * width).enumerate().for_each(run);
    } else {
        out.par_chunks_mut(step * width).enumerate().for_each(run);
    }
}

/// As [`rows`], for two outputs of one shape.
pub(super) fn rows2<T: Send>(a: &mut [T], b: &mut [T], width: usize, f: impl Fn(usize, &mut [T], &mut [T]) + Sync) {
    let step = rows_per_task(width);
    let run = |(index, (a, b)): (usize, (&mut [T], &mut [T]))| {
        simd(
            #[inline(always)]
            || f(index * step, a, b),
        );
    };
    if a.len() <= 2 * GRAIN {
        a.chunks_mut(step * width).zip(b.chunks_mut(step * width)).enumerate().for_each(run);
    } else {
        a.par_chunks_mut(step * width).zip(b.par_chunks_mut(step * width)).enumerate().for_each(run);
    }
}

/// The sum over parts of the rows of `data` (`width` elements each) of the vectors of `len` elements that `f` adds to.
/// The parts are summed in their order.
pub(super) fn sum_over_rows<T: Real>(
    count: usize,
    width: usize,
    len: usize,
    f: impl Fn(std::ops::Range<usize>, &mut [T]) + Sync,
) -> Vec<T> {
    let step = rows_per_task(width).max(count.div_ceil(16));
    let part = |index: usize| {
        let mut sum = vec![T::zero(); len];
        simd(
            #[inline(always)]
            || f(index * step..((index + 1) * step).min(count), &mut sum),
        );
        sum
    };
    let parts = count.div_ceil(step);
    let sums: Vec<Vec<T>> = if count * width <= 2 * GRAIN {
        (0..parts).map(part).collect()
    } else {
        (0..parts).into_par_iter().map(part).collect()
    };
    let add = |mut total: Vec<T>, sum: Vec<T>| {
        for (total, value) in total.iter_mut().zip(sum) {
            *total += value;
        }
        total
    };
    sums.into_iter().reduce(add).unwrap_or_else(|| vec![T::zero(); len])
}

/// Calls `f` for every index below `count`, in parallel if `cost` (in elements) is worth it.
pub(super) fn tasks(count: usize, cost: usize, f: impl Fn(usize) + Sync + Send) {
    if cost <= 2 * GRAIN {
        (0..count).for_each(f);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// Memory that parallel tasks write disjoint parts of.
pub(super) struct Shared<T>(*mut T);

// SAFETY: only a pointer travels; whoever dereferences it answers for disjointness.
#[allow(unsafe_code, reason = "tasks of one kernel write disjoint parts of one output")]
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "tasks of one kernel write disjoint parts of one output")]
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn new(start: *mut T) -> Self {
        Self(start)
    }

    /// The pointer to element `at`.
    pub(super) fn at(&self, at: usize) -> *mut T {
        self.0.wrapping_add(at)
    }
}
