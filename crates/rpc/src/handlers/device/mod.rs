//! Devices of the caller's account (700 to 702): each reads the inbox at its own position.

mod list_devices;
mod register_device;
mod revoke_device;
