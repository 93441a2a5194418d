//! HydraLoRA kernels.
#![no_std]
