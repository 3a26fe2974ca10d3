//! A model that notes what is asked of it, and can fail when it should.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::architecture::Model;
use crate::nn::forward::Forward;
use crate::nn::spec::ModelSpec;
use crate::tensor::tape::Traced;
use crate::tensor::tokens::Tokens;
use crate::weights::schema::{ParamId, ParamList};

/// What the failing pass says.
pub(super) const PLANNED: &str = "this pass was meant to fail";

/// A model under observation.
#[derive(Debug)]
pub(super) struct Watched<'a> {
    model: &'a dyn Model,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    sites: BTreeSet<String>,
    /// How many passes succeed before one fails; all of them if absent.
    passes_left: Option<usize>,
}

impl<'a> Watched<'a> {
    pub(super) fn new(model: &'a dyn Model) -> Self {
        Self { model, seen: Mutex::default() }
    }

    /// The sites at which something was done.
    pub(super) fn touched(&self) -> BTreeSet<String> {
        self.seen().sites.clone()
    }

    /// Lets the pass after `passes` more fail, or none.
    pub(super) fn fail_after(&self, passes: Option<usize>) {
        self.seen().passes_left = passes;
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no thread panics while it holds the lock")
    }

    fn note(&self, pass: &Forward) -> Result<()> {
        let mut seen = self.seen();
        seen.sites.extend(pass.sites.asked().cloned());
        match &mut seen.passes_left {
            Some(0) => Err(Error::run(PLANNED)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Model for Watched<'_> {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn params(&self) -> &ParamList {
        self.model.params()
    }

    fn config(&self) -> Value {
        self.model.config()
    }

    fn sites(&self) -> Vec<String> {
        self.model.sites()
    }

    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        self.model.embed(tokens, pass)
    }

    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.model.block(index, x, pass)
    }

    fn final_norm(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.model.final_norm(x, pass)
    }

    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.model.logits(hidden, pass)
    }

    fn head(&self) -> Option<ParamId> {
        self.model.head()
    }

    fn hidden(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        self.note(pass)?;
        self.model.hidden(tokens, pass)
    }

    fn without_gradient(&self) -> Vec<(String, &'static str)> {
        self.model.without_gradient()
    }
}
