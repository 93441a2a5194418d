//! Keys and values of prompts' beginnings, for requests that begin in the same way: a hash tree of blocks of [`SLICE`]
//! tokens.
//!
//! A block belongs to an adapter and to all tokens before it, so its key is its tokens and the block that it follows.
//! When there is no room, the block that has not been used for the longest time goes, of those that no other block
//! follows. Only prompts are kept: what is generated goes through the model in another way, which rounds differently.

use super::passes::SLICE;
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::{AttentionShape, Backend};
use crate::model::{KvCache, Model};
use std::collections::HashMap;
use std::sync::{Arc, Weak};

/// What a block follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Parent {
    /// Nothing: it is the first of prompts with the adapter at this address; 0: without one.
    Start(usize),
    /// The block of this number. Numbers are not used again.
    Block(u64),
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    parent: Parent,
    tokens: Vec<u32>,
}

struct Block<B: Backend> {
    key: Key,
    cache: KvCache<B>,
    /// Blocks that follow it.
    children: usize,
    /// When it was used last.
    used: u64,
    /// As long as this is held, no other adapter has the same address.
    adapter: Option<Weak<DeviceAdapter<B>>>,
}

impl<B: Backend> Block<B> {
    /// Whether its adapter is gone, so that no request can use it.
    fn is_dead(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| adapter.strong_count() == 0)
    }
}

/// The blocks.
pub(super) struct Prefixes<B: Backend> {
    model: Model<B>,
    /// The most blocks.
    capacity: usize,
    blocks: HashMap<u64, Block<B>>,
    numbers: HashMap<Key, u64>,
    /// Memory of blocks that have gone.
    spare: Vec<KvCache<B>>,
    next: u64,
    clock: u64,
}

impl<B: Backend> Prefixes<B> {
    /// Room for `tokens` tokens, in whole blocks.
    pub fn new(model: &Model<B>, tokens: usize) -> Self {
        Self {
            model: model.clone(),
            capacity: tokens / SLICE,
            blocks: HashMap::new(),
            numbers: HashMap::new(),
            spare: Vec::new(),
            next: 0,
            clock: 0,
        }
    }

    /// Whether anything is kept.
    pub fn is_enabled(&self) -> bool {
        self.capacity > 0
    }

    /// Copies the block of these tokens behind `parent` into a sequence's cache, if it is there, and returns it.
    pub fn restore(&mut self, parent: Parent, tokens: &[u32], cache: &mut KvCache<B>) -> Result<Option<Parent>> {
        let Some(number) = self.find(parent, tokens) else { return Ok(None) };
        let (at, width) = (cache.len, AttentionShape::of(self.model.config()).kv_width());
        cache.copy_rows(self.model.backend(), at, &self.blocks[&number].cache, 0, [SLICE, width])?;
        cache.len += SLICE;
        Ok(Some(Parent::Block(number)))
    }

    /// Keeps the block of these tokens behind `parent`, whose keys and values begin at row `from` of a sequence's
    /// cache. Returns the block; `None` if there is no room for it, or its parent has gone.
    pub fn insert(
        &mut self,
        parent: Parent,
        tokens: &[u32],
        (cache, from): (&KvCache<B>, usize),
        adapter: Option<&Arc<DeviceAdapter<B>>>,
    ) -> Result<Option<Parent>> {
        if let Some(number) = self.find(parent, tokens) {
            return Ok(Some(Parent::Block(number)));
        }
        let known = |blocks: &HashMap<_, _>| match parent {
            Parent::Start(_) => true,
            Parent::Block(number) => blocks.contains_key(&number),
        };
        if !known(&self.blocks) || !self.make_room(parent) {
            return Ok(None);
        }
        let mut own = match self.spare.pop() {
            Some(spare) => spare,
            None => KvCache::new(&self.model.0, SLICE)?,
        };
        let width = AttentionShape::of(self.model.config()).kv_width();
        own.copy_rows(self.model.backend(), 0, cache, from, [SLICE, width])?;
        let (number, key) = (self.next, Key { parent, tokens: tokens.to_vec() });
        (self.next, self.clock) = (self.next + 1, self.clock + 1);
        if let Parent::Block(parent) = parent
            && let Some(parent) = self.blocks.get_mut(&parent)
        {
            parent.children += 1;
        }
        self.numbers.insert(key.clone(), number);
        let adapter = adapter.map(Arc::downgrade);
        self.blocks.insert(number, Block { key, cache: own, children: 0, used: self.clock, adapter });
        Ok(Some(Parent::Block(number)))
    }

