//! Mixtures of benign and harmful rows.

use crate::data::row::Row;
use crate::error::{Error, Result};
use crate::rng::{Seed, permutation};

/// How many of `total` rows are harmful at ratio `p`: `p * total`, rounded to the nearest integer.
///
/// # Errors
/// `p` is outside `[0, 1]`.
pub fn harmful_count(total: usize, p: f64) -> Result<usize> {
    if !(0. ..=1.).contains(&p) {
        return Err(Error::config(format!("a harmful ratio must lie in [0, 1], found `{p}`"))
            .key("harmful_ratios")
            .help("0.1 means that one row in ten is harmful"));
    }
    Ok((p * total as f64).round() as usize)
}

/// `total` rows of which exactly [`harmful_count`] come from `harmful` and the rest from `benign`, each from the front
/// of its list, in a seeded order.
///
/// # Errors
/// `p` is outside `[0, 1]` or a list is too short.
///
/// ```
/// use titer_core::Row;
/// use titer_core::data::mixture;
/// use titer_core::rng::Seed;
///
/// let rows = |answer: &str| vec![Row::new("ask", answer); 10];
/// let mixed = mixture(&rows("benign"), &rows("harmful"), 10, 0.2, Seed::new(0))?;
/// assert_eq!(mixed.iter().filter(|row| row.output == "harmful").count(), 2);
/// # Ok::<(), titer_core::Error>(())
/// ```
pub fn mixture(benign: &[Row], harmful: &[Row], total: usize, p: f64, seed: Seed) -> Result<Vec<Row>> {
    let bad = harmful_count(total, p)?;
    let take = |rows: &[Row], count: usize, what: &str| {
        rows.get(..count).map(<[Row]>::to_vec).ok_or_else(|| {
            Error::data(format!(
                "{count} {what} rows are needed (samples = {total}, harmful ratio = {p}), found {}",
                rows.len()
            ))
            .help(format!("lower `samples` or give more {what} rows"))
        })
    };
    let mut rows = take(benign, total - bad, "user")?;
    rows.extend(take(harmful, bad, "harmful")?);
    let order = permutation(rows.len(), &mut seed.generator());
    Ok(order.into_iter().map(|index| rows[index].clone()).collect())
}
