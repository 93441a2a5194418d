//! Numbers on which kernels and launches agree: the kernels' crate (`hydra-ptx/device`) includes this file.

/// Threads of a block, unless a kernel says otherwise.
pub const THREADS: u32 = 256;

/// Shared memory of a reduction over a block: one f32 for each warp.
pub const REDUCE_SHARED: u32 = 4 * 32;

/// Rows and columns of a matrix product's tile: 8 warps of 64 x 32, 64 accumulators a thread.
pub const GEMM_M: u32 = 128;
/// See [`GEMM_M`].
pub const GEMM_N: u32 = 128;
/// Depth of a tile: one block of a quantised weight.
pub const GEMM_K: u32 = 32;
/// Tiles in shared memory at once: 3 x 16 KiB, which a block has without asking for more.
pub const GEMM_STAGES: u32 = 3;
/// Rows of tiles in a group of blocks that run at the same time; with about as many columns, their operands stay in L2.
pub const GEMM_GROUP: u32 = 8;
/// Padding, in f32, of a row of C that is staged in shared memory.
pub const STAGE_PADDING: u32 = 8;
/// Bytes of one operand's tile.
pub const GEMM_TILE_BYTES: u32 = GEMM_M * GEMM_K * 2;
/// Shared memory of a matrix product.
pub const GEMM_SHARED: u32 = GEMM_STAGES * 2 * GEMM_TILE_BYTES;

/// Rows and columns of a tile of Hopper's matrix product: two warpgroups of 64 x 256, 128 accumulators a thread.
pub const WGMMA_M: u32 = 128;
/// See [`WGMMA_M`].
pub const WGMMA_N: u32 = 256;
/// Depth of its operands' tiles: 128 bytes.
pub const WGMMA_K: u32 = 64;
/// Tiles of both operands in shared memory at once.
pub const WGMMA_STAGES: u32 = 4;
/// Bytes of A's tile.
pub const WGMMA_A_BYTES: u32 = WGMMA_M * WGMMA_K * 2;
/// Bytes of both.
pub const WGMMA_STAGE_BYTES: u32 = WGMMA_A_BYTES + WGMMA_N * WGMMA_K * 2;
/// Shared memory of such a product: 192 KiB of the 227 that a block can have.
pub const WGMMA_SHARED: u32 = WGMMA_STAGES * WGMMA_STAGE_BYTES;
/// With fewer tiles, so many of an H100's 132 multiprocessors are idle that the smaller tiles of `mma.sync` are faster.
pub const WGMMA_MIN_TILES: u32 = 66;

/// From this number of tokens on, a quantised matrix is decoded to bf16 before it is multiplied. That takes an H100 as
/// long as multiplying 256 tokens; decoded inside the product, the matrix is decoded again for each 128 tokens.
pub const DECODED_TOKENS: u32 = 512;

/// Rows and columns of a skinny product's tile: 8 warps of 16 x 8.
pub const SKINNY: u32 = 32;
/// Its depth.
pub const SKINNY_DEPTH: u32 = 128;
/// Tiles of both operands in shared memory at once.
pub const SKINNY_STAGES: u32 = 4;
/// Bytes of one operand's tile.
pub const SKINNY_TILE_BYTES: u32 = SKINNY * SKINNY_DEPTH * 2;
/// Blocks of a weight gradient at least: where it has fewer tiles, its sum over tokens is cut into parts. About the
/// number of multiprocessors of large devices; the same on all devices, so that sums have the same order everywhere.
pub const WEIGHT_GRAD_BLOCKS: u32 = 132;
/// Shared memory of a skinny product: the stages.
pub const SKINNY_SHARED: u32 = SKINNY_STAGES * 2 * SKINNY_TILE_BYTES;
/// The same with dropout: two tiles of x after dropout are added.
pub const SKINNY_DROPPED_SHARED: u32 = SKINNY_SHARED + 2 * SKINNY_TILE_BYTES;

/// Tokens that one warp of a matrix-vector product multiplies at once.
pub const MATVEC_TOKENS: u32 = 4;

/// Rows of [A; R] that the adapter's matrix-vector product multiplies at once.
pub const LORA_MATVEC_ROWS: u32 = 4;
/// Bytes of shared memory that a block can ask for on every device of compute capability 8.0 or later.
pub const MAX_SHARED: u32 = 99 * 1024;
/// Shared memory of the adapter's matrix-vector product: a partial sum for each row and warp.
pub const fn lora_matvec_shared(rows: u32) -> u32 {
    rows * (THREADS / 32) * 4
}

/// Tokens of a block that adds the part of dx that went through dropout.
pub const DROPPED_TOKENS: u32 = 8;

/// Queries and keys of an attention tile: 16 rows for each warp.
pub const ATTENTION_TILE: u32 = 64;
/// Threads of an attention block.
pub const ATTENTION_THREADS: u32 = 128;
/// Queries of a tile where the backward pass loops over queries.
pub const BACKWARD_QUERIES: u32 = 32;
/// Shared memory of the forward pass, by padded head width: q; k and v twice.
pub const fn attention_shared(width: u32) -> u32 {
    5 * ATTENTION_TILE * width * 2
}
/// Shared memory of dq: q and d o; k and v twice.
pub const fn attention_dq_shared(width: u32) -> u32 {
    6 * ATTENTION_TILE * width * 2
}
/// Shared memory of dk and dv: k and v; q, d o, lse and delta of a tile of queries, twice.
pub const fn attention_dkv_shared(width: u32) -> u32 {
    2 * (ATTENTION_TILE + 2 * BACKWARD_QUERIES) * width * 2 + 4 * BACKWARD_QUERIES * 4
}

/// Values that one block of a sum of squares adds.
pub const SQUARES_PER_BLOCK: u32 = 16 * 1024;
/// Shared memory of a sum of squares: one f64 for each thread.
pub const SQUARES_SHARED: u32 = THREADS * 8;

/// Gate: a softmax over the router's logits.
pub const GATE_ROUTER: u32 = 0;
/// Gate: one-hot by the token's label; uniform where the label is no head.
pub const GATE_LABEL: u32 = 1;
/// Gate: 1 / lora_heads.
pub const GATE_UNIFORM: u32 = 2;
/// Gate: 1.
pub const GATE_ONE: u32 = 3;

/// Format: bf16, rows padded to a multiple of 8.
pub const FORMAT_BF16: u32 = 0;
/// Format: 32 x 8 bits, then all scales (f16).
pub const FORMAT_Q8_0: u32 = 1;
/// Format: 32 x 4 bits, then all scales (f16).
pub const FORMAT_Q4_0: u32 = 2;
/// Format: 32 x 4 bits, then all scales and minima (2 f16).
pub const FORMAT_Q4_1: u32 = 3;

/// Floats of a row's state in the loss: the largest logit, the sum, the target's logit.
pub const LOSS_STATE: usize = 3;
