//! Enums whose values have names in the configuration.
//!
//! The trait is in this crate, so that each enum can implement it in the crate that uses the enum.
//! The crate that reads the configuration does not depend on these crates.

/// An enum whose values have names in the configuration.
pub trait Choice: Sized + Copy + PartialEq + 'static {
    /// All values with their names.
    const ALL: &'static [(&'static str, Self)];
}
