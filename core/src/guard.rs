//! Panics of libraries that parse what the user gives.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether this thread runs code whose panics become errors.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `parse`, which may panic, and gives the text of its panic as an error. Nothing of it is printed.
///
/// # Errors
/// `parse` panicked.
pub fn guarded<T>(parse: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                before(panic);
            }
        }));
    });
    GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(parse));
    GUARDED.set(false);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("the library gave no reason").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_and_the_thread_goes_on() {
        let fails: fn() -> usize = || panic!("at byte {}", 7);
        assert_eq!(guarded(fails), Err("at byte 7".to_owned()));
        assert_eq!(guarded(|| 3), Ok(3));
        assert!(!GUARDED.get());
    }
}
