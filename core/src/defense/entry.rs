//! The description of a defense in the registry.

use serde::Serialize;
use serde_json::Value;

use crate::defense::alignment_defense::AlignmentDefense;
use crate::defense::stage::Stage;
use crate::error::{Error, Result};
use crate::registry::entry::{Entry, by_fields};
use crate::registry::settings::{Settings, SettingsType};

/// What a defense must know that an ordinary provider may not: declared, so that unequal comparisons show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Privilege {
    /// Whether it sees harmful answers.
    pub harmful_answers: bool,
    /// What it needs, in words; "none" if nothing.
    pub needs: &'static str,
}

impl Privilege {
    /// Nothing beyond the data of the stage itself.
    pub const NONE: Self = Self { harmful_answers: false, needs: "none" };
}

/// A point in which the published code differs from the method as it is meant, and the setting that decides between
/// the two. The setting's default is the correct form.
#[derive(Debug, Clone, Copy)]
pub struct Quirk {
    /// The setting.
    pub setting: &'static str,
    /// Its value under `fidelity = "code-exact"`.
    pub published: fn() -> Value,
    /// What the published code does, in words.
    pub what: &'static str,
}

/// The setting of every defense that chooses between the correct form (the default) and the published code's.
const FIDELITY: &str = "fidelity";

/// The defenses of one method, and how the user's fine-tuning is trained: what an entry judges in
/// [`DefenseEntry::conflicts`].
#[derive(Debug, Clone, Copy)]
pub struct Stack<'a> {
    /// The name of the alignment defense; `None` for no alignment.
    pub align: Option<&'a str>,
    /// The name of the fine-tuning defense.
    pub fine_tune: &'a str,
    /// The name of the post-fine-tuning defense.
    pub post: Option<&'a str>,
    /// `double`, `single` or `full`.
    pub lora: &'a str,
}

/// What stands against a combination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// It cannot be: why.
    Refused(String),
    /// It can be, but whoever reads the result must know: what.
    Noted(String),
}

/// What a defense does not go with in training, each with the reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Why it cannot be trained with gradient checkpointing; a plan with both is refused.
    pub checkpointing: Option<&'static str>,
    /// Why `k` accumulated batches of `b` rows are another update than one batch of `k b` rows; a plan with accumulation
    /// notes it.
    pub accumulation: Option<&'static str>,
}

/// Describes a defense to the registry.
///
/// ```
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
/// use titer_core::data::Batch;
/// use titer_core::{
///     AlignmentDefense, DefenseEntry, Privilege, Result, SettingsType, Sites, Stage, StepCx, Update, inventory,
///     no_conflict, no_limits, registry,
/// };
///
/// /// Plain fine-tuning with gradients of another size.
/// #[derive(Debug, Serialize, Deserialize, JsonSchema)]
/// #[serde(default)]
/// struct Scaled {
///     /// What gradients are multiplied with.
///     factor: f64,
/// }
///
/// impl Default for Scaled {
///     fn default() -> Self {
///         Self { factor: 0.5 }
///     }
/// }
///
/// impl AlignmentDefense for Scaled {
///     fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
///         Update::from(cx.backward(batch, Sites::none())?).weighed(self.factor)
///     }
/// }
///
/// inventory::submit! {
///     DefenseEntry {
///         name: "scaled",
///         summary: "plain fine-tuning with gradients of another size",
///         paper: "none",
///         formula: "g = c ∇L(w)",
///         stages: &[Stage::FineTune],
///         streams: |_| &[],
///         sites: &[],
///         passes: |_| 1.,
///         privilege: Privilege::NONE,
///         notes: "",
///         quirks: &[],
///         conflicts: no_conflict,
///         limits: no_limits,
///         settings: SettingsType::of::<Scaled>(),
///         neutral: Some(|| serde_json::json!({ "factor": 1.0 })),
///         version: 1,
///         build: |settings| Ok(Box::new(settings.parse::<Scaled>()?)),
///     }
/// }
///
/// let entry = registry::find::<DefenseEntry>("scaled")?;
/// assert_eq!((entry.settings.defaults)()["factor"], 0.5);
/// # Ok::<(), titer_core::Error>(())
/// ```
#[derive(Debug)]
pub struct DefenseEntry {
    /// The name in configurations.
    pub name: &'static str,
    /// One line for `titer list`.
    pub summary: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// The update rule in the paper's symbols.
    pub formula: &'static str,
    /// The stages it can act at.
    pub stages: &'static [Stage],
    /// The extra data streams it draws from, such as `harmful` or `safe`, with the settings given.
    pub streams: fn(&Value) -> &'static [&'static str],
    /// The kinds of sites it acts on, such as `attn_out`.
    pub sites: &'static [&'static str],
    /// Forward-and-backward passes per step, with the settings given.
    pub passes: fn(&Value) -> f64,
    /// What it must know.
    pub privilege: Privilege,
    /// What a user should know besides, such as where this code deliberately differs from the published.
    pub notes: &'static str,
    /// Where the published code differs from the method, one switch each.
    pub quirks: &'static [Quirk],
    /// What stands against a stack that this defense is part of; see [`no_conflict`].
    pub conflicts: fn(&Stack) -> Option<Conflict>,
    /// What it does not go with in training, with the settings given; see [`no_limits`].
    pub limits: fn(&Value) -> Limits,
    /// The type of its settings.
    pub settings: SettingsType,
    /// Settings at which it must equal plain fine-tuning bit for bit (law 3); `None` if it has no such settings.
    pub neutral: Option<fn() -> Value>,
    /// Changes whenever an update may.
    pub version: u32,
    /// Builds the defense.
    pub build: fn(&Settings) -> Result<Box<dyn AlignmentDefense>>,
}

