//! Adapters of a running engine: loading, unloading, pinning, and where each one is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sched::{AdapterId, EventError};

use super::adapters::{AdapterView, HostAdapter, NameTaken, PoolError};
use super::channel::{Receiver, Sender, channel};
use super::facade::{Engine, Shared};
use super::step_loop::Change;

/// A change to an engine's adapters that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The name is taken.
    #[error("The lora adapter '{name}' has already been loaded: unload it first, or choose another name.")]
    Duplicate {
        /// It.
        name: String,
    },
    /// The name belongs to an adapter that is being unloaded.
    #[error("The lora adapter '{name}' is being unloaded: requests for it are still running.")]
    Leaving {
        /// It.
        name: String,
    },
    /// No adapter of that name.
    #[error("The lora adapter '{name}' cannot be found: GET /adapters lists those that are there.")]
    Unknown {
        /// It.
        name: String,
    },
    /// No such folder.
    #[error("{}: there is no such folder on the server", path.display())]
    NoFolder {
        /// It.
        path: PathBuf,
    },
    /// The engine computes nothing, so it has nothing to load into.
    #[error("this engine emulates a device and takes no adapter's files: its adapters are set at start")]
    Emulated,
    /// The folder cannot be used.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The scheduler refuses.
    #[error("{0}")]
    Refused(EventError),
    /// The engine has stopped.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

/// What a change comes to.
pub(super) struct Reply {
    pub(super) outcome: Result<AdapterId, EventError>,
    /// The memory of an adapter that has gone, or was not taken: given back by whoever asked, since giving
    /// back page-locked memory may wait for the device, and the step loop must not.
    pub(super) memory: Option<Arc<HostAdapter>>,
}

/// A change that has been made. Dropping it gives back an unloaded adapter's memory, which on a GPU may take
/// as long as a step.
#[derive(Debug)]
pub struct Made {
    id: AdapterId,
    _memory: Option<Arc<HostAdapter>>,
}

impl Made {
    /// The adapter.
    pub fn id(&self) -> AdapterId {
        self.id
    }
}

/// A change on its way. It is made whether or not anybody waits for it.
pub struct Pending {
    receiver: Receiver<Reply>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl Pending {
    /// Waits for it, blocking the thread; the adapter's id.
    ///
    /// # Errors
    /// If the scheduler refuses it or the engine stops first.
    pub fn wait(self) -> Result<AdapterId, AdapterError> {
        let reply = self.receiver.recv();
        Ok(self.made(reply)?.id)
    }

    /// Waits for it.
    ///
    /// # Errors
    /// See [`Self::wait`].
    pub async fn done(self) -> Result<Made, AdapterError> {
        let reply = std::future::poll_fn(|cx| self.receiver.poll_recv(cx)).await;
        self.made(reply)
    }

    fn made(&self, reply: Option<Reply>) -> Result<Made, AdapterError> {
        match reply {
            Some(Reply { outcome, memory }) => match outcome {
                Ok(id) => Ok(Made { id, _memory: memory }),
                Err(error) => Err(AdapterError::Refused(error)),
            },
            None => Err(AdapterError::Stopped(self.shared.why_stopped())),
        }
    }
}

impl Engine {
    /// Every adapter, in order of ids: after the step loop's last turn.
    pub fn adapters(&self) -> Vec<AdapterView> {
        self.shared.directory.views()
    }

    /// The adapter that requests mean by a name.
    pub fn find_adapter(&self, name: &str) -> Option<AdapterId> {
        self.shared.directory.find(name)
    }

    /// Whether requests may name this adapter.
    pub fn has_adapter(&self, id: AdapterId) -> bool {
        self.shared.directory.serves(id)
    }

    /// What requests call an adapter; none once it has gone.
    pub fn adapter_name(&self, id: AdapterId) -> Option<String> {
        self.shared.directory.name(id)
    }

    /// Adapters that requests may name.
    pub fn adapter_count(&self) -> usize {
        self.shared.directory.len()
    }

    /// Bytes of adapters in host memory; 0 where nothing is computed.
    pub fn host_bytes(&self) -> u64 {
        self.shared.pool.as_ref().map_or(0, |pool| pool.bytes())
    }

    /// Reads a PEFT folder and serves it as `name`. Blocks for as long as reading takes.
    ///
    /// # Errors
    /// If the name is taken, the folder is not there or not an adapter of this model, every slot is pinned
    /// by the user, or the engine has stopped.
    pub fn load_adapter(&self, name: &str, folder: &Path) -> Result<AdapterId, AdapterError> {
        let pool = self.shared.pool.as_ref().ok_or(AdapterError::Emulated)?;
        let _reserved = self.shared.directory.reserve(name).map_err(|taken| match taken {
            NameTaken::There => AdapterError::Duplicate { name: name.to_owned() },
            NameTaken::Leaving => AdapterError::Leaving { name: name.to_owned() },
        })?;
        if !folder.is_dir() {
            return Err(AdapterError::NoFolder { path: folder.to_owned() });
        }
        let adapter = pool.prepare(name, folder)?;
        self.change(|reply| Change::Add(Box::new(adapter), reply))?.wait()
    }

    /// Takes no more requests for an adapter, lets those that it has end, and then forgets it.
    ///
    /// # Errors
    /// If there is no adapter of that name, or the engine has stopped.
    pub fn unload_adapter(&self, name: &str) -> Result<Pending, AdapterError> {
        let id = self.shared.directory.leave(name);
        let id = id.ok_or_else(|| AdapterError::Unknown { name: name.to_owned() })?;
        self.change(|reply| Change::Remove(id, reply))
    }

    /// Keeps an adapter in a slot for good (a slot is found for it when one can be had), or no longer.
    ///
    /// # Errors
    /// If there is no such adapter, its pin would leave no slot for others, or the engine has stopped.
    pub fn pin_adapter(&self, id: AdapterId, pinned: bool) -> Result<Pending, AdapterError> {
        self.change(|reply| Change::Pin(id, pinned, reply))
    }

    fn change(&self, change: impl FnOnce(Sender<Reply>) -> Change) -> Result<Pending, AdapterError> {
        let (sender, receiver) = channel();
        let shared = Arc::clone(&self.shared);
        let pending = Pending { receiver, shared };
        // A loop that has ended drops the sender, which the wait tells of.
        self.shared.mailbox.change(change(sender));
        Ok(pending)
    }
}
