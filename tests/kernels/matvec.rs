//! y = W x against an f64 sum over the decoded row: every format, instruction set and row order, at boundary sizes.

use crate::support::{isas, tolerance, values};
use hydra_kernels::{Format, Isa, RowOrder, Weight, matvec};

fn product(isa: Isa, weight: Weight<'_>, first: usize, rows: usize, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; rows];
    matvec(isa, &mut y, weight, first, x).unwrap();
    y
}

#[track_caller]
fn check(isa: Isa, weight: Weight<'_>, x: &[f32], y: &[f32]) {
    let mut decoded = vec![0.0; weight.cols()];
    for (row, &got) in y.iter().enumerate() {
        weight.decode_row(Isa::Portable, row, 0, &mut decoded);
        let terms = decoded.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
        let (want, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        let allowed = tolerance::product(x.len()) * size;
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= allowed,
            "{:?} {isa:?} row {row} of {}: {got} where {want} is right",
            weight.format(),
            x.len()
        );
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
                // at an odd address too
                let mut data = vec![0u8];
                data.extend(crate::quant::blocks(format, rows * cols / block));
                let weight = Weight::new(format, rows, cols, &data[1..], RowOrder::Natural).unwrap();
                let x = values(cols, 11);
                for isa in isas() {
                    let y = product(isa, weight, 0, rows, &x);
                    check(isa, weight, &x, &y);
                    // However the rows are cut, the bits are the same.
                    for cut in 0..=rows {
                        let pieces = [product(isa, weight, 0, cut, &x), product(isa, weight, cut, rows - cut, &x)];
                        let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(&pieces.concat()), bits(&y), "{format:?} {isa:?} {rows}x{cols} cut at {cut}");
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
            check(isa, weight, &x, &product(isa, weight, 0, rows, &x));
        }
    }
}

/// One x that isn't zero picks a weight: it must be the decoded one, to the bit, in each of its columns.
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
fn what_does_not_fit_is_refused() {
    let data = crate::quant::blocks(Format::Q4_1, 8);
    let weight = Weight::new(Format::Q4_1, 4, 64, &data, RowOrder::Natural).unwrap();
    let x = values(64, 13);
    for isa in isas() {
        let mut y = [7.0; 3];
        assert!(matvec(isa, &mut y, weight, 2, &x).is_err());
        assert!(matvec(isa, &mut y, weight, usize::MAX, &x).is_err());
        assert!(matvec(isa, &mut y, weight, 0, &x[1..]).is_err());
        assert_eq!(y, [7.0; 3]);
    }
}
