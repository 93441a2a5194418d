//! The kernels against their f64 reference.
