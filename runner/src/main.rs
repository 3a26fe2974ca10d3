//! The command `titer`.

use std::process::ExitCode;

fn main() -> ExitCode {
    titer::cli::main()
}
