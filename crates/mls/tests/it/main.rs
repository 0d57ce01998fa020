//! Clients talking to each other in memory, through nothing but the bytes that they would send.

mod conversations;
mod crashes;
mod hostile;
mod order;
mod world;
