//! A map under many locks, so that calls with different keys seldom wait for one another.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hash},
};

use parking_lot::{Mutex, MutexGuard};

pub(super) const SHARDS: usize = 64;

/// A map in [`SHARDS`] parts, each under its own lock.
///
/// A random seed assigns keys to shards, so no client can choose keys that are all in one shard.
#[derive(Debug)]
pub(super) struct Shards<K, V> {
    hasher: RandomState,
    shards: Box<[Mutex<HashMap<K, V>>]>,
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self {
            hasher: RandomState::new(),
            shards: std::iter::repeat_with(|| Mutex::new(HashMap::new())).take(SHARDS).collect(),
        }
    }
}

impl<K: Eq + Hash, V> Shards<K, V> {
    /// Locks the shard of `key`.
    pub(super) fn lock(&self, key: &K) -> MutexGuard<'_, HashMap<K, V>> {
        let hash = self.hasher.hash_one(key);
        let index = usize::try_from(hash % SHARDS as u64).expect("less than the number of shards");
        self.shards[index].lock()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

/// Frees memory of a map that has become mostly empty.
pub(super) fn shrink<K: Eq + Hash, V>(map: &mut HashMap<K, V>) {
    const SMALL: usize = 64;
    if map.capacity() > SMALL && map.len() < map.capacity() / 4 {
        map.shrink_to(map.len() * 2);
    }
}
