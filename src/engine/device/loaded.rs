//! Weights that stay on a device while executors come and go.

use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::backend::Backend;
use crate::engine::model::{DeviceModel, ModelSpec, WeightError, Weights};

/// A place for a model's weights on a device: loaded by the first executor, used by all that follow, so
/// that a sweep over budgets reads or draws them once.
pub struct LoadedModel<B: Backend>(Arc<Mutex<Option<Arc<DeviceModel<B>>>>>);

impl<B: Backend> Clone for LoadedModel<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: Backend> Default for LoadedModel<B> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<B: Backend> std::fmt::Debug for LoadedModel<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LoadedModel").finish()
    }
}

impl<B: Backend> LoadedModel<B> {
    /// The weights, loaded through `b` the first time.
    ///
    /// # Errors
    /// If they cannot be read or the device cannot hold them.
    pub fn get(
        &self,
        b: &mut B,
        spec: &ModelSpec,
        weights: &Weights,
    ) -> Result<Arc<DeviceModel<B>>, WeightError> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = &*held {
            return Ok(Arc::clone(model));
        }
        let model = Arc::new(DeviceModel::load(b, spec, weights)?);
        *held = Some(Arc::clone(&model));
        Ok(model)
    }
}
