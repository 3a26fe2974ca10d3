//! The command `titer`.

use std::process::ExitCode;

/// Tensors of a few megabytes come and go with every operator. The system's allocator gives each back to the kernel and
/// faults its pages in again, which costs a training step a fifth of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    titer::cli::main()
}
