//! The rules that every backend must follow, as tests: one function for each rule, with a backend
//! of its own.
//!
//! The tests of a backend pass a [`Factory`] to `conformance!`, which creates a test for each rule:
//! ```ignore
//! mod conformance {
//!     qpq_ports::conformance!(crate::backend::Postgres::from_env());
//! }
//! ```
//! A backend with an expensive factory, for example one that starts servers, has one test for each
//! area. The rules of an area share the factory:
//! ```ignore
//! qpq_ports::conformance!(together: crate::backend::Cluster::start());
//! ```
//! A rule about a race repeats the race many times. No rule waits for time to pass.

mod bench;

pub mod accounts;
pub mod bans;
pub mod blobs;
pub mod blocks;
pub mod clocks;
pub mod deletion;
pub mod devices;
pub mod endpoints;
pub mod enqueue;
pub mod groups;
pub mod history;
pub mod idempotency;
pub mod invites;
pub mod jobs;
pub mod keys;
pub mod leases;
pub mod limits;
pub mod maintenance;
pub mod readers;
pub mod reading;
pub mod recovery;
pub mod reports;
pub mod sender_share;
pub mod sessions;
pub mod wakes;

use async_trait::async_trait;
use qpq_domain::{StoreLimits, UnixMillis};

use crate::Stores;

/// Creates backends.
#[async_trait]
pub trait Factory: Send + Sync {
    /// Creates an empty backend with these limits, for one test only.
    async fn fresh(&self, limits: StoreLimits) -> Box<dyn Backend>;
}

/// A backend under test.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Returns the ports of the backend.
    fn stores(&self) -> Stores;

    /// Discards everything that is not durable, as killing the process does, and starts again.
    async fn crash(&mut self);

    /// Sets the clock that the backend compares with the instants of its callers.
    async fn set_clock(&self, now: UnixMillis);
}

