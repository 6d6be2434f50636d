//! Linear layers and where their products go.

use crate::error::ensure;
use crate::memory::{DeviceBuffer, View, ViewMut};
use crate::{CudaError, bf16};

/// The weight of a linear layer.
#[derive(Debug)]
pub struct Weight {
    /// `[outputs, inputs]`, row-major.
    pub values: DeviceBuffer<bf16>,
    /// `[outputs]`, in the number formats of both kinds of output.
    pub bias: Option<(DeviceBuffer<bf16>, DeviceBuffer<f32>)>,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
}

impl Weight {
    /// Whether `x` holds `n` rows of inputs, `out` as many of outputs.
    pub(crate) fn check(
        &self,
        kernel: &'static str,
        n: usize,
        x: View<'_, bf16>,
        out: &Product<'_>,
    ) -> Result<(), CudaError> {
        let Self { outputs, inputs, .. } = *self;
        ensure!(kernel, x.len() >= n * inputs, "{n} rows of {inputs} in a buffer of {}", x.len());
        let width = if out.kind() == Kind::SiluMul { outputs / 2 } else { outputs };
        ensure!(kernel, out.len() >= n * width, "{n} rows of {width} in a buffer of {}", out.len());
        ensure!(kernel, self.values.len() == outputs * inputs, "a weight of {} values", self.values.len());
        Ok(())
    }
}

/// Where a product goes.
#[derive(Debug)]
pub enum Product<'a> {
    /// `out = x · weightᵀ + bias`.
    Store(ViewMut<'a, bf16>),
    /// `out = x · weightᵀ + bias`, in f32.
    StoreWide(ViewMut<'a, f32>),
    /// `out += x · weightᵀ + bias`: onto the residual stream.
    Add(ViewMut<'a, f32>),
    /// `out = silu(gate) · up`, `[n, outputs / 2]`, where gate and up are the halves of what [`Product::Store`] would
    /// store, to the bit. Without a bias, of an even number of fours of outputs, and by the kernels for few rows alone.
    SiluMul(ViewMut<'a, bf16>),
}

/// Which of them; the numbers are `cuda/gemm_small.cu`'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Store = 0,
    StoreWide = 1,
    Add = 2,
    SiluMul = 3,
}

impl Product<'_> {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Store(_) => Kind::Store,
            Self::StoreWide(_) => Kind::StoreWide,
            Self::Add(_) => Kind::Add,
            Self::SiluMul(_) => Kind::SiluMul,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Store(out) | Self::SiluMul(out) => out.len(),
            Self::StoreWide(out) | Self::Add(out) => out.len(),
        }
    }

    pub(crate) fn address(&self) -> u64 {
        match self {
            Self::Store(out) | Self::SiluMul(out) => out.address(),
            Self::StoreWide(out) | Self::Add(out) => out.address(),
        }
    }
}
