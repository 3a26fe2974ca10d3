//! Defenses, models, tasks and judges that ship with Titer: one file each, registered by name.

pub mod defenses;
pub mod judges;
pub mod models;
pub mod tasks;
pub mod world;
