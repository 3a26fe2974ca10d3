//! What one thread makes and another uses or drops; and numbers that are none, and ids that point nowhere.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use titer_core::Weights;
use titer_core::data::{Batch, Example};
use titer_core::defense::toolkit::label_log_probabilities;
use titer_core::rng::Seed;
use titer_tests::{build, variants};

use crate::standin::device;

#[test]
#[ignore = "needs a device: see .ci/device"]
fn a_tensor_of_one_thread_is_read_by_another() -> Result<()> {
    let device = device()?;
    let made = std::thread::scope(|scope| {
        scope.spawn(|| -> Result<Tensor> { Ok((Tensor::new(&[1f32, 2., 3.], &device)? * 2.)?) }).join()
    });
    let made = made.expect("no panic")?;
    ensure!((made + 1.)?.to_vec1::<f32>()? == [3., 5., 7.]);
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn a_tensor_may_be_dropped_by_a_thread_that_never_used_the_device() -> Result<()> {
    let device = device()?;
    for _ in 0..3 {
        let tensor = Tensor::new(&[1f32, 2., 3.], &device)?;
        std::thread::spawn(move || drop(tensor)).join().expect("no panic");
        ensure!(Tensor::new(&[1f32], &device)?.to_vec1::<f32>()? == [1.]);
    }
    Ok(())
}

/// Two threads train at once, each with tensors of its own.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn two_threads_compute_what_each_alone_does() -> Result<()> {
    let device = device()?;
    let work = |seed: u64| -> Result<Vec<f32>> {
        let mut x =
            titer_core::rng::randn(&[17, 17], &mut Seed::new(seed).generator(), &device)?.to_dtype(DType::F32)?;
        for _ in 0..20 {
            x = (x.matmul(&x)?.tanh()? * 0.5)?;
        }
        Ok(x.flatten_all()?.to_vec1()?)
    };
    let alone = [work(1)?, work(2)?];
    let together = std::thread::scope(|scope| {
        [1, 2].map(|seed| scope.spawn(move || work(seed))).map(|thread| thread.join().expect("no panic"))
    });
    let together = together.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(together == alone);
    Ok(())
}

/// An id or a label outside the vocabulary is an error of the data, and the device works on.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn ids_outside_the_vocabulary_are_told() -> Result<()> {
    let device = device()?;
    let model = build(&variants()[0].1)?;
    let weights = Weights::random(model.params(), Seed::new(1), DType::F32, &device)?;
    let outside = |tokens: Vec<u32>| -> Result<String> {
        let batch = Batch::collate(&[&Example { tokens, first_label: 1 }], 0, &device)?;
        let mut streams = titer_core::defense::Streams::default();
        let mut cx = titer_tests::context(model.as_ref(), &weights, &mut streams);
        let error = cx.backward(&batch, titer_core::Sites::none()).err().context("no error")?;
        Ok(error.to_string())
    };
    for tokens in [vec![1, 900_000, 2], vec![1, 2, 900_000]] {
        let said = outside(tokens)?;
        ensure!(said.contains("900000") && said.contains("vocabulary of 23"), "{said}");
    }
    // So does a loss that gathers by labels itself.
    let batch = Batch::collate(&[&Example { tokens: vec![1, 2, 900_000], first_label: 1 }], 0, &device)?;
    let logits = Tensor::zeros((2, 23), DType::F32, &device)?;
    let error = label_log_probabilities(&logits, &batch.targets, batch.largest_target).err().context("no error")?;
    ensure!(error.to_string().contains("900000"), "{error}");
    // The device works on.
    ensure!(Tensor::new(&[1f32], &device)?.to_vec1::<f32>()? == [1.]);
    Ok(())
}
