//! Titer with this plugin linked in.

use my_plugin as _; // without this line the plugin would not be linked

fn main() -> std::process::ExitCode {
    titer::cli::main()
}
