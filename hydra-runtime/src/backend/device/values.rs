//! Values that lie on one device or another, and how each device finds its own.

use crate::Result;
use crate::backend::cpu::{self, Cpu};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, Cuda, Gpu};
use crate::backend::{Backend, StoredWeight};

/// A type of values that lie on one device or another.
macro_rules! on_a_device {
    ($(#[$doc:meta])* $name:ident, $place:ident, $cpu:ty, $cuda:ty) => {
        $(#[$doc])*
        pub struct $name($place);

        enum $place {
            Cpu($cpu),
            #[cfg(feature = "cuda")]
            Cuda($cuda),
        }

        #[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
        impl $name {
            fn cpu(&self) -> Result<&$cpu> {
                match &self.0 {
                    $place::Cpu(value) => Ok(value),
                    #[cfg(feature = "cuda")]
                    $place::Cuda(_) => Err(elsewhere()),
                }
            }

            #[cfg(feature = "cuda")]
            fn cuda(&self) -> Result<&$cuda> {
                match &self.0 {
                    $place::Cuda(value) => Ok(value),
                    $place::Cpu(_) => Err(elsewhere()),
                }
            }
        }

        impl From<$cpu> for $name {
            fn from(value: $cpu) -> Self {
                Self($place::Cpu(value))
            }
        }

        #[cfg(feature = "cuda")]
        impl From<$cuda> for $name {
            fn from(value: $cuda) -> Self {
                Self($place::Cuda(value))
            }
        }
    };
}

/// The same, to write.
macro_rules! written_on_a_device {
    ($name:ident, $place:ident, $cpu:ty, $cuda:ty) => {
        #[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
        impl $name {
            fn cpu_mut(&mut self) -> Result<&mut $cpu> {
                match &mut self.0 {
                    $place::Cpu(value) => Ok(value),
                    #[cfg(feature = "cuda")]
                    $place::Cuda(_) => Err(elsewhere()),
                }
            }

            #[cfg(feature = "cuda")]
            fn cuda_mut(&mut self) -> Result<&mut $cuda> {
                match &mut self.0 {
                    $place::Cuda(value) => Ok(value),
                    $place::Cpu(_) => Err(elsewhere()),
                }
            }
        }
    };
}

on_a_device!(
    /// f32 values on a [`Device`](super::Device).
    Buffer, BufferPlace, cpu::Buffer, cuda::Buffer<Gpu>
);
on_a_device!(
    /// Activations on a [`Device`](super::Device).
    Activations, ActivationsPlace, cpu::Activations, cuda::Activations<Gpu>
);
on_a_device!(
    /// A frozen matrix on a [`Device`](super::Device).
    Matrix, MatrixPlace, StoredWeight, cuda::Matrix<Gpu>
);

written_on_a_device!(Buffer, BufferPlace, cpu::Buffer, cuda::Buffer<Gpu>);
written_on_a_device!(Activations, ActivationsPlace, cpu::Activations, cuda::Activations<Gpu>);

#[cfg(feature = "cuda")]
fn elsewhere() -> crate::Error {
    crate::Error::Device("values that lie on another device".into())
}

/// One of the devices that a [`Device`](super::Device) may be: finds its own values.
pub(super) trait Member: Backend {
    fn f32(buffer: &Buffer) -> Result<&Self::Buffer>;
    fn f32_mut(buffer: &mut Buffer) -> Result<&mut Self::Buffer>;
    fn act(activations: &Activations) -> Result<&Self::Activations>;
    fn act_mut(activations: &mut Activations) -> Result<&mut Self::Activations>;
    fn weight(matrix: &Matrix) -> Result<&Self::Matrix>;
}

macro_rules! member {
    ($backend:ty, $get:ident, $get_mut:ident) => {
        impl Member for $backend {
            fn f32(buffer: &Buffer) -> Result<&Self::Buffer> {
                buffer.$get()
            }
            fn f32_mut(buffer: &mut Buffer) -> Result<&mut Self::Buffer> {
                buffer.$get_mut()
            }
            fn act(activations: &Activations) -> Result<&Self::Activations> {
                activations.$get()
            }
            fn act_mut(activations: &mut Activations) -> Result<&mut Self::Activations> {
                activations.$get_mut()
            }
            fn weight(matrix: &Matrix) -> Result<&Self::Matrix> {
                matrix.$get()
            }
        }
    };
}

member!(Cpu, cpu, cpu_mut);
#[cfg(feature = "cuda")]
member!(Cuda<Gpu>, cuda, cuda_mut);
