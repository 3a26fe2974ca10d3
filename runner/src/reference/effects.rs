//! What each key of the configuration changes: the keys of which stages, and which part of a row's identity.
//!
//! `tests/tests/identity.rs` changes every key and asserts what this table says (law 10).

/// The first stage whose key changes. Those of all stages after it change as well, those before it do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// The base model.
    Base,
    /// Alignment.
    Align,
    /// Fine-tuning.
    FineTune,
    /// The post stage.
    Post,
    /// The stages whose defense draws from the stream.
    Drawing,
    /// Answers to one probe, and the verdicts on them.
    Answers(&'static str),
    /// Verdicts on harmful and benign answers.
    Verdicts,
    /// No stage, for the reason given.
    Nothing(&'static str),
}

/// The part of a row's identity that changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// How it is measured.
    Protocol,
    /// What is attacked, and how.
    Setting,
    /// The place in the table.
    Coordinates,
    /// Both: the template is what the model is trained with and asked with.
    ProtocolAndSetting,
    /// None.
    None,
}

use Part::{Coordinates, Protocol, ProtocolAndSetting, Setting};
use Reach::{Align, Answers, Base, Drawing, FineTune, Nothing, Post, Verdicts};

/// Why a key that is only shown changes no stage.
const SHOWN: &str = "only how results are shown or where they are put";
/// Why a key that trades time or memory changes no stage.
const SAME_BITS: &str = "results do not depend on it: asserted by the tests of checkpoints, batches and devices";

/// Every key but those of `train` tables, without indices and names of streams. `*` stands for the settings of a plugin.
const KEYS: &[(&str, Reach, Part)] = &[
    ("experiment", Nothing(SHOWN), Part::None),
    ("seeds", Align, Coordinates),
    ("device", Nothing("what it changes is the arithmetic, which is part of every key"), Part::None),
    ("arithmetic", Base, Setting),
    ("dtype", Base, Setting),
    ("plugins.paths", Nothing("the hash of a plugin's code is part of each key it enters"), Part::None),
    ("plugins.paths.path", Nothing("the hash of a plugin's code is part of each key it enters"), Part::None),
    ("plugins.paths.blake3", Nothing("the hash of a plugin's code is part of each key it enters"), Part::None),
    ("checkpoint_seconds", Nothing(SAME_BITS), Part::None),
    ("lora.r", Align, Setting),
    ("lora.alpha", Align, Setting),
    ("lora.dropout", Align, Setting),
    ("lora.target_modules", Align, Setting),
    ("base.model", Base, Setting),
    // By the content of the folder.
    ("base.path", Base, Setting),
    ("base.revision", Base, Setting),
    ("base.seeds", Base, Coordinates),
    ("base.shape.*", Base, Setting),
    ("base.pretrain.max_length", Base, Setting),
    ("base.pretrain.data.task", Base, Setting),
    ("base.pretrain.data.rows", Base, Setting),
    ("base.pretrain.data.*", Base, Setting),
    ("encoding.system", Align, ProtocolAndSetting),
    ("encoding.template", Align, ProtocolAndSetting),
    ("encoding.max_length", Align, Setting),
    ("align.data.task", Align, Setting),
    ("align.data.rows", Align, Setting),
    ("align.data.*", Align, Setting),
    ("align.adapter", Align, Setting),
    ("fine_tune.tasks.name", Nothing(SHOWN), Coordinates),
    ("fine_tune.tasks.task", FineTune, ProtocolAndSetting),
    ("fine_tune.tasks.max_new_tokens", Answers("task"), Protocol),
    ("fine_tune.tasks.*", FineTune, ProtocolAndSetting),
    ("fine_tune.samples", FineTune, Coordinates),
    ("fine_tune.harmful.task", FineTune, Setting),
    ("fine_tune.harmful.rows", Nothing("only bounds how many rows may be drawn"), Part::None),
    ("fine_tune.harmful.*", FineTune, Setting),
    ("fine_tune.harmful_ratios", FineTune, Coordinates),
    ("fine_tune.learning_rates", FineTune, Coordinates),
    ("fine_tune.mode", FineTune, Setting),
    ("fine_tune.lora.r", FineTune, Setting),
    ("fine_tune.lora.alpha", FineTune, Setting),
    ("fine_tune.lora.dropout", FineTune, Setting),
    ("fine_tune.lora.target_modules", FineTune, Setting),
    ("fine_tune.monitor.task", FineTune, Part::None),
    ("fine_tune.monitor.rows", FineTune, Part::None),
    ("fine_tune.monitor.*", FineTune, Part::None),
    ("streams.batch_size", Drawing, Coordinates),
    ("streams.task", Drawing, Coordinates),
    ("streams.rows", Drawing, Coordinates),
    ("streams.*", Drawing, Coordinates),
    ("evaluate.harmful.task", Answers("harmful"), Protocol),
    ("evaluate.harmful.rows", Answers("harmful"), Protocol),
    ("evaluate.harmful.*", Answers("harmful"), Protocol),
    ("evaluate.benign.task", Answers("benign"), Protocol),
    ("evaluate.benign.rows", Answers("benign"), Protocol),
    ("evaluate.benign.*", Answers("benign"), Protocol),
    ("evaluate.task_prompts", Answers("task"), Protocol),
    ("evaluate.max_new_tokens", Answers("judged"), Protocol),
    ("evaluate.judges", Verdicts, Protocol),
    ("evaluate.judges.judge", Verdicts, Protocol),
    ("evaluate.judges.*", Verdicts, Protocol),
    ("evaluate.batch_size", Nothing(SAME_BITS), Part::None),
    ("methods.name", Nothing(SHOWN), Coordinates),
    ("methods.align", Align, Coordinates),
    ("methods.align.defense", Align, Coordinates),
    ("methods.align.*", Align, Coordinates),
    ("methods.align_steps", Align, Coordinates),
    ("methods.fine_tune", FineTune, Coordinates),
    ("methods.fine_tune.defense", FineTune, Coordinates),
    ("methods.fine_tune.*", FineTune, Coordinates),
    ("methods.post", Post, Coordinates),
    ("methods.post.defense", Post, Coordinates),
    ("methods.post.*", Post, Coordinates),
];

