//! The plans of statements. Postgres plans a statement once on a connection, perhaps while the
//! tables are empty. Such a plan must use indexes all the same.

use qpq_ports::conformance::{
    accounts, devices, enqueue, groups, idempotency, keys, leases, maintenance, readers, reading,
    sessions,
};

use crate::backend::{Clusters, Servers};

/// Tables with one row, or few, which are read whole.
const SMALL: &str = "'_sqlx_migrations', 'cluster', 'heartbeat', 'store'";

/// Returns the tables of the databases of all clusters that a statement has scanned, and the
/// numbers of the scans.
async fn scanned(servers: &Servers) -> Vec<String> {
    let databases = servers
        .postgres
        .sql("SELECT datname FROM pg_database WHERE datname LIKE 'cluster%' ORDER BY datname")
        .await
        .expect("Postgres");
    let mut scanned = Vec::new();
    for database in databases.split_whitespace() {
        let scans = format!(
            "SELECT '{database}.' || relname || ' ' || seq_scan FROM pg_stat_user_tables
              WHERE seq_scan > 0 AND relname NOT IN ({SMALL})"
        );
        let scans = servers.postgres.sql_in(database, &scans).await.expect("Postgres");
        scanned.extend(scans.lines().map(str::to_owned).filter(|line| !line.is_empty()));
    }
    scanned
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_use_indexes_in_an_empty_database() {
    let clusters = Clusters::start().await;
    accounts::a_registration_is_found_by_name_and_by_key(&clusters).await;
    sessions::a_session_is_found_until_it_is_revoked(&clusters).await;
    enqueue::seqs_are_contiguous_under_concurrency(&clusters).await;
    enqueue::messages_that_share_a_payload_are_stored_like_any_other(&clusters).await;
    reading::a_view_sees_one_channel_or_all(&clusters).await;
    reading::an_ack_removes_up_to_a_seq_of_its_view(&clusters).await;
    leases::concurrent_readers_get_each_message_once_and_in_order(&clusters).await;
    idempotency::an_id_is_remembered_after_a_completion(&clusters).await;
    readers::acks_out_of_order_are_remembered_for_each_device(&clusters).await;
    devices::a_device_is_listed_as_it_was_registered(&clusters).await;
    keys::packages_are_taken_oldest_first_and_once(&clusters).await;
    keys::hybrid_keys_are_returned_in_the_requested_order(&clusters).await;
    groups::members_are_added_once_and_all_or_none(&clusters).await;
    maintenance::a_sweep_removes_what_has_expired_and_nothing_else(&clusters).await;
    let scanned = scanned(clusters.servers()).await;
    assert!(scanned.is_empty(), "{scanned:?}");
}
