//! cuRAND, as far as a program that draws no numbers on the device needs it: generators come and go.

use std::ffi::c_int;

use crate::device::device;
use crate::report::count;

fn called(name: &str) -> c_int {
    count(&mut device().counts.calls, name);
    0
}

/// Makes a generator.
///
/// # Safety
///
/// `generator` can be written.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "the library's name")]
pub unsafe extern "C" fn curandCreateGenerator(generator: *mut u64, _kind: c_int) -> c_int {
    let handle = device().handle();
    // SAFETY: promised by the caller.
    unsafe { *generator = handle };
    called("curandCreateGenerator")
}

/// Its version.
///
/// # Safety
///
/// `version` can be written.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "the library's name")]
pub unsafe extern "C" fn curandGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: promised by the caller.
    unsafe { *version = 10400 };
    called("curandGetVersion")
}

macro_rules! functions {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $ty:ty),*);)*) => { $(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the library's name")]
        pub extern "C" fn $name($($argument: $ty),*) -> c_int {
            called(stringify!($name))
        }
    )* };
}

functions! {
    /// Ends a generator.
    fn curandDestroyGenerator(_generator: u64);
    /// Its seed.
    fn curandSetPseudoRandomGeneratorSeed(_generator: u64, _seed: u64);
    /// Its stream.
    fn curandSetStream(_generator: u64, _stream: u64);
    /// Where in its sequence it is.
    fn curandSetGeneratorOffset(_generator: u64, _offset: u64);
}
