//! The adapters of a running engine: their names, where each one is, and what it has been used for.
//!
//! Any thread may ask; the step loop alone tells. A name is reserved while its adapter is being read and
//! until a removed adapter holds nothing any more, so that however many callers race for one, exactly one
//! of them loads it and exactly one unloads it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use lora_sched::{AdapterId, AdapterSpec, Nanos, SlotState, SlotView};

use crate::engine::gauges;

/// Where an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// In a slot.
    Slot,
    /// On its way into a slot.
    Loading,
    /// In host memory.
    Host,
    /// On disk only.
    Disk,
}

impl Tier {
    /// The name that clients see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Slot => "slot",
            Self::Loading => "loading",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}

/// One adapter, now.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterView {
    /// Its number, which is never given again.
    pub id: AdapterId,
    /// What requests call it.
    pub name: String,
    /// Where it came from: a folder, or its own name if it was generated.
    pub root: String,
    /// Where it is.
    pub tier: Tier,
    /// Its slot, also while it is on the way there.
    pub slot: Option<u32>,
    /// Its rank.
    pub rank: u32,
    /// Bytes that a swap copies.
    pub bytes: u64,
    /// Requests that hold its slot.
    pub pinned_by: u32,
    /// Whether the user pinned it.
    pub user_pinned: bool,
    /// When the last request for it was taken, on the engine's clock.
    pub last_used: Option<Nanos>,
    /// Requests taken.
    pub requests: u64,
    /// Those among them that found it in a slot, or on the way there.
    pub hits: u64,
    /// Times that it was copied into a slot while serving.
    pub swaps: u64,
    /// Why it cannot be had, if so.
    pub failure: Option<String>,
}

/// What is kept of one adapter.
#[derive(Debug)]
struct Entry {
    name: String,
    root: String,
    spec: AdapterSpec,
    /// Removed, and not yet gone: no new requests.
    leaving: AtomicBool,
    user_pinned: AtomicBool,
    in_host: AtomicBool,
    /// 0 is never.
    last_used: AtomicU64,
    requests: AtomicU64,
    hits: AtomicU64,
    swaps: AtomicU64,
    failure: OnceLock<String>,
}

