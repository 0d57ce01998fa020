//! The conformance suite, on the embedded store.

qpq_ports::conformance!(crate::backend::Embedded);