/// Creates a `#[tokio::test]` for each rule for the backends of `$factory`, an expression that
/// evaluates to a [`Factory`].
#[macro_export]
macro_rules! conformance {
    (together: $factory:expr) => {
        $crate::conformance!(@areas [together] $factory);
    };
    (@areas [$($how:ident)?] $factory:expr) => {
        $crate::conformance_area!(
            [$($how)?] $factory,
            accounts,
            [
                a_registration_is_found_by_name_and_by_key,
                a_registration_never_overwrites,
                a_repeated_registration_is_recognised,
                of_concurrent_registrations_one_wins,
                a_lookalike_of_a_taken_username_is_taken,
                of_concurrent_lookalikes_one_wins,
                accounts_survive_a_crash,
                a_change_of_the_password_replaces_the_record_and_ends_the_other_sessions,
                an_ended_session_and_another_accounts_session_change_no_password,
                of_concurrent_changes_of_a_password_one_wins,
                a_session_created_during_a_change_ends_or_its_login_sees_the_new_record,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            invites,
            [
                invites_are_listed_as_they_were_created_until_they_are_revoked,
                an_invite_allows_as_many_registrations_as_it_has_uses,
                a_refused_or_repeated_registration_uses_nothing,
                an_invalid_invite_reveals_no_username,
                a_named_invite_allows_its_username_alone,
                concurrent_registrations_use_an_invite_exactly_as_often_as_it_allows,
                an_invite_is_removed_some_time_after_it_has_expired,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            sessions,
            [
                a_session_is_found_until_it_is_revoked,
                a_touch_moves_the_expiry,
                revoking_all_spares_other_accounts,
                a_revoked_session_never_comes_back,
                sessions_survive_a_crash,
                a_new_history_ends_all_sessions_or_keeps_them,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            enqueue,
            [
                seqs_are_contiguous_under_concurrency,
                order_is_kept_within_a_call,
                an_unknown_recipient_is_reported,
                each_message_of_a_batch_has_its_own_outcome,
                messages_that_share_a_payload_are_stored_like_any_other,
                a_refusal_in_the_middle_leaves_no_gap,
                an_inbox_is_full_by_count_and_drops_nothing,
                an_inbox_is_full_by_bytes_and_drops_nothing,
                expired_messages_make_room,
                large_batches_of_one_sender_do_not_block_others,
                a_caller_that_goes_away_disturbs_no_other,
                accepted_messages_survive_a_crash,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            sender_share,
            [
                beyond_the_half_a_sender_holds_no_more_than_its_share_of_messages,
                beyond_the_half_a_sender_holds_no_more_than_its_share_of_bytes,
                one_call_is_held_to_the_share_as_many_are,
                a_share_is_exact_under_concurrency,
                a_repeat_is_answered_whatever_the_sender_holds,
                expired_messages_count_in_no_share,
                removed_messages_return_their_share,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            idempotency,
            [
                a_repeat_of_a_queued_message_gets_its_receipt,
                a_repeat_within_one_call_is_a_duplicate_too,
                of_concurrent_repeats_one_is_accepted,
                an_id_counts_for_one_sender_and_recipient,
                an_id_is_remembered_after_an_ack,
                an_id_is_remembered_after_a_completion,
                an_id_that_expires_under_a_lease_is_remembered_after_expiry,
                an_id_is_remembered_after_expiry,
                a_forgotten_id_may_be_used_again,
                ids_survive_a_crash,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            reading,
            [
                a_view_sees_one_channel_or_all,
                an_expired_message_is_never_shown,
                a_page_ends_at_its_limits,
                the_first_message_is_returned_regardless_of_its_size,
                a_peek_leaves_everything,
                a_peek_continues_after_a_seq,
                an_ack_removes_up_to_a_seq_of_its_view,
                an_ack_removes_single_seqs_of_its_view,
                an_ack_of_nothing_removes_nothing,
                a_missing_inbox_is_empty,
                without_registered_devices_a_named_device_is_the_single_reader,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            leases,
            [
                a_lease_hides_until_it_is_released,
                a_completed_lease_is_removed_permanently,
                a_completion_removes_only_the_messages_of_its_page,
                a_view_stops_before_a_leased_message,
                a_peek_stops_before_a_leased_message,
                an_ack_removes_leased_messages,
                a_crash_releases_leases,
                concurrent_readers_get_each_message_once_and_in_order,
                acked_messages_are_not_returned_by_later_reads,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            wakes,
            [
                every_change_that_shows_more_wakes,
                a_message_wakes_the_readers_of_its_channel,
                a_wait_that_is_dropped_loses_nothing,
                no_wake_is_lost_in_a_race_with_enqueue,
                no_wake_is_lost_in_a_race_with_release,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            keys,
            [
                packages_are_taken_oldest_first_and_once,
                concurrent_takes_never_share_a_package,
                the_last_resort_stays_and_is_replaced_by_a_newer_one,
                a_package_that_is_there_may_be_uploaded_again,
                stored_packages_are_known_to_their_owner,
                a_taken_package_cannot_be_uploaded_again,
                an_upload_is_stored_whole_or_not_at_all,
                an_owner_has_no_more_than_the_cap,
                an_expired_package_is_not_taken,
                a_package_that_has_not_begun_is_neither_counted_nor_taken,
                a_replacement_removes_what_is_stored,
                a_replacement_that_is_refused_removes_nothing,
                a_replacement_makes_room_for_itself,
                a_replaced_stock_never_runs_dry,
                owners_do_not_share_anything,
                taken_packages_stay_taken_after_a_crash,
                hybrid_keys_are_returned_in_the_requested_order,
                each_device_has_packages_of_its_own,
                one_call_takes_a_package_of_each_device,
                concurrent_takes_of_devices_never_share_a_package,
                a_replacement_removes_only_the_packages_of_its_device,
                a_device_without_a_key_has_the_packages_of_the_account,
                a_revocation_removes_only_the_packages_of_its_device,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            devices,
            [
                a_device_is_listed_as_it_was_registered,
                a_repeat_changes_nothing_but_the_name,
                another_key_of_a_registered_device_is_refused,
                a_key_belongs_to_one_device_permanently,
                an_identity_key_is_refused_as_a_device_key,
                of_concurrent_registrations_as_many_as_fit_succeed,
                a_registration_binds_a_session_without_a_device,
                a_refused_registration_binds_no_session,
                a_revocation_ends_only_the_sessions_of_its_device,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            endpoints,
            [
                an_endpoint_is_resolved_until_it_expires,
                an_endpoint_replaces_the_previous_one_of_its_owner_alone,
                a_removed_endpoint_is_not_resolved,
                an_endpoint_is_published_again_after_a_crash,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            readers,
            [
                the_first_device_inherits_and_a_later_one_starts_at_the_end,
                only_registered_devices_read_an_inbox_with_devices,
                leases_and_acks_of_one_device_do_not_affect_another,
                one_channel_of_a_device_is_read_like_that_of_the_single_reader,
                a_message_counts_once_until_its_last_device_removes_it,
                acks_out_of_order_are_remembered_for_each_device,
                an_ack_of_what_does_not_wait_for_its_device_changes_nothing,
                a_page_of_the_single_reader_is_void_after_a_registration,
                a_page_of_a_revoked_registration_completes_nothing,
                messages_of_the_last_revoked_device_stay,
                an_expired_message_holds_up_no_device,
                an_id_is_known_while_a_device_waits_and_for_a_while_after,
                a_message_wakes_every_device,
                a_device_registered_during_sends_misses_nothing_afterwards,
                two_devices_that_ack_the_same_messages_concurrently_remove_them_once,
                a_revocation_of_the_last_device_during_sends_loses_nothing,
                concurrent_devices_get_each_message_once_and_in_order,
                an_absent_device_that_holds_back_half_of_the_inbox_loses_its_position,
                a_device_keeps_its_position_while_it_reads_or_holds_back_little,
                a_clock_that_is_ahead_moves_no_device,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            groups,
            [
                a_group_is_as_it_was_created,
                a_repeated_creation_returns_the_group,
                a_creation_with_an_unknown_member_creates_nothing,
                a_direct_group_has_one_id_whichever_member_creates_it,
                a_direct_group_gets_back_the_member_who_left,
                only_admins_change_a_group_and_only_members_see_it,
                there_is_no_group_without_its_creation,
                members_are_added_once_and_all_or_none,
                listed_members_become_admins_and_stay_admins,
                a_refused_addition_promotes_no_member,
                the_oldest_member_follows_the_last_admin,
                a_group_is_removed_with_its_last_member,
                metadata_changes_field_by_field_with_a_version,
                of_concurrent_changes_with_one_version_one_wins,
                a_list_of_members_is_read_page_by_page,
                a_message_to_a_group_is_in_its_channel_of_every_other_member,
                the_senders_other_devices_get_its_message,
                full_inboxes_are_skipped_and_counted,
                a_repeated_message_to_a_group_is_stored_once,
                a_commit_raises_the_epoch_and_replaces_the_group_info,
                a_commit_for_another_epoch_stores_nothing,
                of_concurrent_commits_for_one_epoch_one_wins,
                a_repeat_of_a_commit_that_won_has_its_result,
                no_message_of_an_epoch_precedes_its_commit,
                a_payload_of_any_size_reaches_all_members_unchanged,
                a_group_has_no_more_than_the_maximum_of_members,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            deletion,
            [
                a_deleted_account_is_found_by_no_call,
                the_deletion_stores_the_job_that_erases,
                the_key_of_a_deleted_account_stays_taken,
                the_name_of_a_deleted_account_is_reserved_for_a_while,
                messages_of_a_deleted_account_stay_in_other_inboxes,
                groups_go_on_without_a_deleted_member,
                an_erasure_continues_after_a_crash,
                writes_of_calls_in_progress_are_erased_too,
                a_deletion_during_sends_leaves_no_message_and_no_gap,
                a_registration_during_a_deletion_never_takes_its_key,
                a_message_to_a_group_during_a_deletion_reaches_the_others,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            bans,
            [
                a_ban_of_the_server_ends_all_sessions_and_refuses_new_ones,
                a_ban_with_an_end_ends_by_itself,
                a_later_ban_replaces_the_reason_and_the_end,
                an_unban_ends_a_ban,
                unknown_accounts_and_the_own_account_are_not_banned,
                of_a_ban_and_concurrent_logins_no_session_remains,
                a_ban_of_a_group_removes_the_member_and_refuses_its_messages,
                a_banned_account_is_not_added_to_the_group,
                a_direct_group_does_not_get_back_a_banned_member,
                only_admins_of_a_group_ban_from_it,
                a_group_that_is_removed_takes_its_bans_along,
                of_a_ban_and_concurrent_additions_the_ban_wins,
                a_ban_during_sends_lets_no_later_message_through,
                every_ban_and_unban_is_in_the_audit_trail,
                a_clock_that_is_ahead_ends_no_ban,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            blocks,
            [
                a_message_of_a_blocked_sender_is_refused_and_stores_nothing,
                a_block_is_listed_until_it_ends,
                unknown_accounts_and_the_own_account_are_not_blocked,
                a_repeat_of_an_accepted_message_is_answered_after_a_block,
                messages_of_others_in_the_same_call_are_accepted,
                a_message_to_a_group_skips_and_counts_a_blocking_member,
                a_block_during_sends_lets_no_later_message_through,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            reports,
            [
                reports_are_read_newest_first_and_page_by_page,
                a_page_of_reports_ends_at_its_bytes,
                a_repeated_report_is_stored_once,
                an_account_has_no_more_than_the_maximum_of_reports,
                old_reports_are_swept,
                each_read_of_reports_is_in_the_audit_trail,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            history,
            [
                every_page_has_the_id_and_a_crash_keeps_it,
                another_history_has_another_id_permanently,
                a_lease_of_another_history_removes_nothing,
                an_ack_that_names_another_history_removes_nothing,
                another_history_has_no_earlier_one_time_packages,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            limits,
            [
                a_bucket_is_full_when_first_seen,
                a_remembered_key_is_known_under_its_own_name,
                tokens_return_with_time,
                a_refusal_costs_nothing_and_names_the_wait,
                a_cost_above_the_burst_leaves_a_debt,
                buckets_are_independent,
                concurrent_takes_spend_no_token_twice,
                a_clock_set_far_back_blocks_no_caller,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            clocks,
            [
                a_clock_that_is_ahead_destroys_nothing,
                a_message_accepted_by_a_clock_that_is_behind_is_delivered,
                an_id_removed_by_a_clock_that_is_behind_is_remembered,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            maintenance,
            [
                a_healthy_backend_passes_its_check,
                a_sweep_removes_what_has_expired_and_nothing_else,
                a_sweep_changes_no_answer,
                an_inbox_full_of_expired_messages_accepts_new_ones,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            recovery,
            [
                a_bundle_is_returned_as_it_was_stored_and_its_version_rises,
                a_bundle_is_stored_only_over_the_version_that_it_replaces,
                of_concurrent_bundles_for_one_version_one_wins,
                a_removed_bundle_is_absent_and_its_version_rises,
                fetches_are_limited_for_a_day_also_after_a_crash_and_a_new_bundle,
                concurrent_fetches_exceed_no_limit,
                a_count_that_begins_far_in_the_future_is_discarded,
                the_keys_of_bundles_are_listed_once_in_order,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            blobs,
            [
                a_blob_is_read_in_parts_after_its_last_chunk,
                an_upload_resumes_at_the_received_bytes_after_a_crash,
                small_chunks_of_any_size_make_a_whole_blob,
                equal_bytes_may_be_repeated_and_other_bytes_are_refused,
                a_gap_stores_nothing,
                another_size_is_refused_and_the_upload_stays,
                a_wrong_hash_removes_the_upload_and_returns_its_quota,
                a_completed_upload_may_be_completed_again,
                known_content_still_takes_its_bytes,
                a_blob_is_readable_until_its_last_reference_is_removed,
                a_mime_type_belongs_to_a_reference,
                uploads_beyond_the_quota_are_refused,
                of_concurrent_uploads_as_many_as_fit_the_quota_succeed,
                open_uploads_are_limited_by_number_and_by_size,
                an_idle_upload_is_removed_and_returns_its_quota,
                a_reference_expires_unless_it_is_renewed,
                an_expired_reference_that_is_uploaded_again_counts_once,
                a_released_account_has_no_blobs_and_no_quota_in_use,
                two_devices_upload_one_blob_together,
                uploads_removals_and_collections_of_the_same_content_lose_no_blob,
            ]
        );
        $crate::conformance_area!(
            [$($how)?] $factory,
            jobs,
            [
                the_longest_due_jobs_of_a_kind_are_claimed_first,
                concurrent_claims_never_share_a_job,
                a_job_is_claimed_again_after_its_lease_has_ended,
                a_renewed_claim_lasts_longer,
                a_failed_job_is_due_at_its_retry_and_counts_its_attempts,
                a_repeated_job_starts_with_no_attempts,
                a_released_job_is_due_immediately_and_its_attempt_does_not_count,
                a_key_is_unique_until_its_job_is_done_or_dead,
                a_put_with_a_present_key_makes_the_job_due_earlier_and_never_later,
                a_job_that_is_put_while_it_runs_runs_once_more,
                concurrent_puts_of_a_key_and_ends_lose_no_run,
                a_dead_job_is_listed_and_never_runs_again,
                a_dead_job_is_retried_or_removed_by_its_number,
                stats_count_each_kind,
                jobs_survive_a_crash,
                a_caller_with_a_wrong_clock_writes_right_waits,
                a_caller_with_a_wrong_clock_takes_no_job_from_its_worker,
                a_store_clock_that_jumps_and_returns_hides_no_job,
                a_job_beyond_the_horizon_of_its_kind_is_due,
            ]
        );
    };
    ($factory:expr) => {
        $crate::conformance!(@areas [] $factory);
    };
}

/// One area of [`conformance!`].
#[doc(hidden)]
#[macro_export]
macro_rules! conformance_area {
    ([together] $factory:expr, $area:ident, [$($rule:ident),* $(,)?]) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $area() {
            let factory = $factory.await;
            $(
                // In the output of a failed test, the last rule is the one that failed.
                eprintln!(concat!("rule ", stringify!($rule)));
                $crate::conformance::$area::$rule(&factory).await;
            )*
        }
    };
    ([] $factory:expr, $area:ident, [$($rule:ident),* $(,)?]) => {
        mod $area {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $rule() {
                    $crate::conformance::$area::$rule(&$factory).await;
                }
            )*
        }
    };
}
