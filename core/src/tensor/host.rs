//! The elements of candle's host tensors as slices, for the kernels.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, WithDType};
use titer_kernels::gemm::Factor;

use crate::error::Result;

/// Element types that the host kernels compute with.
pub(super) trait Element: Factor + WithDType {
    /// The elements of a storage of this type.
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]>;

    /// `of` as f32 numbers if that is what they are. Matrices in low precision are multiplied in f32 only.
    fn singles(of: &[Self]) -> Option<&[f32]>;

    /// The same, to write.
    fn singles_mut(of: &mut [Self]) -> Option<&mut [f32]>;
}

impl Element for f32 {
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(data) = storage { Some(data) } else { None }
    }

    fn singles(of: &[Self]) -> Option<&[f32]> {
        Some(of)
    }

    fn singles_mut(of: &mut [Self]) -> Option<&mut [f32]> {
        Some(of)
    }
}

impl Element for f64 {
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F64(data) = storage { Some(data) } else { None }
    }

    fn singles(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn singles_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

/// Calls `$kernel::<f32>` or `$kernel::<f64>` by the element type.
macro_rules! by_dtype {
    ($dtype:expr, $kernel:ident ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            candle_core::DType::F32 => $kernel::<f32>($($arg),*),
            candle_core::DType::F64 => $kernel::<f64>($($arg),*),
            other => Err(crate::error::Error::device(format!("no host kernel for {other:?}")).help("use dtype = \"f32\" on the CPU")),
        }
    };
}
pub(super) use by_dtype;

/// The elements of a contiguous host tensor, lent to `f`.
pub(super) fn read<T: Element, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    read_all([tensor], |[elements]| f(elements))
}

/// The elements of a contiguous host tensor, lent to `f` for writing. No other tensor may share the storage while
/// `f` reads it.
pub(super) fn write<T: Element>(tensor: &Tensor, f: impl FnOnce(&mut [T])) -> Result<()> {
    struct Lend<F>(Cell<Option<F>>);

    impl<F: FnOnce(&mut CpuStorage, &Layout) -> candle_core::Result<()>> InplaceOp1 for Lend<F> {
        fn name(&self) -> &'static str {
            "write"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
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
pub(super) fn tensor<T: Element>(values: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
}

/// The elements of several contiguous host tensors, lent to `f`.
pub(super) fn read_all<T: Element, R, const N: usize>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[T]; N]) -> Result<R>,
) -> Result<R> {
    let tensors = tensors.into_iter().map(Tensor::contiguous).collect::<candle_core::Result<Vec<_>>>()?;
    let storages: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[T]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&storages) {
        let Storage::Cpu(storage) = &**storage else {
            return Err(crate::error::Error::run("a host kernel was given a tensor of another device"));
        };
        let (from, to) = layout.contiguous_offsets().expect("made contiguous above");
        *slice = &storage.as_slice::<T>()?[from..to];
    }
    f(slices)
}

/// The size of the last dimension.
pub(super) fn last_dim(tensor: &Tensor) -> usize {
    tensor.dims().last().copied().unwrap_or(1)
}