    /// The block of these tokens, which is then the one used last.
    fn find(&mut self, parent: Parent, tokens: &[u32]) -> Option<u64> {
        let number = *self.numbers.get(&Key { parent, tokens: tokens.to_vec() })?;
        self.clock += 1;
        self.blocks.get_mut(&number)?.used = self.clock;
        Some(number)
    }

    /// Makes room for a block behind `parent`; returns whether there is.
    fn make_room(&mut self, parent: Parent) -> bool {
        if self.blocks.len() < self.capacity {
            return true;
        }
        let dead: Vec<u64> =
            self.blocks.iter().filter(|(_, block)| block.is_dead()).map(|(number, _)| *number).collect();
        dead.into_iter().for_each(|number| self.remove(number));
        if self.blocks.len() < self.capacity {
            return true;
        }
        let unused =
            self.blocks.iter().filter(|(number, block)| block.children == 0 && Parent::Block(**number) != parent);
        let oldest = unused.min_by_key(|(_, block)| block.used).map(|(number, _)| *number);
        oldest.inspect(|&number| self.remove(number)).is_some()
    }

    fn remove(&mut self, number: u64) {
        let Some(block) = self.blocks.remove(&number) else { return };
        self.numbers.remove(&block.key);
        if let Parent::Block(parent) = block.key.parent
            && let Some(parent) = self.blocks.get_mut(&parent)
        {
            parent.children -= 1;
        }
        self.spare.push(block.cache);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Adapter;
    use crate::backend::cpu::{Cpu, CpuOptions};
    use crate::checkpoint::Checkpoint;
    use std::path::Path;

    fn tokens(seed: u32) -> Vec<u32> {
        (0..SLICE as u32).map(|i| i * 7 + seed).collect()
    }

    #[test]
    fn the_least_used_leaf_goes_first_and_an_adapters_blocks_with_it() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra");
        let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
        let model = Model::load(Cpu::new(CpuOptions::default()).unwrap(), &checkpoint).unwrap();
        let mut prefixes = Prefixes::new(&model, 3 * SLICE + 5);
        let cache = KvCache::new(&model.0, SLICE).unwrap();
        let insert = |prefixes: &mut Prefixes<_>, parent, seed| {
            prefixes.insert(parent, &tokens(seed), (&cache, 0), None).unwrap()
        };
        let start = Parent::Start(0);
        let a = insert(&mut prefixes, start, 1).unwrap();
        let b = insert(&mut prefixes, a, 2).unwrap();
        let c = insert(&mut prefixes, start, 3).unwrap();
        assert_eq!(insert(&mut prefixes, start, 1), Some(a), "it is there already");
        // `a` has a child, `b` is older than `c`.
        let d = insert(&mut prefixes, c, 4).unwrap();
        assert!(prefixes.find(a, &tokens(2)).is_none() && prefixes.find(start, &tokens(3)).is_some());
        assert_eq!(insert(&mut prefixes, b, 5), None, "its parent has gone");
        // `a` goes, and then there is only the new block's own chain.
        let e = insert(&mut prefixes, d, 5).unwrap();
        assert!(prefixes.find(start, &tokens(1)).is_none());
        assert_eq!(insert(&mut prefixes, e, 6), None);
        assert_eq!((prefixes.blocks.len(), prefixes.numbers.len(), prefixes.spare.len()), (3, 3, 0));

        let adapter = model.attach(&Adapter::load(dir.join("adapter"), model.config()).unwrap()).unwrap();
        let mut prefixes = Prefixes::new(&model, 2 * SLICE);
        let parameters = adapter.parameters(&model).unwrap();
        let start = Parent::Start(Arc::as_ptr(&parameters).addr());
        let first = prefixes.insert(start, &tokens(1), (&cache, 0), Some(&parameters)).unwrap().unwrap();
        prefixes.insert(first, &tokens(2), (&cache, 0), Some(&parameters)).unwrap().unwrap();
        drop((adapter, parameters));
        assert!(insert(&mut prefixes, Parent::Start(0), 1).is_some());
        assert_eq!((prefixes.blocks.len(), prefixes.spare.len()), (1, 1), "blocks of an adapter that is gone");
    }
}
