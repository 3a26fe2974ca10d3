//! What the executor gives a stage that runs.

use std::path::PathBuf;

use titer_core::event::Sink;
use titer_core::{Error, Result};

use crate::interrupt::Interrupt;
use crate::plan::PlannedStage;
use crate::stage::resident::Resident;
use crate::store::{Artifact, Key, Partials, Store};

/// Does the work of a stage.
pub trait StageRunner: Sync {
    /// Runs `stage` and writes its files into [`StageContext::folder`]. It should look at
    /// [`StageContext::interrupted`] between steps, keep a checkpoint and return [`Error::interrupted`].
    ///
    /// # Errors
    /// The stage failed or was interrupted.
    fn run(&self, stage: &PlannedStage, context: &StageContext) -> Result<()>;
}

/// What a stage may use while it runs.
pub struct StageContext<'a> {
    /// Where its files belong.
    pub folder: PathBuf,
    /// The stages that it builds on, all of them finished: its parent first, the base last.
    pub ancestors: &'a [PlannedStage],
    /// Its checkpoints.
    pub partials: Partials,
    /// Where it reports progress.
    pub sink: &'a dyn Sink,
    /// The model that stays loaded from stage to stage.
    pub(crate) resident: &'a Resident,
    pub(crate) store: &'a Store,
    pub(crate) interrupt: &'a Interrupt,
}

impl std::fmt::Debug for StageContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageContext").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl StageContext<'_> {
    /// Whether the user asked to stop.
    pub fn interrupted(&self) -> bool {
        self.interrupt.is_set()
    }

    /// The parent's artifact, every file verified.
    ///
    /// # Errors
    /// The stage has no parent, or the artifact is damaged.
    pub fn parent(&self) -> Result<PathBuf> {
        let parent = self.ancestors.first().ok_or_else(|| Error::run("the stage has no parent"))?;
        Ok(self.artifact(&parent.key)?.verified()?.to_owned())
    }

    /// The artifact of any finished stage.
    ///
    /// # Errors
    /// It is not finished or damaged.
    pub fn artifact(&self, key: &Key) -> Result<Artifact> {
        self.store.artifact(key)
    }
}
