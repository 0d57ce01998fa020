//! The rules that every backend keeps.

qpq_ports::conformance!(crate::backend::Embedded);
