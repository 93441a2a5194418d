//! y = W x against an f64 sum over the decoded row, for every format, instruction set and row order, at boundary sizes.

use crate::support::{assert_within, bits, dot, isas, tolerance, values};
use hydra_kernels::{Error, Format, Isa, RowOrder, Weight, matvec, matvec_batch};

fn product(isa: Isa, weight: Weight<'_>, first: usize, rows: usize, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; rows];
    matvec(isa, &mut y, weight, first, x).unwrap();
    y
}

fn check(isa: Isa, weight: Weight<'_>, x: &[f32], y: &[f32]) {
    let mut decoded = vec![0.0; weight.cols()];
    for (row, &got) in y.iter().enumerate() {
        weight.decode_row(Isa::Portable, row, 0, &mut decoded);
        let (want, size) = dot(decoded.iter().zip(x).map(|(&w, &x)| (f64::from(w), f64::from(x))));
        let what = || format!("{:?} {isa:?} row {row} of {} columns", weight.format(), x.len());
        assert_within(what, got, want, tolerance::product(x.len()) * size);
    }
}

#[test]
fn every_format_at_boundary_sizes() {
    for format in Format::ALL {
        let block = format.block_len();
        let cols: Vec<usize> = match block {
            1 => vec![0, 1, 3, 15, 16, 17, 31, 33, 64, 100],
            _ => vec![0, block, 2 * block, 3 * block, 9 * block],
        };
        for cols in cols {
            for rows in [0, 1, 2, 3, 4, 5, 7, 8, 9, 13] {
                // At an odd address.
                let mut data = vec![0u8];
                data.extend(crate::quant::blocks(format, rows * cols / block));
                let weight = Weight::new(format, rows, cols, &data[1..], RowOrder::Natural).unwrap();
                let x = values(cols, 11);
                for isa in isas() {
                    let y = product(isa, weight, 0, rows, &x);
                    check(isa, weight, &x, &y);
                    // The same bits however the rows are cut.
                    for cut in 0..=rows {
                        let pieces = [product(isa, weight, 0, cut, &x), product(isa, weight, cut, rows - cut, &x)];
                        assert_eq!(bits(&pieces.concat()), bits(&y), "{format:?} {isa:?} {rows}x{cols} cut at {cut}");
                    }
                }
            }
        }
    }
}

