//! A map of small states under many locks, so that two keys seldom meet at one.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hash},
};

use parking_lot::{Mutex, MutexGuard};

const SHARDS: usize = 64;

/// Which shard a key falls into is decided with a random seed: nobody can choose keys that all
/// meet.
#[derive(Debug)]
pub(crate) struct Shards<K, V> {
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
    /// Locks the shard that `key` is in.
    pub(crate) fn lock(&self, key: &K) -> MutexGuard<'_, HashMap<K, V>> {
        let hash = self.hasher.hash_one(key);
        let index = usize::try_from(hash % SHARDS as u64).expect("less than the number of shards");
        self.shards[index].lock()
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

/// Gives memory back once most of what a map had room for is gone.
pub(crate) fn shrink<K: Eq + Hash, V>(map: &mut HashMap<K, V>) {
    const SMALL: usize = 64;
    if map.capacity() > SMALL && map.len() < map.capacity() / 4 {
        map.shrink_to(map.len() * 2);
    }
}
