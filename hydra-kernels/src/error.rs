//! Errors of this crate: arguments that do not fit. A function that returns one has written nothing.

use core::fmt;

/// Why a call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A slice is too short, or has another length than the shape asks for.
    Length {
        /// The argument's name.
        operand: &'static str,
        /// Elements expected.
        want: usize,
        /// Elements found.
        got: usize,
    },
    /// The workspace is smaller than the operation's `_scratch` function says.
    Workspace {
        /// Floats expected.
        want: usize,
        /// Floats found.
        got: usize,
    },
    /// A size or a first column is not a multiple of a block.
    Block {
        /// The argument's name.
        operand: &'static str,
        /// The length of the block, in elements.
        block: usize,
        /// The value found.
        got: usize,
    },
    /// A count, an index or the end of a range exceeds its limit.
    Range {
        /// The argument's name.
        operand: &'static str,
        /// The largest allowed value.
        limit: usize,
        /// The value found.
        got: usize,
    },
    /// A size does not fit in `usize`.
    Overflow,
    /// A shape that is not valid, and why.
    Shape(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Length { operand, want, got } => {
                write!(f, "{operand}: wrong number of elements: expected {want}, found {got}")
            }
            Error::Workspace { want, got } => {
                write!(f, "workspace is too small: expected {want} floats, found {got}")
            }
            Error::Block { operand, block, got } => {
                write!(f, "{operand}: expected a multiple of {block}, found {got}")
            }
            Error::Range { operand, limit, got } => {
                write!(f, "{operand} out of range: expected at most {limit}, found {got}")
            }
            Error::Overflow => write!(f, "a size overflows the address space"),
            Error::Shape(why) => write!(f, "invalid shape: {why}"),
        }
    }
}

impl core::error::Error for Error {}

/// `Ok` if `got` is exactly `want`.
pub(crate) fn exact(operand: &'static str, want: usize, got: usize) -> Result<(), Error> {
    if want == got { Ok(()) } else { Err(Error::Length { operand, want, got }) }
}

/// `Ok` if `got` is at least `want`.
pub(crate) fn at_least(operand: &'static str, want: usize, got: usize) -> Result<(), Error> {
    if want <= got { Ok(()) } else { Err(Error::Length { operand, want, got }) }
}

/// `a · b`, or [`Error::Overflow`].
pub(crate) fn product(a: usize, b: usize) -> Result<usize, Error> {
    a.checked_mul(b).ok_or(Error::Overflow)
}

/// The length of a slice that holds a strided matrix [rows, cols], or [`Error::Overflow`].
pub(crate) fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<usize, Error> {
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    let last_row = product(rows - 1, row_stride)?;
    let last_col = product(cols - 1, col_stride)?;
    last_row.checked_add(last_col).and_then(|last| last.checked_add(1)).ok_or(Error::Overflow)
}
