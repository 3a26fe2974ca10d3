//! Products of matrices, by the kernel that suits.

use crate::arithmetic::{Arithmetic, chosen};
use crate::kernel::Kernel;
use crate::low_precision::EncodedMatrix;
use crate::matrix::{RawMatrix, View, ViewMut};
use crate::real::Real;
use crate::{int8, portable, skinny};

/// `alpha A B` in fresh memory, row-major; on all threads.
///
/// # Panics
/// The inner sizes differ.
pub fn product<T: Factor>(alpha: T, a: View<T>, b: View<T>) -> Vec<T> {
    let size = inner(&a, &b);
    let mut c = Vec::<T>::with_capacity(size[0] * size[1]);
    // SAFETY: the views lie in their slices, and the product writes every element before it counts as initialised.
    unsafe {
        let target = RawMatrix::row_major(c.as_mut_ptr(), size, size[1]);
        multiply(target, false, alpha, a.raw(), b.raw(), threads());
        c.set_len(size[0] * size[1]);
    }
    c
}

/// `C = alpha A B`, or `C += alpha A B` if it `accumulate`s; on all threads.
///
/// # Panics
/// The sizes differ.
pub fn product_into<T: Factor>(mut c: ViewMut<T>, accumulate: bool, alpha: T, a: View<T>, b: View<T>) {
    assert_eq!(c.size(), inner(&a, &b), "a product of another size");
    // SAFETY: the views lie in their slices, of which that of `C` is borrowed alone.
    unsafe { multiply(c.raw(), accumulate, alpha, a.raw(), b.raw(), threads()) }
}

/// `Y = X Wᵀ`, row-major, for a few rows `X` and a large `W` in low precision; says whether it did. `W` is decoded where
/// it is multiplied, and the result is that of the decoded numbers to the last bit.
///
/// # Panics
/// The sizes differ.
pub fn few_rows_by_encoded(y: &mut [f32], x: &[f32], w: EncodedMatrix) -> bool {
    let [rows, columns] = w.size();
    let few = x.len() / columns;
    assert_eq!((x.len(), y.len()), (few * columns, few * rows), "a product of another size");
    let suits = few <= skinny::SMALL && rows >= skinny::LARGE && columns >= skinny::LARGE;
    if suits {
        skinny::encoded_dots(y, w, x);
    }
    suits
}

/// `Y = X Wᵀ`, row-major, for a quantized `W` in native arithmetic, with the rows of `X` rounded to 8 bits; says whether it
/// did. The results depend on neither the processor nor the number of threads.
///
/// # Panics
/// The sizes differ.
pub fn rounded_by_encoded(y: &mut [f32], x: &[f32], w: EncodedMatrix) -> bool {
    let [rows, columns] = w.size();
    let count = x.len() / columns;
    assert_eq!((x.len(), y.len()), (count * columns, count * rows), "a product of another size");
    let suits = chosen() == Arithmetic::Native && int8::suits(w.encoding());
    if suits {
        int8::multiply(y, x, w);
    }
    suits
}

/// `C = A W`, or `C += A W` if it `accumulate`s, for a `W` in bf16 that native arithmetic multiplies as it is stored, if
/// this processor can; says whether it did. Its transpose is taken if `transpose`d. The accuracy is that of f32:
/// `A` is split into three parts, so that none of its bits are lost. On all threads.
///
/// # Panics
/// The sizes differ.
#[cfg_attr(not(target_arch = "x86_64"), expect(unused, reason = "other processors have no tile unit"))]
pub fn product_with_bf16_into(
    mut c: ViewMut<f32>,
    accumulate: bool,
    a: View<f32>,
    w: EncodedMatrix,
    transpose: bool,
) -> bool {
    let [rows, columns] = if transpose { [w.size()[1], w.size()[0]] } else { w.size() };
    assert_eq!((a.size()[1], c.size()), (rows, [a.size()[0], columns]), "matrices that cannot be multiplied");
    #[cfg(target_arch = "x86_64")]
    if chosen() == Arithmetic::Native
        && let Some(unit) = crate::amx::Amx::new()
        && let Some(bits) = w.bf16_bits()
    {
        let (c, a, b) = (c.raw(), a.raw(), if transpose { bits.t() } else { bits });
        if crate::amx::suits(&c, &a, &b) {
            // SAFETY: the views lie in their slices, of which that of `C` is borrowed alone.
            unsafe { unit.multiply(c, accumulate, 1., a, b, threads()) };
            return true;
        }
    }
    false
}

fn inner<T>(a: &View<T>, b: &View<T>) -> [usize; 2] {
    let ([rows, k], [inner, columns]) = (a.size(), b.size());
    assert_eq!(k, inner, "matrices that cannot be multiplied");
    [rows, columns]
}

/// How many threads a product uses.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// The units that native arithmetic uses, as part of its identity.
pub fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        let vectors = || pulp::x86::V4::new().map(Kernel::name).or_else(|| pulp::x86::V3::new().map(Kernel::name));
        crate::amx::Amx::new().map(Kernel::name).or_else(vectors).unwrap_or("sse2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH
}

/// Numbers that matrices are made of.
pub trait Factor: Real {
    /// Computes `C (+)= alpha A B` by a kernel of this type's own, if one suits the product; says whether.
    ///
    /// # Safety
    /// The matrices lie in valid memory, and nothing else accesses `C` meanwhile.
    unsafe fn multiply_specially(
        _: RawMatrix<*mut Self>,
        _accumulate: bool,
        _alpha: Self,
        _: RawMatrix<*const Self>,
        _: RawMatrix<*const Self>,
        _threads: usize,
    ) -> bool {
        false
    }
}

impl Factor for f32 {
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "other processors have no tile unit"))]
    unsafe fn multiply_specially(
        c: RawMatrix<*mut f32>,
        accumulate: bool,
        alpha: f32,
        a: RawMatrix<*const f32>,
        b: RawMatrix<*const f32>,
        threads: usize,
    ) -> bool {
        // SAFETY: the caller's.
        unsafe {
            if skinny::multiply(c, accumulate, alpha, a, b) {
                return true;
            }
            #[cfg(target_arch = "x86_64")]
            if chosen() == Arithmetic::Native
                && crate::amx::suits(&c, &a, &b)
                && let Some(unit) = crate::amx::Amx::new()
            {
                unit.multiply(c, accumulate, alpha, a, b, threads);
                return true;
            }
        }
        false
    }
}

impl Factor for f64 {}

/// `C (+)= alpha A B`.
///
/// # Safety
/// The matrices lie in valid memory, and nothing else accesses `C` meanwhile.
pub(crate) unsafe fn multiply<T: Factor>(
    c: RawMatrix<*mut T>,
    accumulate: bool,
    alpha: T,
    a: RawMatrix<*const T>,
    b: RawMatrix<*const T>,
    threads: usize,
) {
    debug_assert_eq!((c.rows, c.columns, a.columns), (a.rows, b.columns, b.rows));
    // SAFETY: as this function's.
    if unsafe { T::multiply_specially(c, accumulate, alpha, a, b, threads) } {
        return;
    }
    if chosen() == Arithmetic::Portable {
        // SAFETY: as this function's.
        return unsafe { portable::multiply(c, accumulate, alpha, a, b, threads) };
    }
    let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    let stride = |stride: usize| stride.cast_signed();
    // SAFETY: as this function's.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.data,
            stride(c.column_stride),
            stride(c.row_stride),
            accumulate,
            a.data,
            stride(a.column_stride),
            stride(a.row_stride),
            b.data,
            stride(b.column_stride),
            stride(b.row_stride),
            T::one(),
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