impl Entry {
    fn new(name: String, root: String, spec: AdapterSpec, in_host: bool) -> Self {
        Self {
            name,
            root,
            spec,
            leaving: AtomicBool::new(false),
            user_pinned: AtomicBool::new(spec.pinned),
            in_host: AtomicBool::new(in_host),
            last_used: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            swaps: AtomicU64::new(0),
            failure: OnceLock::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Book {
    /// By id; none has gone.
    entries: Vec<Option<Arc<Entry>>>,
    names: HashMap<String, Name>,
    /// Reservations so far.
    reserved: u64,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    /// An adapter that is being read, under this reservation.
    Reserved(u64),
    /// An adapter.
    Of(AdapterId),
}

impl Book {
    fn id(&self, name: &str) -> Option<AdapterId> {
        match self.names.get(name)? {
            Name::Of(id) => Some(*id),
            Name::Reserved(_) => None,
        }
    }

    fn entry(&self, id: AdapterId) -> Option<&Arc<Entry>> {
        self.entries.get(id.0 as usize)?.as_ref()
    }
}

/// Why a name cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum NameTaken {
    /// An adapter has it, or is being read under it.
    There,
    /// Its adapter is being unloaded.
    Leaving,
}

/// See the module.
#[derive(Debug, Default)]
pub(in crate::engine) struct Directory {
    book: RwLock<Book>,
    /// The slots as the step loop last told them.
    slots: Mutex<Vec<SlotView>>,
}

impl Directory {
    /// Of the adapters that an engine starts with, in order of their ids; `host_loras` of them are in host
    /// memory, if it does not hold all.
    pub fn new(
        adapters: impl Iterator<Item = (String, String, AdapterSpec)>,
        host_loras: Option<usize>,
    ) -> Self {
        let mut book = Book::default();
        for (i, (name, root, spec)) in adapters.enumerate() {
            book.names.insert(name.clone(), Name::Of(AdapterId(i as u32)));
            let in_host = host_loras.is_none_or(|n| i < n);
            book.entries.push(Some(Arc::new(Entry::new(name, root, spec, in_host))));
        }
        Self { book: RwLock::new(book), slots: Mutex::default() }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, id: AdapterId) -> Option<Arc<Entry>> {
        self.read().entry(id).cloned()
    }

    /// Whether requests may name this id.
    pub fn serves(&self, id: AdapterId) -> bool {
        self.entry(id).is_some_and(|e| !e.leaving.load(Relaxed))
    }

    /// The id that requests mean by a name.
    pub fn find(&self, name: &str) -> Option<AdapterId> {
        let id = self.read().id(name)?;
        self.serves(id).then_some(id)
    }

    /// An adapter's name.
    pub fn name(&self, id: AdapterId) -> Option<String> {
        Some(self.entry(id)?.name.clone())
    }

    /// Adapters that requests may name.
    pub fn len(&self) -> usize {
        self.read().entries.iter().flatten().filter(|e| !e.leaving.load(Relaxed)).count()
    }

    /// Why an adapter cannot be had.
    pub fn failure(&self, id: AdapterId) -> Option<String> {
        self.entry(id)?.failure.get().cloned()
    }

    /// Takes a name for an adapter that is being read.
    pub fn reserve(self: &Arc<Self>, name: &str) -> Result<Reservation, NameTaken> {
        let mut book = self.write();
        if book.names.contains_key(name) {
            let entry = book.id(name).and_then(|id| book.entry(id));
            let leaving = entry.is_some_and(|e| e.leaving.load(Relaxed));
            return Err(if leaving { NameTaken::Leaving } else { NameTaken::There });
        }
        book.reserved += 1;
        let taken = Name::Reserved(book.reserved);
        book.names.insert(name.to_owned(), taken);
        Ok(Reservation { directory: Arc::clone(self), name: name.to_owned(), taken })
    }

    /// Lets no more requests in for the adapter of this name; none if there is none, or somebody else has
    /// done it already.
    pub fn leave(&self, name: &str) -> Option<AdapterId> {
        let book = self.read();
        let id = book.id(name)?;
        let entry = book.entry(id)?;
        (!entry.leaving.swap(true, Relaxed)).then_some(id)
    }

    /// An adapter has been taken by the scheduler under this id.
    pub fn added(&self, id: AdapterId, name: &str, root: &str, spec: AdapterSpec, in_host: bool) {
        let mut book = self.write();
        book.names.insert(name.to_owned(), Name::Of(id));
        let at = id.0 as usize;
        if book.entries.len() <= at {
            book.entries.resize(at + 1, None);
        }
        book.entries[at] = Some(Arc::new(Entry::new(name.to_owned(), root.to_owned(), spec, in_host)));
    }

    /// A removed adapter holds nothing any more; its name is free.
    pub fn gone(&self, id: AdapterId) {
        let mut book = self.write();
        if let Some(entry) = book.entries.get_mut(id.0 as usize).and_then(Option::take) {
            book.names.remove(&entry.name);
        }
    }

    /// A request was taken at `t`; `hit` if its adapter was in a slot or on the way there.
    pub fn arrived(&self, id: AdapterId, t: Nanos, hit: bool) {
        if let Some(entry) = self.entry(id) {
            entry.last_used.store(t.max(1), Relaxed);
            entry.requests.fetch_add(1, Relaxed);
            entry.hits.fetch_add(u64::from(hit), Relaxed);
        }
    }

    /// An adapter was copied into a slot.
    pub fn swapped(&self, id: AdapterId) {
        if let Some(entry) = self.entry(id) {
            entry.swaps.fetch_add(1, Relaxed);
        }
    }

    /// The user has pinned an adapter, or let go of it.
    pub fn user_pinned(&self, id: AdapterId, pinned: bool) {
        if let Some(entry) = self.entry(id) {
            entry.user_pinned.store(pinned, Relaxed);
        }
    }

    /// An adapter has come into host memory, or lost its place there.
    pub fn in_host(&self, id: AdapterId, there: bool) {
        if let Some(entry) = self.entry(id) {
            entry.in_host.store(there, Relaxed);
        }
    }

    /// An adapter cannot be had.
    pub fn failed(&self, id: AdapterId, why: &str) {
        if let Some(entry) = self.entry(id) {
            entry.user_pinned.store(false, Relaxed);
            // It is read no more, so nothing else can be wrong with it.
            let _ = entry.failure.set(why.to_owned());
        }
    }

    /// How the slots are: after a copy has begun or ended, and after a turn of the step loop.
    pub fn publish(&self, slots: impl Iterator<Item = SlotView>) {
        let mut held = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        held.clear();
        held.extend(slots);
    }

    /// What each slot holds.
    pub fn slots(&self) -> Vec<gauges::SlotView> {
        let held = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().map(|view| view.state.into()).collect()
    }

    /// Every adapter, in order of ids; those that are being unloaded are among them until they have gone.
    pub fn views(&self) -> Vec<AdapterView> {
        let mut in_slot = HashMap::new();
        for (slot, view) in (0u32..).zip(&*self.slots.lock().unwrap_or_else(PoisonError::into_inner)) {
            if let Some(adapter) = view.state.adapter() {
                in_slot.insert(adapter, (slot, *view));
            }
        }
        let entries = self.read().entries.clone();
        let there = (0u32..).zip(entries).filter_map(|(i, e)| Some((AdapterId(i), e?)));
        there.map(|(id, entry)| view(id, &entry, in_slot.get(&id))).collect()
    }
}

fn view(id: AdapterId, entry: &Entry, slot: Option<&(u32, SlotView)>) -> AdapterView {
    let tier = match slot.map(|s| s.1.state) {
        Some(SlotState::Loading(_)) => Tier::Loading,
        Some(_) => Tier::Slot,
        None if entry.in_host.load(Relaxed) => Tier::Host,
        None => Tier::Disk,
    };
    AdapterView {
        id,
        name: entry.name.clone(),
        root: entry.root.clone(),
        tier,
        slot: slot.map(|s| s.0),
        rank: entry.spec.rank,
        bytes: entry.spec.bytes,
        pinned_by: slot.map_or(0, |s| s.1.pins),
        user_pinned: entry.user_pinned.load(Relaxed),
        last_used: Some(entry.last_used.load(Relaxed)).filter(|&t| t > 0),
        requests: entry.requests.load(Relaxed),
        hits: entry.hits.load(Relaxed),
        swaps: entry.swaps.load(Relaxed),
        failure: entry.failure.get().cloned(),
    }
}

/// A name that is kept for an adapter on its way in. Dropping it gives the name back, unless the adapter
/// has come.
#[derive(Debug)]
pub(in crate::engine) struct Reservation {
    directory: Arc<Directory>,
    name: String,
    taken: Name,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut book = self.directory.write();
        // By now the adapter may have come, gone, and another be on its way under the same name.
        if book.names.get(&self.name) == Some(&self.taken) {
            book.names.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> Arc<Directory> {
        let named = |i: u32| (format!("lora-{i}"), format!("lora-{i}"), AdapterSpec::new(8, 1000));
        Arc::new(Directory::new((0..3).map(named), Some(2)))
    }

    #[test]
    fn a_name_is_one_adapters_from_its_reservation_until_it_has_gone() {
        let d = directory();
        assert_eq!(d.reserve("lora-1").unwrap_err(), NameTaken::There);
        let reserved = d.reserve("new").unwrap();
        assert_eq!(d.reserve("new").unwrap_err(), NameTaken::There);
        assert_eq!(d.find("new"), None, "not yet");
        drop(reserved);
        let reserved = d.reserve("new").unwrap();
        d.added(AdapterId(3), "new", "/new", AdapterSpec::new(4, 500), true);
        assert_eq!(d.find("new"), Some(AdapterId(3)));
        assert_eq!(d.leave("new"), Some(AdapterId(3)));
        assert_eq!(d.leave("new"), None, "one caller unloads it");
        assert!(!d.serves(AdapterId(3)) && d.find("new").is_none());
        assert_eq!(d.reserve("new").unwrap_err(), NameTaken::Leaving);
        d.gone(AdapterId(3));
        let next = d.reserve("new").unwrap();
        drop(reserved);
        assert_eq!(
            d.reserve("new").unwrap_err(),
            NameTaken::There,
            "an old reservation gives back its own alone"
        );
        drop(next);
        assert_eq!((d.len(), d.views().len()), (3, 3));
    }

    #[test]
    fn a_view_tells_the_tier_and_the_counts() {
        let d = directory();
        d.arrived(AdapterId(0), 7, true);
        d.arrived(AdapterId(2), 9, false);
        d.swapped(AdapterId(2));
        let slot = |state| SlotView { state, pins: 2, in_step: false, user_pinned: false };
        d.publish(
            [slot(SlotState::Loading(AdapterId(2))), slot(SlotState::Resident(AdapterId(0)))].into_iter(),
        );
        let views = d.views();
        let of = |i: usize| (views[i].tier, views[i].slot, views[i].pinned_by, views[i].last_used);
        assert_eq!(of(0), (Tier::Slot, Some(1), 2, Some(7)));
        assert_eq!(of(1), (Tier::Host, None, 0, None));
        assert_eq!(of(2), (Tier::Loading, Some(0), 2, Some(9)));
        assert_eq!((views[0].hits, views[2].hits, views[2].swaps), (1, 0, 1));
        d.publish(std::iter::empty());
        assert_eq!(d.views()[2].tier, Tier::Disk);
    }
}
