//! The rules that every backend keeps.

qpq_ports::conformance!(together: crate::backend::Clusters::start());
