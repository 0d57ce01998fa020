//! Postgres, Redis and NATS for tests.
