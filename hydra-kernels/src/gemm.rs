//! Products of matrices, in BLIS's terms: A in place, B from packed panels, sums in f32.
//!
//! ```text
//! C = Σ_t A_t · B_t     C [m, n] row-major, A_t [m, k_t] at any strides, B_t [k_t, n] packed by `pack`
//! ```
//!
//! **Panels.** [`pack`] stores NR columns of B together, zero-padded: f32 as `[n/NR][k][NR]`, bf16 as
//! `[n/NR][k/2][NR][2]` with neighbours along k adjacent, which is the operand of VDPBF16PS and, in sixteen columns, an
//! AMX tile. It decodes frozen weights on the way.
//!
//! **Blocking.** The driver cuts k into equal blocks of at most KC, so that a micro-panel of A (MR × KC, copied to the
//! stack) stays in L1, and n into groups of panels that stay in L2 while all micro-panels of A pass over them. A short
//! second term (an adapter's) joins the last block of the first, in the same registers. A bf16 result is rounded tile
//! by tile, once its last block has been added.
//!
//! **Order of summation.** An element of C is the sum over terms and blocks in order, and each block is summed in order
//! of k. For a given instruction set it does not depend on m, on n, or on how a caller cuts C into rows and columns.
//!
//! ```
//! use hydra_kernels::{Accumulate, Isa, MatRef, Panels, Source, Term, Values, gemm, pack, panels_len};
//!
//! // C [2, 3] = A [2, 4] · B [4, 3]
//! let (isa, a, b, mut c) = (Isa::detect(), [1.0f32; 2 * 4], [0.5f32; 4 * 3], [0.0f32; 2 * 3]);
//! let mut panels = vec![0.0f32; panels_len::<f32>(isa, 4, 3)];
//! pack(isa, &mut panels, 4, 3, Source::Dense { data: Values::F32(&b), k_stride: 3, n_stride: 1 }, 1.0)?;
//! let term = Term { a: MatRef::row_major(&a[..], 4), b: Panels::new(&panels[..], 4, 3) };
//! gemm(isa, &mut c[..], 3, 2, 3, Accumulate::Overwrite, &[term])?;
//! assert_eq!(c, [2.0; 6]);
//! # Ok::<(), hydra_kernels::Error>(())
//! ```

mod bf16;
mod blocking;
mod checked;
mod driver;
mod element;
mod kernel;
mod pack;
mod panels;
mod view;

pub use bf16::{Float, to_bf16};
pub use blocking::{K_ALIGN, PANEL_ALIGN, panels_bound};
pub use checked::{BF16_TERMS, gemm};
pub use element::{Element, panels_len};
pub use pack::{Source, pack};
pub use view::{Accumulate, MatRef, Panels, Term, Values, ValuesMut};
