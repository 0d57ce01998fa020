//! Groups (400, 410 to 415): the members, the metadata and the epoch of a channel. The store checks
//! the rights of the caller.

mod add_members;
mod create_channel;
mod fetch_group_info;
mod list_group_members;
mod remove_member;
mod rotate_keys;
mod update_group_metadata;
