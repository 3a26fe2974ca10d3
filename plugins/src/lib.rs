//! Defenses, models, tasks and judges that ship with Titer: one file each, registered by name.

pub mod defenses;
pub mod files;
pub mod judges;
pub mod models;
pub mod scoring;
pub mod tasks;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod world;
