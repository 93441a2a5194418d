//! AMX by emulation: a SIGILL handler executes the instructions, so that a machine with AVX-512 BF16 but without AMX
//! tests the AMX kernels, too.
//!
//! It knows palette 1 and LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED and TDPBF16PS, as
//! Intel's Software Developer's Manual, volume 2, describes them. A configuration or shape that faults on a CPU ends
//! the process.

use hydra_kernels::Bf16Isa;
use hydra_kernels::isa::{AmxBf16, Avx512Bf16};
use std::cell::UnsafeCell;
use std::sync::Once;

/// AMX by emulation, if the machine has AVX-512 BF16 but no AMX.
pub fn emulated() -> Option<Bf16Isa> {
    static INSTALLED: Once = Once::new();
    if AmxBf16::detect().is_some() || Avx512Bf16::detect().is_none() {
        return None;
    }
    INSTALLED.call_once(|| {
        // SAFETY: zeros are a valid `sigaction`; the handler takes what SA_SIGINFO passes.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
        };
        assert_eq!(failed, 0, "sigaction(SIGILL)");
    });
    // SAFETY: AVX-512 BF16 was detected, and the handler does what AMX's instructions do, in every thread.
    Some(Bf16Isa::AmxBf16(unsafe { AmxBf16::new_unchecked() }))
}

const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

/// The tile registers of a thread.
struct Tiles {
    /// The configured rows of each tile; 0 if it is not configured.
    rows: [usize; 8],
    row_bytes: [usize; 8],
    data: [[[u8; ROW_BYTES]; ROWS]; 8],
}

const RELEASED: Tiles = Tiles { rows: [0; 8], row_bytes: [0; 8], data: [[[0; ROW_BYTES]; ROWS]; 8] };

thread_local! {
    // Initialised in a constant and without a destructor, so that the handler's first access allocates nothing.
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(RELEASED) };
}

extern "C" fn handle(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the context of the interrupted thread, which is this one and does nothing else
    // meanwhile.
    let done = TILES.with(|tiles| unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        execute(&mut context.uc_mcontext.gregs, &mut *tiles.get())
    });
    if let Err(what) = done {
        let text = "\nAMX emulation stops at ";
        // SAFETY: each write is of a live string and its length. With SIGILL's default restored, the same instruction
        // then ends the process.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::write(2, what.as_ptr().cast(), what.len());
            libc::write(2, c"\n".as_ptr().cast(), 1);
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        }
    }
}

/// Executes the instruction at which the context stopped, and moves the context past it.
///
/// # Safety
/// The context is that of a thread stopped at an instruction. If that is one of AMX's, its memory operand can be
/// accessed.
unsafe fn execute(registers: &mut [i64; 23], tiles: &mut Tiles) -> Result<(), &'static str> {
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: RIP is at an instruction, and no byte behind it is read: after a three-byte VEX prefix, which is checked first,
    // an opcode and a ModRM byte follow.
    let byte = |i: usize| unsafe { at.add(i).read() };
    // The three-byte VEX prefix, with opcodes of 0F38.
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 {
        return Err("an instruction that is not of AMX");
    }
    let (r, x, b) = (byte(1) & 0x80 == 0, byte(1) & 0x40 == 0, byte(1) & 0x20 == 0);
    let (third, prefix, opcode) = (usize::from(!byte(2) >> 3 & 15), byte(2) & 3, byte(3));
    let (mode, first, second) = (byte(4) >> 6, usize::from(byte(4) >> 3 & 7), usize::from(byte(4) & 7));
    if r {
        return Err("a tile beyond the eighth");
    }
    let general = |number: usize, high: bool| registers[GENERAL[number | usize::from(high) << 3] as usize] as usize;
    let (mut len, mut address, mut stride) = (5, 0usize, 0usize);
    if mode != 3 {
        let mut base = second;
        if second == 4 {
            let sib = byte(5);
            len += 1;
            base = usize::from(sib & 7);
            let index = usize::from(sib >> 3 & 7);
            if index != 4 || x {
                stride = general(index, x) << (sib >> 6);
            }
        }
        if base == 5 && mode == 0 {
            return Err("an address without a base register");
        }
        let offset = match mode {
            0 => 0,
            1 => isize::from(byte(len) as i8),
            // SAFETY: in this mode the instruction has a displacement of four bytes.
            _ => unsafe { at.add(len).cast::<i32>().read_unaligned() as isize },
        };
        len += [0, 1, 4][usize::from(mode)];
        address = general(base, b).wrapping_add_signed(offset);
    }
    match (opcode, prefix, mode) {
        (0x49, 0, 3) => *tiles = RELEASED,
        (0x49, 3, 3) => {
            tiles.configured(first)?;
            tiles.data[first] = RELEASED.data[0];
        }
        (0x49, 0, _) => {
            // SAFETY: LDTILECFG's operand is 64 bytes, which this function's contract lets it read.
            let configuration = unsafe { (address.wrapping_add(stride) as *const [u8; 64]).read() };
            tiles.configure(&configuration)?;
        }
        // TILELOADD, TILELOADDT1 and TILESTORED.
        (0x4b, 1..=3, 0..3) => {
            tiles.configured(first)?;
            let (rows, bytes) = (tiles.rows[first], tiles.row_bytes[first]);
            if prefix != 2 {
                tiles.data[first] = RELEASED.data[0];
            }
            for (row, data) in tiles.data[first][..rows].iter_mut().enumerate() {
                let memory = address.wrapping_add(row * stride) as *mut u8;
                // SAFETY: the configured rows and bytes of the operand, which this function's contract lets it access.
                unsafe {
                    if prefix == 2 {
                        memory.copy_from(data.as_ptr(), bytes);
                    } else {
                        memory.copy_to(data.as_mut_ptr(), bytes);
                    }
                }
            }
        }
        (0x5c, 2, 3) => tiles.multiply(first, second, third)?,
        _ => return Err("an instruction that is not emulated"),
    }
    registers[libc::REG_RIP as usize] += len as i64;
    Ok(())
}

