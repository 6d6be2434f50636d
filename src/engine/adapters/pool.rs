//! All adapters of an engine.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use lora_sched::{AdapterId, AdapterSpec};
use rayon::prelude::*;

use super::disk::{DiskTier, OnDisk, Source, checksum, spill, unspill};
use super::error::PoolError;
use super::generate::generate;
use super::kept::{HostAdapter, KeptAdapter};
use super::peft::{adapter_folders, read_peft};
use super::slab::{HostSlabs, SlabMaker};
use crate::engine::model::ModelSpec;

/// Every adapter of an engine, in host memory or on the disk behind it. Ids are never reused: a removed
/// adapter leaves a gap.
#[derive(Debug)]
pub struct HostPool {
    spec: ModelSpec,
    max_rank: usize,
    slabs: Arc<dyn SlabMaker>,
    /// None where host memory holds all.
    disk: Option<Arc<DiskTier>>,
    adapters: RwLock<Vec<Option<KeptAdapter>>>,
}

impl HostPool {
    /// No adapters yet. Slots are made for adapters of up to `max_rank` on every linear module; slabs are
    /// the CPU executor's.
    pub fn empty(spec: &ModelSpec, max_rank: usize) -> Self {
        Self::empty_in(Arc::new(HostSlabs), spec, max_rank)
    }

    /// [`HostPool::empty`], with slabs made by `slabs`.
    pub fn empty_in(slabs: Arc<dyn SlabMaker>, spec: &ModelSpec, max_rank: usize) -> Self {
        Self { spec: spec.clone(), max_rank, slabs, disk: None, adapters: RwLock::default() }
    }

    /// The same with a disk behind it.
    pub fn over(self, disk: Option<DiskTier>) -> Self {
        Self { disk: disk.map(Arc::new), ..self }
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
        Self::empty(spec, max_rank).generated(total, ranks, seed)
    }

    /// The same pool with the adapters of [`HostPool::generate`].
    pub fn generated(self, total: usize, ranks: &[usize], seed: u64) -> Result<Self, PoolError> {
        let max_rank = self.max_rank;
        let default = [max_rank];
        let ranks = if ranks.is_empty() { &default } else { ranks };
        if let Some(&rank) = ranks.iter().find(|r| **r == 0 || **r > max_rank) {
            return Err(PoolError::Rank { rank, max_rank });
        }
        let folder = self.disk.as_deref().map(DiskTier::prepare).transpose()?;
        let adapters = (0..total)
            .into_par_iter()
            .map(|i| {
                let adapter = generate(&self.spec, seed, i, ranks[i % ranks.len()], &*self.slabs)
                    .map_err(|message| PoolError::Slab { name: format!("lora-{i}"), message })?;
                let on_disk = folder.map(|f| spill(&adapter.slab, f.join(format!("lora-{i}.slab"))));
                Ok(Some(KeptAdapter::new(adapter, None, on_disk.transpose()?, self.holds(i))))
            })
            .collect::<Result<_, PoolError>>()?;
        Ok(Self { adapters: RwLock::new(adapters), ..self })
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
        Self::empty_in(slabs, spec, max_rank).loaded(folder, total)
    }

