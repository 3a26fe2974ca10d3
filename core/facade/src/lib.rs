//! What a plugin knows as `titer_core`: the core itself or, with the feature `dynamic`, the core in a shared library.
//!
//! A plugin's source says `titer_core::…` in either case. Linked into a program, it depends on the core like on any
//! crate. As a shared library it is compiled against this crate under the name `titer_core`: rustc then finds the core
//! in `libtiter_dylib.so`, the very file that the runner uses, instead of putting a second core into the plugin. A
//! second core would be a disaster in silence: it counts its own tensors, so that ids collide and gradients go to the
//! wrong weights, registers where nobody looks, and takes the process down when it panics.
//!
//! `titer plugin build` asks cargo for the files that the runner was linked from: cargo finds all of them up to date and
//! names this crate's and those of the core's dependencies. They are handed to rustc one by one (`--extern
//! titer_core=…`, `--extern serde=…`), and the folder they lie in for whatever they refer to in turn. Nothing is
//! compiled twice, and a plugin takes seconds. Copies made by another cargo, in another workspace, would not do: the
//! names of their symbols differ.

pub use titer_core::*;

#[cfg(feature = "dynamic")]
use titer_dylib as _;
