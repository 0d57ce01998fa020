//! qpq-admin
fn main() {}
