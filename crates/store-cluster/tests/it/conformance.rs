//! The rules that every backend keeps, on each kind of Redis there is, and with everything
//! encrypted.

use crate::backend::Clusters;

qpq_ports::conformance!(together: Clusters::start());

/// Three primaries: what belongs together must lie together, and a script is new to each of them.
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
