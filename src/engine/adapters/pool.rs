//! All adapters of an engine.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use lora_sched::{AdapterId, AdapterSpec};
use rayon::prelude::*;

use super::generate::generate;
use super::layout::AdapterLayout;
use super::peft::{PeftError, adapter_folders, read_peft};
use super::slab::{HostSlabs, Slab, SlabMaker};
use crate::engine::model::ModelSpec;

/// One adapter in host memory.
#[derive(Debug)]
pub struct HostAdapter {
    /// What requests call it.
    pub name: String,
    /// Where its matrices are.
    pub layout: Arc<AdapterLayout>,
    /// Its matrices.
    pub slab: Slab,
}

impl HostAdapter {
    /// Bytes that a swap copies.
    pub fn bytes(&self) -> u64 {
        self.slab.bytes()
    }

    /// What the scheduler is told about it.
    pub fn spec(&self) -> AdapterSpec {
        AdapterSpec::new(self.layout.rank() as u32, self.bytes())
    }
}

/// A pool that cannot be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Ranks to generate adapters with.
    #[error(
        "adapter rank {rank} is not between 1 and the largest rank, {max_rank}: change --ranks or --max-r"
    )]
    Rank {
        /// The rank.
        rank: usize,
        /// The largest.
        max_rank: usize,
    },
    /// Fewer folders than adapters.
    #[error(
        "{folder}: {found} adapter folders, {wanted} adapters wanted: lower --total-loras or add folders"
    )]
    TooFew {
        /// The folder of folders.
        folder: String,
        /// Folders in it.
        found: usize,
        /// Adapters wanted.
        wanted: usize,
    },
    /// A name that is taken.
    #[error("there is an adapter {name:?} already: unload it or choose another name")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A folder that cannot be used.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// No memory for a slab.
    #[error("adapter {name}: {message}")]
    Slab {
        /// The adapter.
        name: String,
        /// What failed.
        message: String,
    },
}

/// Every adapter of an engine, in host memory. Ids are never reused: a removed adapter leaves a gap.
#[derive(Debug)]
pub struct HostPool {
    spec: ModelSpec,
    max_rank: usize,
    slabs: Arc<dyn SlabMaker>,
    adapters: RwLock<Vec<Option<Arc<HostAdapter>>>>,
}

impl HostPool {
    /// No adapters yet. Slots are made for adapters of up to `max_rank` on every linear module; slabs are
    /// the CPU executor's.
    pub fn empty(spec: &ModelSpec, max_rank: usize) -> Self {
        Self::empty_in(Arc::new(HostSlabs), spec, max_rank)
    }

    /// [`HostPool::empty`], with slabs made by `slabs`.
    pub fn empty_in(slabs: Arc<dyn SlabMaker>, spec: &ModelSpec, max_rank: usize) -> Self {
        Self { spec: spec.clone(), max_rank, slabs, adapters: RwLock::default() }
    }

    /// `total` adapters drawn from `seed`, named `lora-0` and so on; their ranks cycle through
    /// `ranks`.
    pub fn generate(
        spec: &ModelSpec,
        max_rank: usize,
        total: usize,
        ranks: &[usize],
        seed: u64,
    ) -> Result<Self, PoolError> {
        Self::generate_in(Arc::new(HostSlabs), spec, max_rank, total, ranks, seed)
    }