/// The tables that say how a stage trains, and the stage.
const TRAIN: [(&str, Reach); 3] = [("base.pretrain", Base), ("align", Align), ("fine_tune", FineTune)];

/// What the key changes; `None` for a key that is not known, a table, or a published value.
pub fn of(key: &str) -> Option<(Reach, Part)> {
    let key = key.replace("streams.NAME", "streams");
    if let Some(&(_, reach, part)) = KEYS.iter().find(|(known, ..)| *known == key) {
        return Some((reach, part));
    }
    let (stage, setting) = key.split_once(".train.")?;
    let (_, reach) = TRAIN.into_iter().find(|(known, _)| *known == stage)?;
    Some(match setting {
        "checkpointing" => (Nothing(SAME_BITS), Part::None),
        "learning_rate" if stage == "fine_tune" => (reach, Coordinates),
        _ => (reach, Setting),
    })
}

impl Reach {
    /// In words, after "the key of".
    pub fn words(self) -> String {
        match self {
            Base => "the base and every stage after it".to_owned(),
            Align => "alignment and every stage after it".to_owned(),
            FineTune => "fine-tuning and every stage after it".to_owned(),
            Post => "the post stage and every stage after it".to_owned(),
            Drawing => "the stages whose defense draws from the stream, and every stage after them".to_owned(),
            Answers("judged") => "the answers to harmful and benign prompts, and their verdicts".to_owned(),
            Answers(probe) => format!("the answers to {probe} prompts, and their verdicts"),
            Verdicts => "the verdicts".to_owned(),
            Nothing(why) => format!("no stage ({why})"),
        }
    }
}

impl Part {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Protocol => "protocol",
            Setting => "setting",
            Coordinates => "coordinates",
            ProtocolAndSetting => "protocol and setting",
            Part::None => "nothing",
        }
    }
}