/// Several tokens: the bits of one at a time, however many there are and however the rows are cut.
#[test]
fn a_batch_is_one_token_at_a_time() {
    for format in Format::ALL {
        let block = format.block_len();
        for (rows, blocks) in [(0, 1), (1, 3), (4, 1), (7, 2), (9, 9)] {
            let cols = if block == 1 { 11 * blocks } else { block * blocks };
            let data = crate::quant::blocks(format, rows * cols / block);
            let weight = Weight::new(format, rows, cols, &data, RowOrder::Natural).unwrap();
            for tokens in [0, 1, 2, 3, 4, 5, 8, 11] {
                let x = values(tokens * cols, 14);
                for isa in isas() {
                    let wanted: Vec<Vec<f32>> = x.chunks(cols).map(|x| product(isa, weight, 0, rows, x)).collect();
                    for first in [0, rows / 2] {
                        let mut y = vec![f32::NAN; tokens * (rows - first)];
                        matvec_batch(isa, &mut y, tokens, weight, first, &x).unwrap();
                        let wanted: Vec<f32> = wanted.iter().flat_map(|y| &y[first..]).copied().collect();
                        assert_eq!(bits(&y), bits(&wanted), "{format:?} {isa:?} {rows}x{cols}, {tokens} tokens");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_in_another_order() {
    for format in Format::ALL {
        let (rows, cols) = (18, 2 * format.block_len().max(9));
        let data = crate::quant::blocks(format, rows * cols / format.block_len());
        let weight = Weight::new(format, rows, cols, &data, RowOrder::Interleaved { head_dim: 6 }).unwrap();
        let x = values(cols, 12);
        for isa in isas() {
            let y = product(isa, weight, 0, rows, &x);
            check(isa, weight, &x, &y);
            assert_eq!(bits(&product(isa, weight, 3, 9, &x)), bits(&y[3..12]), "{format:?} {isa:?}");
        }
    }
}

/// Some columns of a matrix: the bits of a matrix that has only those.
#[test]
fn columns_of_a_matrix() {
    for format in Format::ALL {
        let block = format.block_len();
        let (rows, cols, range) = if block == 1 { (9, 70, 3..37) } else { (9, 5 * block, block..4 * block) };
        let data = crate::quant::blocks(format, rows * cols / block);
        let whole = Weight::new(format, rows, cols, &data, RowOrder::Natural).unwrap();
        let some = whole.slice_columns(range.start, range.len()).unwrap();
        assert_eq!((some.rows(), some.cols()), (rows, range.len()));
        let stride = format.row_bytes(cols).unwrap();
        let bytes = |columns: usize| format.row_bytes(columns).unwrap();
        let packed: Vec<u8> =
            data.chunks(stride).flat_map(|row| &row[bytes(range.start)..bytes(range.end)]).copied().collect();
        let packed = Weight::new(format, rows, range.len(), &packed, RowOrder::Natural).unwrap();
        let x = values(range.len(), 13);
        for isa in isas() {
            assert_eq!(bits(&product(isa, some, 0, rows, &x)), bits(&product(isa, packed, 0, rows, &x)), "{format:?}");
            let (first, rows) = (2, 5);
            let few = some.slice_rows(first, rows).unwrap();
            assert_eq!(bits(&product(isa, few, 0, rows, &x)), bits(&product(isa, packed, first, rows, &x)));
        }
        assert_eq!(some.slice_columns(0, 0).unwrap().stored(8), &[0u8; 0]);
        let beyond = some.slice_columns(0, range.len() + 1).unwrap_err();
        assert_eq!(beyond, Error::Range { operand: "columns", limit: range.len(), got: range.len() + 1 });
        if block > 1 {
            let cut = whole.slice_columns(0, block - 1).unwrap_err();
            assert_eq!(cut, Error::Block { operand: "columns", block, got: block - 1 });
        }
    }
}

/// An x with a single 1 selects a weight, which must be the decoded one to the bit.
#[test]
fn single_weights_are_the_decoded_ones() {
    for format in Format::ALL {
        let cols = 3 * format.block_len().max(11);
        let data = crate::quant::blocks(format, cols / format.block_len());
        let weight = Weight::new(format, 1, cols, &data, RowOrder::Natural).unwrap();
        let mut want = vec![0.0; cols];
        weight.decode_row(Isa::Portable, 0, 0, &mut want);
        for isa in isas() {
            for (column, &want) in want.iter().enumerate() {
                let mut x = vec![0.0; cols];
                x[column] = 1.0;
                assert_eq!(product(isa, weight, 0, 1, &x), [want], "{format:?} {isa:?} column {column}");
            }
        }
    }
}

#[test]
fn errors_write_nothing() {
    let data = crate::quant::blocks(Format::Q4_1, 8);
    let weight = Weight::new(Format::Q4_1, 4, 64, &data, RowOrder::Natural).unwrap();
    let x = values(64, 13);
    for isa in isas() {
        let mut y = [7.0; 3];
        assert!(matvec(isa, &mut y, weight, 2, &x).is_err());
        assert!(matvec(isa, &mut y, weight, usize::MAX, &x).is_err());
        assert!(matvec(isa, &mut y, weight, 0, &x[1..]).is_err());
        assert!(matvec_batch(isa, &mut y, 1, weight, 2, &x).is_err());
        assert!(matvec_batch(isa, &mut y, 3, weight, 4, &[x.clone(), x.clone(), x.clone()].concat()).is_err());
        assert!(matvec_batch(isa, &mut y, 3, weight, 0, &x).is_err());
        assert!(matvec_batch(isa, &mut y, 2, weight, 0, &[x.clone(), x.clone()].concat()).is_err());
        assert!(matvec_batch(isa, &mut y, 0, weight, 0, &[]).is_err());
        assert_eq!(y, [7.0; 3]);
    }
}
