//! Titer with the stranger linked in.

use stranger as _;

fn main() -> std::process::ExitCode {
    titer::cli::main()
}