    /// The same pool with the adapters of [`HostPool::load`].
    pub fn loaded(self, folder: &Path, total: Option<usize>) -> Result<Self, PoolError> {
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
        for (i, path) in folders.iter().enumerate() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let adapter = self.read_folder(&name, path, self.holds(i))?;
            self.insert(AdapterId(i as u32), adapter);
        }
        Ok(self)
    }

    /// Whether adapter `i` of those at the start is in host memory.
    fn holds(&self, i: usize) -> bool {
        self.disk.as_ref().is_none_or(|disk| i < disk.host_loras())
    }

    fn read_folder(&self, name: &str, folder: &Path, held: bool) -> Result<KeptAdapter, PoolError> {
        let adapter = self.host_adapter(name, folder)?;
        let on_disk = self
            .disk
            .as_ref()
            .map(|_| OnDisk { source: Source::Folder(folder.to_owned()), checksum: checksum(&adapter.slab) });
        Ok(KeptAdapter::new(adapter, Some(folder.display().to_string()), on_disk, held))
    }

    fn host_adapter(&self, name: &str, folder: &Path) -> Result<HostAdapter, PoolError> {
        let (layout, values) = read_peft(&self.spec, self.max_rank, folder)?;
        let held = self.slabs.hold(values);
        let slab = held.map_err(|message| PoolError::Slab { name: name.to_owned(), message })?;
        Ok(HostAdapter { name: name.to_owned(), layout: Arc::new(layout), slab })
    }

    /// Reads a PEFT folder for [`HostPool::insert`], under no lock: swaps look adapters up meanwhile. Where
    /// host memory does not hold all, what was read is checked and let go of.
    pub(in crate::engine) fn prepare(&self, name: &str, folder: &Path) -> Result<KeptAdapter, PoolError> {
        self.read_folder(name, folder, self.disk.is_none())
    }

    /// Keeps an adapter under an id that nobody has had.
    pub(in crate::engine) fn insert(&self, id: AdapterId, adapter: KeptAdapter) {
        let mut adapters = self.write();
        let at = id.0 as usize;
        if adapters.len() <= at {
            adapters.resize(at + 1, None);
        }
        adapters[at] = Some(adapter);
    }

    /// The same adapters in a pool of its own, for an engine that will load and unload some.
    pub fn fork(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            max_rank: self.max_rank,
            slabs: Arc::clone(&self.slabs),
            disk: self.disk.clone(),
            adapters: RwLock::new(self.read().clone()),
        }
    }

    /// Forgets an adapter, and gives its host copy; whoever still holds that may finish with it.
    pub fn remove(&self, id: AdapterId) -> Option<Arc<HostAdapter>> {
        self.write().get_mut(id.0 as usize)?.take()?.held
    }

    /// Takes an adapter out of host memory: it is read again by [`HostPool::fetch`].
    pub(in crate::engine) fn evict(&self, id: AdapterId) -> Option<Arc<HostAdapter>> {
        self.write().get_mut(id.0 as usize)?.as_mut()?.held.take()
    }

    /// Reads an adapter into host memory, checking that it is what it was.
    ///
    /// # Errors
    /// If it is not, cannot be read, or there is no memory for it.
    pub(in crate::engine) fn fetch(&self, id: AdapterId) -> Result<(), PoolError> {
        let kept = self.read().get(id.0 as usize).cloned().flatten();
        let Some(KeptAdapter { name, layout, disk: Some(disk), .. }) = kept else {
            let message = "it is not on disk".to_owned();
            return Err(PoolError::Slab { name: id.to_string(), message });
        };
        let path = disk.source.path().to_owned();
        let changed = |what: String| PoolError::Changed { name: name.clone(), path: path.clone(), what };
        let adapter = match &disk.source {
            Source::Folder(folder) => {
                let adapter = self.host_adapter(&name, folder)?;
                if adapter.layout != layout {
                    return Err(changed("its rank, scale or modules differ".into()));
                }
                adapter
            }
            Source::Spilled(path) => {
                let slab = unspill(&*self.slabs, layout.elements(), path)?;
                HostAdapter { name: name.clone(), layout, slab }
            }
        };
        let found = checksum(&adapter.slab);
        if found != disk.checksum {
            return Err(changed(format!("checksum {found:08x} instead of {:08x}", disk.checksum)));
        }
        if let Some(Some(kept)) = self.write().get_mut(id.0 as usize) {
            kept.held = Some(Arc::new(adapter));
        }
        Ok(())
    }

    /// An adapter by id, if it is in host memory.
    pub fn get(&self, id: AdapterId) -> Option<Arc<HostAdapter>> {
        self.read().get(id.0 as usize)?.as_ref()?.held.clone()
    }

    /// An adapter's name by id.
    pub fn name(&self, id: AdapterId) -> Option<String> {
        Some(self.read().get(id.0 as usize)?.as_ref()?.name.clone())
    }

    /// The folder that an adapter was read from; none if it was generated.
    pub fn root(&self, id: AdapterId) -> Option<String> {
        self.read().get(id.0 as usize)?.as_ref()?.root.clone()
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
        self.read().iter().flatten().map(|a| a.spec).collect()
    }

    /// Adapters in host memory.
    pub fn held(&self) -> usize {
        self.read().iter().flatten().filter(|a| a.held.is_some()).count()
    }

    /// Bytes of the adapters in host memory.
    pub fn bytes(&self) -> u64 {
        self.read().iter().flatten().filter_map(|a| a.held.as_ref()).map(|a| a.bytes()).sum()
    }

    /// The largest rank that a slot holds.
    pub fn max_rank(&self) -> usize {
        self.max_rank
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<Option<KeptAdapter>>> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Option<KeptAdapter>>> {
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
        assert!(pool.fork().get(AdapterId(1)).is_some());
    }

    #[test]
    fn what_is_not_in_host_memory_is_read_back_as_it_was() {
        let spec = preset("tiny").unwrap();
        let whole = HostPool::generate(&spec, 2, 3, &[1, 2], 5).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskTier::new(1, Some(dir.path().to_owned()));
        let pool = HostPool::empty(&spec, 2).over(Some(disk)).generated(3, &[1, 2], 5).unwrap();
        assert_eq!((pool.held(), pool.specs()), (1, whole.specs()));
        for id in [1, 2].map(AdapterId) {
            assert!(pool.get(id).is_none());
            pool.fetch(id).unwrap();
            assert_eq!(pool.get(id).unwrap().slab.f32(), whole.get(id).unwrap().slab.f32());
        }
        assert_eq!(pool.evict(AdapterId(1)).unwrap().name, "lora-1");
        assert_eq!(pool.held(), 2);
    }

    #[test]
    fn a_file_that_has_changed_is_never_served() {
        let spec = preset("tiny").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskTier::new(1, Some(dir.path().to_owned()));
        let pool = HostPool::empty(&spec, 2).over(Some(disk)).generated(3, &[], 5).unwrap();
        let path = dir.path().join("lora-1.slab");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[1000] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let said = pool.fetch(AdapterId(1)).unwrap_err().to_string();
        assert!(said.contains("lora-1.slab") && said.contains("checksum"), "{said}");
        std::fs::write(&path, &bytes[..999]).unwrap();
        let said = pool.fetch(AdapterId(1)).unwrap_err().to_string();
        assert!(said.contains("999 bytes"), "{said}");
        std::fs::remove_file(&path).unwrap();
        assert!(pool.fetch(AdapterId(1)).unwrap_err().to_string().contains("lora-1.slab"));
        assert!(pool.get(AdapterId(1)).is_none());
        pool.fetch(AdapterId(2)).unwrap();
    }
}