/// General registers by their number in an instruction's encoding.
const GENERAL: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

impl Tiles {
    fn configure(&mut self, bytes: &[u8; 64]) -> Result<(), &'static str> {
        *self = RELEASED;
        // Palette, first row, reserved.
        if bytes[0] != 1 || bytes[1..16].iter().chain(&bytes[32..48]).chain(&bytes[56..]).any(|&byte| byte != 0) {
            return Err("a configuration that is not of palette 1");
        }
        for tile in 0..8 {
            self.rows[tile] = usize::from(bytes[48 + tile]);
            self.row_bytes[tile] = usize::from(u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]));
            if self.rows[tile] > ROWS || self.row_bytes[tile] > ROW_BYTES {
                return Err("a tile larger than palette 1's");
            }
            if (self.rows[tile] == 0) != (self.row_bytes[tile] == 0) {
                return Err("a tile with rows but no columns, or columns but no rows");
            }
        }
        Ok(())
    }

    fn configured(&self, tile: usize) -> Result<(), &'static str> {
        if self.rows[tile] == 0 { Err("a tile that is not configured") } else { Ok(()) }
    }

    /// c += a · b by pairs of bf16, with subnormals as zeros. (A CPU sums even and odd k separately, and adds both at
    /// the end.)
    fn multiply(&mut self, c: usize, a: usize, b: usize) -> Result<(), &'static str> {
        [c, a, b].into_iter().try_for_each(|tile| self.configured(tile))?;
        let (rows, pairs, columns) = (self.rows[c], self.row_bytes[a] / 4, self.row_bytes[c] / 4);
        if c == a
            || c == b
            || a == b
            || rows != self.rows[a]
            || pairs != self.rows[b]
            || columns != self.row_bytes[b] / 4
        {
            return Err("tiles whose shapes do not match");
        }
        let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        let pair = |row: &[u8; ROW_BYTES], at: usize| {
            let half = |i: usize| u32::from(u16::from_le_bytes([row[4 * at + 2 * i], row[4 * at + 2 * i + 1]])) << 16;
            [flush(f32::from_bits(half(0))), flush(f32::from_bits(half(1)))]
        };
        for row in 0..rows {
            let mut sums = [0f32; ROW_BYTES / 4];
            for (column, sum) in sums[..columns].iter_mut().enumerate() {
                let bytes = &self.data[c][row][4 * column..4 * column + 4];
                *sum = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                for k in 0..pairs {
                    let (left, right) = (pair(&self.data[a][row], k), pair(&self.data[b][k], column));
                    *sum = flush(*sum + flush(left[0] * right[0]));
                    *sum = flush(*sum + flush(left[1] * right[1]));
                }
            }
            self.data[c][row] = [0; ROW_BYTES];
            for (bytes, sum) in self.data[c][row].chunks_exact_mut(4).zip(&sums[..columns]) {
                bytes.copy_from_slice(&sum.to_le_bytes());
            }
        }
        Ok(())
    }
}
