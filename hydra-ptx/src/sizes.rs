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

/// Columns of x or dy in a block of the adapter's gradients: 64 for each warp.
pub const WIDE: u32 = 256;
/// Threads of such a block.
pub const WIDE_THREADS: u32 = 128;
/// Tokens of a tile.
pub const WIDE_TOKENS: u32 = 32;
/// Tiles in shared memory at once.
pub const WIDE_STAGES: u32 = 4;
/// Bytes of a tile.
pub const WIDE_TILE_BYTES: u32 = WIDE_TOKENS * WIDE * 2;
/// Columns of the narrow operand in a block.
pub const NARROW: u32 = 32;
/// Bytes of its tile.
pub const NARROW_TILE_BYTES: u32 = WIDE_TOKENS * NARROW * 2;
/// Blocks wanted: the sum over tokens is cut into groups, so that there are about two blocks for each multiprocessor of
/// large devices. The same on all devices, so that sums have the same order everywhere.
pub const WIDE_BLOCKS: u32 = 264;
/// Tokens of a group at least: with fewer than 64, a block would write more than it reads.
pub const GROUP_TOKENS: u32 = 160;
/// Where warps exchange sums over columns: behind the stages and two tiles of `mixed`.
pub const WIDE_EXCHANGE: u32 = WIDE_STAGES * WIDE_TILE_BYTES + 2 * NARROW_TILE_BYTES;
/// Bytes that they exchange for a tile: a half of its sums.
pub const WIDE_EXCHANGE_BYTES: u32 = WIDE_TOKENS * NARROW * 4;
/// Shared memory of dy's products.
pub const LORA_UP_BACKWARD_SHARED: u32 = WIDE_EXCHANGE + 2 * WIDE_EXCHANGE_BYTES;
/// Shared memory of a weight gradient: the stages of both operands.
pub const WEIGHT_GRAD_SHARED: u32 = WIDE_STAGES * (WIDE_TILE_BYTES + NARROW_TILE_BYTES);
/// The same with dropout: a tile of x after dropout is added.
pub const WEIGHT_GRAD_DROPPED_SHARED: u32 = WEIGHT_GRAD_SHARED + WIDE_TILE_BYTES;
/// Threads that share a token in the gate's gradient.
pub const GATE_SHARE: u32 = 16;
/// Tokens of its block.
pub const GATE_TOKENS: u32 = THREADS / GATE_SHARE;
/// Floats of its token in shared memory: `adapter_state`, its gradient and d_mixed. An odd number, so that tokens start
/// in different banks.
pub const fn gate_backward_row(width: u32, mixed_width: u32) -> u32 {
    (2 * width + mixed_width.next_multiple_of(8)) | 1
}
/// Bytes of its tokens; 0 if they don't fit, and so are in the device's memory.
pub const fn gate_backward_shared(width: u32, mixed_width: u32) -> u32 {
    let bytes = GATE_TOKENS * gate_backward_row(width, mixed_width) * 4;
    if bytes <= MAX_SHARED { bytes } else { 0 }
}
/// Tokens of a block of the adapter's first product: four matrix instructions of 8.
pub const LORA_DOWN_TOKENS: u32 = 32;
/// Rows of [A; R] that it multiplies at once: two matrix instructions of 16.
pub const LORA_DOWN_ROWS: u32 = 32;
/// From a row of sums in shared memory to the next: so padded, a matrix instruction's rows lie in different banks.
pub const LORA_DOWN_PITCH: u32 = LORA_DOWN_TOKENS + 8;
/// Bytes of all warps' sums.
pub const LORA_DOWN_SUMS: u32 = THREADS / 32 * LORA_DOWN_ROWS * LORA_DOWN_PITCH * 4;
/// How often each thread of the blocks behind the product rounds eight values of B. Such a block has a multiprocessor
/// to itself, and with 128 blocks of the product there are few left.
pub const LORA_DOWN_ROUNDED: u32 = 8;
/// Bytes of its tokens' rows of `adapter_state` in shared memory; 0 if they don't fit, and so are in the device's.
pub const fn lora_down_state(width: u32) -> u32 {
    let bytes = LORA_DOWN_TOKENS * (width | 1) * 4;
    if LORA_DOWN_SUMS + bytes <= MAX_SHARED { bytes } else { 0 }
}

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

/// Threads of an attention block.
pub const ATTENTION_THREADS: u32 = 128;
/// Queries of a block of attention and of dq: 32 rows for each warp, so that what a warp reads of the keys serves two
/// products.
pub const ATTENTION_QUERIES: u32 = 128;
/// Keys that the forward pass takes at a time.
pub const ATTENTION_KEYS: u32 = 64;
/// Keys that dq takes at a time: its sums leave registers for two products of 32 x 32.
pub const DQ_KEYS: u32 = 32;
/// Keys of a block of dk and dv: 32 for each pair of warps.
pub const DKV_KEYS: u32 = 64;
/// Queries that dk and dv take at a time.
pub const DKV_QUERIES: u32 = 32;
/// Shared memory of the forward pass, by padded head width: q; k and v twice; the block's four numbers.
pub const fn attention_shared(width: u32) -> u32 {
    (ATTENTION_QUERIES + 4 * ATTENTION_KEYS) * width * 2 + 16
}
/// Shared memory of dq: q and d o; k and v twice; the block's four numbers.
pub const fn attention_dq_shared(width: u32) -> u32 {
    (2 * ATTENTION_QUERIES + 4 * DQ_KEYS) * width * 2 + 16
}
/// Shared memory of dk and dv: k and v; q, d o, lse and delta of a block of queries, three times; probabilities twice;
/// the block's numbers.
pub const fn attention_dkv_shared(width: u32) -> u32 {
    2 * (DKV_KEYS + 3 * DKV_QUERIES) * width * 2 + 3 * 2 * DKV_QUERIES * 4 + 2 * DKV_KEYS * DKV_QUERIES * 4 + 32
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