inventory::collect!(DefenseEntry);

/// The [`DefenseEntry::conflicts`] of a defense that goes with all others.
pub fn no_conflict(_: &Stack) -> Option<Conflict> {
    None
}

/// The [`DefenseEntry::limits`] of a defense that trains under gradient checkpointing, and to which accumulated batches
/// are one large batch.
pub fn no_limits(_: &Value) -> Limits {
    Limits::default()
}

impl DefenseEntry {
    /// `given`, with the published value of every quirk that it leaves open if it asks for `fidelity = "code-exact"`.
    fn with_fidelity(&self, given: &Settings) -> Result<Settings> {
        let mut settings = given.as_map().clone();
        let code_exact = match settings.remove(FIDELITY) {
            None => false,
            Some(Value::String(word)) if word == "correct" => false,
            Some(Value::String(word)) if word == "code-exact" => true,
            Some(other) => {
                return Err(Error::config(format!("`fidelity` is `correct` or `code-exact`, found `{other}`"))
                    .key(FIDELITY)
                    .help("`code-exact` copies what the published code does; leave the key out for the correct form"));
            }
        };
        if code_exact {
            for quirk in self.quirks {
                settings.entry(quirk.setting).or_insert_with(quirk.published);
            }
        }
        Ok(settings.into())
    }
}

impl Entry for DefenseEntry {
    const KIND: &'static str = "defense";
    by_fields!();
    fn resolve(&self, given: &Settings) -> Result<Value> {
        self.settings.resolve(&self.with_fidelity(given)?)
    }
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(default)]
    struct Demo {
        axis: String,
        strength: f64,
    }

    fn entry() -> DefenseEntry {
        DefenseEntry {
            name: "demo",
            summary: "",
            paper: "",
            formula: "",
            stages: &[Stage::Align],
            streams: |_| &[],
            sites: &[],
            passes: |_| 1.,
            privilege: Privilege::NONE,
            notes: "",
            quirks: &[Quirk { setting: "axis", published: || json!("sequence"), what: "normalises over the sequence" }],
            conflicts: no_conflict,
            limits: no_limits,
            settings: SettingsType::of::<Demo>(),
            neutral: None,
            version: 1,
            build: |_| Err(Error::run("only described")),
        }
    }

    fn resolved(given: Value) -> Result<Value> {
        let Value::Object(given) = given else { panic!("a table") };
        entry().resolve(&given.into())
    }

    #[test]
    fn code_exact_sets_the_quirks_that_are_left_open() -> Result<()> {
        assert_eq!(resolved(json!({}))?["axis"], "");
        assert_eq!(resolved(json!({ "fidelity": "correct" }))?["axis"], "");
        assert_eq!(resolved(json!({ "fidelity": "code-exact" }))?["axis"], "sequence");
        assert_eq!(resolved(json!({ "fidelity": "code-exact", "axis": "vocab" }))?["axis"], "vocab");
        let error = resolved(json!({ "fidelity": "code-exct" })).unwrap_err().to_string();
        assert!(error.contains("`correct` or `code-exact`"), "{error}");
        Ok(())
    }
}