    /// [`HostPool::generate`], with slabs made by `slabs`.
    pub fn generate_in(
        slabs: Arc<dyn SlabMaker>,
        spec: &ModelSpec,
        max_rank: usize,
        total: usize,
        ranks: &[usize],
        seed: u64,
    ) -> Result<Self, PoolError> {
        let default = [max_rank];
        let ranks = if ranks.is_empty() { &default } else { ranks };
        if let Some(&rank) = ranks.iter().find(|r| **r == 0 || **r > max_rank) {
            return Err(PoolError::Rank { rank, max_rank });
        }
        let adapters = (0..total)
            .into_par_iter()
            .map(|i| match generate(spec, seed, i, ranks[i % ranks.len()], &*slabs) {
                Ok(adapter) => Ok(Some(Arc::new(adapter))),
                Err(message) => Err(PoolError::Slab { name: format!("lora-{i}"), message }),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { adapters: RwLock::new(adapters), ..Self::empty_in(slabs, spec, max_rank) })
    }

    /// The first `total` PEFT folders inside `folder`, in name order, named after their folders; all
    /// of them if `total` is none.
    pub fn load(
        spec: &ModelSpec,
        max_rank: usize,
        folder: &Path,
        total: Option<usize>,
    ) -> Result<Self, PoolError> {
        Self::load_in(Arc::new(HostSlabs), spec, max_rank, folder, total)
    }

    /// [`HostPool::load`], with slabs made by `slabs`.
    pub fn load_in(
        slabs: Arc<dyn SlabMaker>,
        spec: &ModelSpec,
        max_rank: usize,
        folder: &Path,
        total: Option<usize>,
    ) -> Result<Self, PoolError> {
        let mut folders = adapter_folders(folder)?;
        if let Some(wanted) = total {
            if wanted > folders.len() {
                return Err(PoolError::TooFew {
                    folder: folder.display().to_string(),
                    found: folders.len(),
                    wanted,
                });
            }
            folders.truncate(wanted);
        }
        let pool = Self::empty_in(slabs, spec, max_rank);
        for path in folders {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            pool.add(&name, &path)?;
        }
        Ok(pool)
    }

    /// Reads a PEFT folder and adds it under the next id.
    pub fn add(&self, name: &str, folder: &Path) -> Result<AdapterId, PoolError> {
        let duplicate = || PoolError::Duplicate { name: name.to_owned() };
        if self.find(name).is_some() {
            return Err(duplicate());
        }
        // Read outside the lock: swaps look adapters up meanwhile.
        let (layout, values) = read_peft(&self.spec, self.max_rank, folder)?;
        let slab =
            self.slabs.hold(values).map_err(|message| PoolError::Slab { name: name.to_owned(), message })?;
        let adapter = HostAdapter { name: name.to_owned(), layout: Arc::new(layout), slab };
        let mut adapters = self.write();
        if adapters.iter().flatten().any(|a| a.name == name) {
            return Err(duplicate());
        }
        adapters.push(Some(Arc::new(adapter)));
        Ok(AdapterId(adapters.len() as u32 - 1))
    }

    /// Forgets an adapter; whoever still holds it may finish with it.
    pub fn remove(&self, id: AdapterId) -> Option<Arc<HostAdapter>> {
        self.write().get_mut(id.0 as usize)?.take()
    }

    /// An adapter by id.
    pub fn get(&self, id: AdapterId) -> Option<Arc<HostAdapter>> {
        self.read().get(id.0 as usize)?.clone()
    }

    /// An adapter's id by name.
    pub fn find(&self, name: &str) -> Option<AdapterId> {
        let adapters = self.read();
        let index = adapters.iter().position(|a| a.as_ref().is_some_and(|a| a.name == name))?;
        Some(AdapterId(index as u32))
    }

    /// Ids given out so far; some may be removed.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// Whether no id was given out.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the scheduler is told about each adapter, in id order.
    pub fn specs(&self) -> Vec<AdapterSpec> {
        self.read().iter().flatten().map(|a| a.spec()).collect()
    }

    /// Bytes of all adapters.
    pub fn bytes(&self) -> u64 {
        self.read().iter().flatten().map(|a| a.bytes()).sum()
    }

    /// The largest rank that a slot holds.
    pub fn max_rank(&self) -> usize {
        self.max_rank
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<Option<Arc<HostAdapter>>>> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Option<Arc<HostAdapter>>>> {
        self.adapters.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::preset;

    #[test]
    fn generated_adapters_are_reproducible_distinct_and_nowhere_zero() {
        let spec = preset("tiny").unwrap();
        let pool = HostPool::generate(&spec, 8, 3, &[2, 8], 1).unwrap();
        let again = HostPool::generate(&spec, 8, 3, &[2, 8], 1).unwrap();
        let get = |p: &HostPool, i| p.get(AdapterId(i)).unwrap();
        assert_eq!(get(&pool, 2).slab.f32(), get(&again, 2).slab.f32());
        assert_ne!(get(&pool, 0).slab.f32(), get(&pool, 2).slab.f32());
        assert!(get(&pool, 1).slab.f32().iter().all(|v| *v != 0.0 && v.is_finite()));
        let ranks: Vec<_> = pool.specs().iter().map(|s| s.rank).collect();
        assert_eq!(ranks, [2, 8, 2]);
        assert_eq!(pool.specs()[1].bytes, 4 * spec.adapter_parameters(8));
        assert_eq!(pool.find("lora-1"), Some(AdapterId(1)));
    }

    #[test]
    fn ranks_outside_a_slot_are_refused() {
        let spec = preset("tiny").unwrap();
        for ranks in [&[0][..], &[4, 16]] {
            assert!(matches!(HostPool::generate(&spec, 8, 2, ranks, 0), Err(PoolError::Rank { .. })));
        }
    }

    #[test]
    fn removed_adapters_leave_a_gap() {
        let spec = preset("tiny").unwrap();
        let pool = HostPool::generate(&spec, 2, 2, &[], 0).unwrap();
        assert_eq!(pool.remove(AdapterId(0)).unwrap().name, "lora-0");
        assert!(pool.get(AdapterId(0)).is_none() && pool.remove(AdapterId(9)).is_none());
        assert_eq!((pool.len(), pool.find("lora-1")), (2, Some(AdapterId(1))));
    }
}
