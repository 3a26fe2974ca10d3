//! Every registered defense on every registered architecture, and every architecture by itself; and defenses that are
//! broken on purpose, each caught by the check that is meant for it.

#![allow(clippy::print_stdout, reason = "a test shows its table")]

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::data::Batch;
use titer_core::defense::Clock;
use titer_core::testing::{Check, Fixture, check_defense, check_model};
use titer_core::{
    AlignmentDefense, DefenseEntry, Grads, Limits, ModelEntry, Privilege, SettingsType, Sites, Stage, StepCx, Update,
    no_conflict, no_limits, registry,
};
use titer_tests as _;

/// The checks that failed, a line each.
fn failures(subject: &str, checks: &[Check]) -> Vec<String> {
    let failed = checks.iter().filter(|check| check.outcome.failed());
    failed.map(|check| format!("{subject}: {check}")).collect()
}

/// Prints the table of one subject and gives its failures.
fn table(subject: &str, checks: &[Check]) -> Vec<String> {
    let lines: Vec<String> = checks.iter().map(ToString::to_string).collect();
    println!("{subject}\n{}\n", lines.join("\n"));
    failures(subject, checks)
}

/// The failures of every defense on one architecture.
fn defenses_on(architecture: &ModelEntry) -> Result<Vec<String>> {
    let world = Fixture::small(architecture)?;
    let failures = registry::all::<DefenseEntry>()?
        .into_iter()
        .flat_map(|entry| table(&format!("{} on {}", entry.name, architecture.name), &check_defense(entry, &world)));
    Ok(failures.collect())
}

#[test]
fn every_defense_conforms_on_every_architecture() -> Result<()> {
    let architectures = registry::all::<ModelEntry>()?;
    let failures = std::thread::scope(|scope| {
        let running: Vec<_> =
            architectures.into_iter().map(|architecture| scope.spawn(move || defenses_on(architecture))).collect();
        running.into_iter().map(|thread| thread.join().expect("no check panics")).collect::<Result<Vec<_>>>()
    })?;
    let failures = failures.concat();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    Ok(())
}

#[test]
fn every_architecture_conforms() -> Result<()> {
    let architectures = registry::all::<ModelEntry>()?;
    let failures: Vec<_> = architectures.into_iter().flat_map(|entry| table(entry.name, &check_model(entry))).collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    Ok(())
}

/// Which law a defense breaks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Fault {
    /// It breaks none: doubled gradients.
    #[default]
    None,
    /// It does nothing.
    Idle,
    /// It moves the weights for good.
    Meddles,
    /// It moves them for good if a pass fails.
    LeavesMoved,
    /// It goes on if a pass fails.
    Hides,
    /// It reads a stream that it does not declare.
    Undeclared,
    /// It touches sites that it does not declare.
    OtherSites,
    /// It keeps the last micro batch only.
    LastMicro,
    /// It forgets how far it was.
    Forgets,
    /// Its gradients point the wrong way.
    WrongSign,
    /// It makes a pass more than it says.
    MorePasses,
    /// It is not neutral when it should be.
    NeverNeutral,
    /// It looks at how long the longest row is.
    SeesLength,
    /// It fails on a single row.
    NeedsRows,
    /// It weighs a batch of a stream by the labels of the stage's own batch.
    Unweighed,
    /// It reads activations.
    Observes,
    /// It declares that it goes neither with accumulation nor with checkpointing, and goes with both.
    Overcautious,
}

/// Gradients times `strength`, but for one fault.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct Faulty {
    /// The factor.
    strength: f64,
    #[serde(skip)]
    fault: Fault,
    #[serde(skip)]
    steps: usize,
}

impl Default for Faulty {
    fn default() -> Self {
        Self { strength: 2., fault: Fault::None, steps: 0 }
    }
}

impl Faulty {
    /// The factor of this step.
    fn factor(&mut self, batch: &Batch, clock: Clock) -> f64 {
        self.steps += usize::from(clock.micro == 0);
        match self.fault {
            Fault::NeverNeutral => self.strength + 1.,
            Fault::Idle => 1.,
            _ if self.strength == 1. => 1.,
            Fault::WrongSign => -self.strength,
            Fault::Forgets => self.strength * (1. + self.steps as f64),
            Fault::SeesLength => self.strength * batch.tokens.lengths.iter().copied().max().unwrap_or(0) as f64,
            _ => self.strength,
        }
    }
}

