//! Keys of the configuration that exclude each other.

/// Keys of one table of which exactly one is given. A later layer's replaces those of the layers below it.
#[derive(Debug)]
pub(crate) struct Exclusive {
    /// The last name of the table's key.
    pub(crate) table: &'static str,
    /// The two keys, each with the keys that are of no use without it.
    pub(crate) sides: [&'static [&'static str]; 2],
    /// The start of the message that names the two.
    pub(crate) says: &'static str,
    /// What to do if both or neither are given.
    pub(crate) help: &'static str,
}

/// How long training is.
pub(crate) const LENGTH: Exclusive = Exclusive {
    table: "train",
    sides: [&["steps"], &["epochs"]],
    says: "training takes",
    help: "keep one of them, as in steps = 400",
};

/// Where the base model comes from.
pub(crate) const ORIGIN: Exclusive = Exclusive {
    table: "base",
    sides: [&["path", "revision"], &["pretrain", "shape", "seeds"]],
    says: "a base model comes from",
    help: "set base.path to a checkpoint folder or a model of the hub, or add [base.pretrain]",
};

/// All of them.
pub(crate) const EXCLUSIVE: [Exclusive; 2] = [LENGTH, ORIGIN];
