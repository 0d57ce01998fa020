//! The rules of every backend, on each kind of Redis, and with encrypted connections.

use crate::backend::Clusters;

qpq_ports::conformance!(together: Clusters::start());

/// Three primaries: the keys of a script must be on one of them, and each of them must load each
/// script.
mod on_a_redis_cluster {
    use qpq_test_services::RedisCluster;

    use crate::backend::{Clusters, Servers};

    qpq_ports::conformance!(
        together: async { Clusters::on(Servers::with(RedisCluster::start(3)).await) }
    );
}

mod behind_a_sentinel {
    use qpq_test_services::RedisSentinel;

    use crate::backend::{Clusters, Servers};

    qpq_ports::conformance!(
        together: async { Clusters::on(Servers::with(RedisSentinel::start()).await) }
    );
}

mod with_tls {
    use crate::backend::{Clusters, Servers};

    qpq_ports::conformance!(together: async { Clusters::on(Servers::start_encrypted().await) });
}