impl AlignmentDefense for Faulty {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> titer_core::Result<Update> {
        let neutral = self.strength == 1.;
        let factor = self.factor(batch, cx.clock());
        let pass = cx.backward(batch, Sites::none())?;
        match self.fault {
            Fault::Meddles if !neutral => cx.weights().set(&cx.weights().snapshot()?.scale(1.001)?)?,
            Fault::LeavesMoved => {
                let before = cx.weights().snapshot()?;
                cx.weights().set(&before.scale(1.001)?)?;
                cx.backward(batch, Sites::none())?;
                cx.weights().set(&before)?;
            }
            Fault::Hides => drop(cx.backward(batch, Sites::none())),
            Fault::MorePasses => drop(cx.backward(batch, Sites::none())?),
            Fault::Undeclared => drop(cx.next("harmful")?),
            Fault::OtherSites => {
                let site = cx.model().sites().swap_remove(0);
                cx.backward(batch, Sites::none().observe([site]))?;
            }
            Fault::LastMicro if !neutral && !cx.clock().last_micro() => {
                return Ok(Update::new(Grads::default(), pass.loss));
            }
            Fault::Observes => {
                cx.hidden(&batch.tokens, Sites::none().observe(["embed"]))?;
            }
            Fault::Unweighed if !neutral => {
                let safe = cx.next("safe")?;
                return Ok(cx.backward(&safe, Sites::none())?.into());
            }
            Fault::NeedsRows if batch.tokens.lengths.len() < 2 && !neutral => {
                return Err(titer_core::Error::run("a batch needs two rows"));
            }
            _ => {}
        }
        Ok(Update::new(pass.grads.scale(factor)?, pass.loss.affine(factor.abs(), 0.)?))
    }

    fn state(&self) -> titer_core::State {
        let steps = if self.fault == Fault::Forgets { 0 } else { self.steps };
        titer_core::State { value: json!(steps), ..titer_core::State::default() }
    }

    fn load_state(&mut self, state: titer_core::State) -> titer_core::Result<()> {
        self.steps = state.value.as_u64().unwrap_or_default() as usize;
        Ok(())
    }
}

/// The entry of a defense with one fault.
macro_rules! faulty {
    ($fault:ident) => {
        DefenseEntry {
            name: stringify!($fault),
            summary: "",
            paper: "",
            formula: "",
            stages: &[Stage::Align],
            streams: |_| &["safe"],
            sites: match Fault::$fault {
                Fault::Observes => &["embed"],
                _ => &[],
            },
            passes: |settings| match Fault::$fault {
                Fault::LeavesMoved | Fault::Hides | Fault::OtherSites | Fault::Observes => 2.,
                Fault::Unweighed if settings["strength"] != 1. => 2.,
                _ => 1.,
            },
            privilege: Privilege::NONE,
            notes: "",
            quirks: &[],
            conflicts: no_conflict,
            limits: |settings| match Fault::$fault {
                Fault::Overcautious => Limits { checkpointing: Some("caution"), accumulation: Some("caution") },
                _ => no_limits(settings),
            },
            settings: SettingsType::of::<Faulty>(),
            neutral: Some(|| json!({ "strength": 1.0 })),
            version: 1,
            build: |settings| Ok(Box::new(Faulty { fault: Fault::$fault, ..settings.parse()? })),
        }
    };
}

/// Each fault is found by the checks that are meant for it, and by no other.
#[test]
fn each_fault_is_found_by_its_own_check() -> Result<()> {
    let world = Fixture::small(registry::find("llama")?)?;
    let cases: [(DefenseEntry, &[&str]); 17] = [
        (faulty!(None), &[]),
        (faulty!(Idle), &["active"]),
        (faulty!(Meddles), &["untouched", "accumulation"]),
        (faulty!(LeavesMoved), &["failure"]),
        (faulty!(Hides), &["failure"]),
        (faulty!(Undeclared), &["runs"]),
        (faulty!(OtherSites), &["sites", "checkpointing"]),
        (faulty!(LastMicro), &["accumulation"]),
        (faulty!(Forgets), &["resume"]),
        (faulty!(WrongSign), &["gradient"]),
        (faulty!(MorePasses), &["passes"]),
        (faulty!(NeverNeutral), &["neutral"]),
        (faulty!(SeesLength), &["accumulation"]),
        (faulty!(NeedsRows), &["one row"]),
        (faulty!(Unweighed), &["accumulation"]),
        (faulty!(Observes), &["checkpointing"]),
        (faulty!(Overcautious), &["accumulation", "checkpointing"]),
    ];
    for (entry, expected) in &cases {
        let checks = check_defense(entry, &world);
        let found: Vec<&str> = checks.iter().filter(|check| check.outcome.failed()).map(|check| check.name).collect();
        assert_eq!(found, *expected, "{}:\n{}", entry.name, table(entry.name, &checks).join("\n"));
    }
    Ok(())
}
