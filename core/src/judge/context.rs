//! What a judge is given, and where its verdicts go.

use std::fmt;
use std::path::Path;

use candle_core::Device;

use super::Verdict;
use crate::causal_lm::CausalLm;
use crate::error::{Error, Result};
use crate::weights::Precision;

/// Keeps the verdicts given so far, by the place of the answer; an error says to stop.
type Keep<'a> = &'a mut dyn FnMut(&[Option<Verdict>]) -> Result<()>;

/// What a judge is given, and where its verdicts go.
pub struct JudgeCx<'a> {
    device: &'a Device,
    precision: Precision,
    verdicts: Vec<Option<Verdict>>,
    keep: Keep<'a>,
}

impl fmt::Debug for JudgeCx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JudgeCx").field("verdicts", &self.verdicts).finish_non_exhaustive()
    }
}

impl<'a> JudgeCx<'a> {
    /// For a judge that runs on `device`. `precision` is how the base model is stored; `verdicts` has a place for each
    /// answer, with what an earlier run has given; `keep` is told after each batch.
    pub fn new(device: &'a Device, precision: Precision, verdicts: Vec<Option<Verdict>>, keep: Keep<'a>) -> Self {
        Self { device, precision, verdicts, keep }
    }

    /// The device that the run is on.
    pub fn device(&self) -> &Device {
        self.device
    }

    /// How the base model of the run is stored: what a judge without a `dtype` setting of its own takes.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Opens a model folder on the run's device, stored as the base model is.
    ///
    /// # Errors
    /// As [`CausalLm::open`].
    pub fn open(&self, folder: &Path) -> Result<CausalLm> {
        CausalLm::open(folder, self.precision, self.device)
    }

    /// The places of the answers that have no verdict yet, in their order.
    pub fn pending(&self) -> Vec<usize> {
        let pending = self.verdicts.iter().enumerate().filter(|(_, verdict)| verdict.is_none());
        pending.map(|(place, _)| place).collect()
    }

    /// Gives verdicts on the answers at these places. A second verdict on an answer replaces the first.
    ///
    /// # Errors
    /// There is no such answer, a score is not finite, the verdicts cannot be kept, or the user asked to stop.
    pub fn give(&mut self, verdicts: impl IntoIterator<Item = (usize, Verdict)>) -> Result<()> {
        let count = self.verdicts.len();
        for (place, verdict) in verdicts {
            if let Some(score) = verdict.score().filter(|score| !score.is_finite()) {
                return Err(Error::run(format!("the judge's score of answer {place} is {score}"))
                    .help("give a verdict that is unparsable, with the judge's output"));
            }
            let kept = self.verdicts.get_mut(place).ok_or_else(|| {
                Error::run(format!("the judge gave a verdict on answer {place} of {count}"))
                    .help("a judge gives verdicts on the places in `pending`, which begin at 0")
            })?;
            *kept = Some(verdict);
        }
        (self.keep)(&self.verdicts)
    }

    /// The verdicts given so far, by the place of the answer.
    pub fn into_verdicts(self) -> Vec<Option<Verdict>> {
        self.verdicts
    }
}
