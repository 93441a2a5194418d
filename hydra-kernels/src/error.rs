//! What a caller can get wrong. Each error says what was wanted; whoever returns one has written nothing.

use core::fmt;

/// A refused call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A slice has the wrong (or too small a) number of elements.
    Length {
        /// The argument's name.
        operand: &'static str,
        /// Elements needed.
        want: usize,
        /// Elements given.
        got: usize,
    },
    /// The workspace is smaller than the operation's `_scratch` twin says.
    Workspace {
        /// Floats needed.
        want: usize,
        /// Floats given.
        got: usize,
    },
    /// A row's length or a first column is not a multiple of the format's block.
    Block {
        /// The argument's name.
        operand: &'static str,
        /// The block's length in elements.
        block: usize,
        /// What was given.
        got: usize,
    },
    /// An index or a range ends beyond what there is.
    Range {
        /// The argument's name.
        operand: &'static str,
        /// What there is.
        limit: usize,
        /// What was asked for.
        got: usize,
    },
    /// A size doesn't fit in `usize`.
    Overflow,
    /// A shape that means nothing; the text says why.
    Shape(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Length { operand, want, got } => {
                write!(f, "{operand}: {got} elements where {want} are needed")
            }
            Error::Workspace { want, got } => {
                write!(f, "workspace of {got} floats where {want} are needed")
            }
            Error::Block { operand, block, got } => {
                write!(f, "{operand}: {got} is not a multiple of the block of {block}")
            }
            Error::Range { operand, limit, got } => {
                write!(f, "{operand}: {got} is beyond {limit}")
            }
            Error::Overflow => write!(f, "a size overflows the address space"),
            Error::Shape(why) => write!(f, "shape: {why}"),
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

/// Elements from the first to the last of `rows` rows of `cols`, `stride` apart.
pub(crate) fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<usize, Error> {
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    let last_row = product(rows - 1, row_stride)?;
    let last_col = product(cols - 1, col_stride)?;
    last_row.checked_add(last_col).and_then(|last| last.checked_add(1)).ok_or(Error::Overflow)
}
