//! Products with each form and storage, with and without a second product, at sizes around the tiles'.

use crate::support::*;
use hydra_kernels::reference;
use hydra_ptx::launch::{
    Form, Format, Instructions, Launch, Matrix, MatrixRows, Operand, Output, Product, Ptr, SecondMatvec, SecondProduct,
    Values, decode, gemm, matvec, operand as operand_launch, padded,
};
use hydra_ptx_device::emulator::Global;
use proptest::prelude::*;

/// A random matrix as it is stored on the device, and its exact values.
struct Stored {
    data: Global<u8>,
    scales: Global<u8>,
    values: Vec<f64>,
}

impl Stored {
    /// Quants are random bits; scales are f16 of moderate size.
    fn new(format: Format, rows: usize, columns: usize, random: &mut Random) -> Self {
        if format == Format::Bf16 {
            let values = random.values(rows * columns);
            let bytes: Vec<u8> = operand(&values, columns).iter().flat_map(|x| x.to_le_bytes()).collect();
            return Self { data: Global::new(&bytes), scales: Global::new(&[]), values: f64s(&rounded(&values)) };
        }
        let (bits, pair) = match format {
            Format::Q8_0 => (8, false),
            Format::Q4_0 => (4, false),
            _ => (4, true),
        };
        let (mut data, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rows * columns / 32 {
            let quants: Vec<u8> = (0..4 * bits).map(|_| random.bits() as u8).collect();
            let d = half::f16::from_f32(random.value() / 16.0);
            let m = half::f16::from_f32(random.value());
            scales.extend(d.to_le_bytes());
            if pair {
                scales.extend(m.to_le_bytes());
            }
            for i in 0..32 {
                let nibble = quants[i % 16] >> (i / 16 * 4) & 15;
                values.push(f64::from(match format {
                    Format::Q8_0 => f32::from(quants[i] as i8) * d.to_f32(),
                    Format::Q4_0 => (f32::from(nibble) - 8.0) * d.to_f32(),
                    _ => f32::from(nibble) * d.to_f32() + m.to_f32(),
                }));
            }
            data.extend(quants);
        }
        Self { data: Global::new(&data), scales: Global::new(&scales), values }
    }

    fn matrix(&self, format: Format, rows: usize, columns: usize) -> Matrix {
        let (data, scales, rows, columns) = (ptr(&self.data), ptr(&self.scales), rows as u32, columns as u32);
        let pitch = if format == Format::Bf16 { padded(columns) } else { columns };
        Matrix { format, data, scales, rows, columns, pitch, room: 0 }
    }
}

/// C before and after a product: f32, or bf16.
struct C {
    f32s: Global<f32>,
    bf16s: Global<u16>,
    bf16: bool,
}

impl C {
    fn new(values: &[f32], bf16: bool) -> Self {
        Self { f32s: Global::new(values), bf16s: Global::new(&operand(values, 8)), bf16 }
    }

    fn at(&self) -> Values {
        Values { at: if self.bf16 { ptr(&self.bf16s) } else { ptr(&self.f32s) }, bf16: self.bf16 }
    }

    /// Compares with `want` to `tolerance`, and for bf16 to the result's own rounding.
    #[track_caller]
    fn assert_close(&self, what: &str, want: &[f64], tolerance: f64) {
        if !self.bf16 {
            return assert_close(what, self.f32s.values(), want, tolerance);
        }
        let widen = |&bits: &u16| half::bf16::from_bits(bits).to_f32();
        let values: Vec<f32> = self.bf16s.values()[..want.len()].iter().map(widen).collect();
        assert_close(what, &values, want, tolerance + 4e-3);
    }
}

/// A product's storage, form and sizes.
#[derive(Clone, Copy, Debug)]
struct Case {
    format: Format,
    form: Form,
    m: usize,
    /// Rows of the frozen matrix.
    rows: usize,
    /// Its columns.
    columns: usize,
    /// Columns of the second product; 0 for none.
    k2: usize,
    /// Whether something is added to the products.
    adds: bool,
    seed: u64,
}

/// With `mma.sync` and, for bf16, with `wgmma`: from the source, and as the compiler translated it.
fn check_gemm(case: Case) {
    check_gemm_by(run, Instructions::Mma, case);
    if case.format == Format::Bf16 {
        check_gemm_by(run, Instructions::Wgmma, case);
        check_gemm_by(run_compiled, Instructions::Wgmma, case);
    }
}

fn check_gemm_by(run: fn(Launch, u64), by: Instructions, case: Case) {
    let Case { format, form, m, rows, columns, k2, adds, seed } = case;
    let mut random = Random::new(seed);
    let stored = Stored::new(format, rows, columns, &mut random);
    let (n, k) = if form == Form::Rows { (rows, columns) } else { (columns, rows) };
    let a_values = random.values(m * k);
    let (a2, b2, addend) = (random.values(m * k2), random.values(n * k2), random.values(m * n));
    let device_a = Global::new(&operand(&a_values, k));
    let device_a2 = Global::new(&operand(&a2, k2));
    let device_b2 = Global::new(&operand(&b2, if form == Form::Rows { k2 } else { n }));
    let bf16 = seed % 2 == 1;
    let addend = if bf16 { rounded(&addend) } else { addend };
    // What is added is C itself, or another matrix, and then C holds NaN.
    let (residual, in_place) = (C::new(&addend, bf16), adds && !seed.is_multiple_of(3));
    let new_c = || if in_place { C::new(&addend, bf16) } else { C::new(&vec![f32::NAN; m * n], bf16) };
    let added_to = |c: &C| match (adds, in_place) {
        (false, _) => Ptr::NULL,
        (true, true) => c.at().at,
        (true, false) => residual.at().at,
    };
    let placed = |at, rows: usize, columns: usize| Operand::new(at, rows as u32, columns as u32);
    let (b2_rows, b2_columns) = if form == Form::Rows { (n, k2) } else { (k2, n) };
    let second = (k2 > 0).then_some(SecondProduct {
        a: placed(ptr(&device_a2), m, k2),
        b: placed(ptr(&device_b2), b2_rows, b2_columns),
    });
    let (w, c) = (stored.matrix(format, rows, columns), new_c());
    let a = placed(ptr(&device_a), m, k);
    let product = Product { c: c.at(), c_pitch: n as u32, addend: added_to(&c), form, a, w: &w, second };
    run(gemm(by, &product), seed);
    // The same in two launches, of which the first never uses Hopper's instructions.
    let parts = new_c();
    Product { c: parts.at(), addend: added_to(&parts), ..product }.apart(|first, frozen| {
        assert_eq!(first.is_some(), k2 > 0);
        first.into_iter().for_each(|launch| crate::support::run(launch, seed));
        run(gemm(by, &frozen), seed);
    });

    let mut want = if adds { f64s(&addend) } else { vec![0.0; m * n] };
    let (a, a2, b2) = (f64s(&rounded(&a_values)), f64s(&rounded(&a2)), f64s(&rounded(&b2)));
    // A block's values are rounded to bf16 for the product.
    let weights = f64s(&rounded(&stored.values.iter().map(|&value| value as f32).collect::<Vec<_>>()));
    let weight = |p: usize, j: usize| weights[if form == Form::Rows { j * columns + p } else { p * columns + j }];
    reference::gemm(&mut want, m, k, n, |i, p| a[i * k + p], weight);
    let right = |p: usize, j: usize| b2[if form == Form::Rows { j * k2 + p } else { p * n + j }];
    reference::gemm(&mut want, m, k2, n, |i, p| a2[i * k2 + p], right);
    let what = format!("{by:?} {case:?}");
    c.assert_close(&what, &want, 1e-5);
    // The result of the first launch is rounded, too.
    parts.assert_close(&format!("{what}, apart"), &want, if bf16 { 4e-3 } else { 1e-5 });
}

/// Writes rows of `columns` values to the beginnings of rows of `pitch`.
fn place(to: &mut [u16], pitch: usize, rows: &[u16], columns: usize) {
    for (to, row) in to.chunks_mut(pitch).zip(rows.chunks(columns)) {
        to[..columns].copy_from_slice(row);
    }
}

/// Both pairs of operands in the same memory, C with room behind its rows: in one product of four matrices, and in one
/// of two.
#[test]
fn operands_that_lie_together() {
    for (form, [m, rows, columns, k2], seed) in
        [(Form::Rows, [70, 40, 50, 12], 1), (Form::Columns, [70, 45, 50, 5], 2), (Form::Columns, [33, 64, 56, 16], 3)]
    {
        let mut random = Random::new(seed);
        let (n, k) = if form == Form::Rows { (rows, columns) } else { (columns, rows) };
        let mut values = |len: usize| rounded(&random.values(len));
        let (a, a2, w, b2) = (values(m * k), values(m * k2), values(rows * columns), values(n * k2));
        let up = |x: usize| x.next_multiple_of(8);
        // What nobody may read is NaN.
        let a_pitch = up(k) + up(k2) + 8;
        let mut all_a = vec![0x7fc0u16; m * a_pitch];
        place(&mut all_a, a_pitch, &operand(&a, k), up(k));
        place(&mut all_a[up(k)..], a_pitch, &operand(&a2, k2), up(k2));
        let w_pitch = up(columns) + up(k2) + 16;
        let mut all_w = vec![0x7fc0u16; (up(rows) + up(k2)) * w_pitch];
        place(&mut all_w, w_pitch, &operand(&w, columns), up(columns));
        // Rows that pad W are zero.
        place(&mut all_w[rows * w_pitch..], w_pitch, &vec![0; (up(rows) - rows) * up(columns)], up(columns));
        let (b2_rows, b2_columns) = if form == Form::Rows { (n, k2) } else { (k2, n) };
        let start = if form == Form::Rows { up(columns) } else { up(rows) * w_pitch };
        place(&mut all_w[start..], w_pitch, &operand(&b2, b2_columns), up(b2_columns));
        if form == Form::Columns {
            let zeros = vec![0; (up(k2) - k2) * up(columns)];
            place(&mut all_w[start + k2 * w_pitch..], w_pitch, &zeros, up(columns));
        }
        let (all_a, all_w) = (Global::new(&all_a), Global::new(&all_w));

        let of = |at, rows: usize, columns: usize, pitch: usize| Operand {
            at,
            rows: rows as u32,
            columns: columns as u32,
            pitch: pitch as u32,
        };
        let a_operand = of(ptr(&all_a), m, k, a_pitch);
        let w_matrix = Matrix { room: up(k2) as u32, ..Matrix::bf16(of(ptr(&all_w), rows, columns, w_pitch)) };
        let b2_operand = if form == Form::Rows { w_matrix.behind(k2 as u32) } else { w_matrix.below(b2_rows as u32) };
        let second = SecondProduct { a: a_operand.behind(k2 as u32).unwrap(), b: b2_operand.unwrap() };
        assert_eq!(second.b.at.0, all_w.address() + 2 * start as u64);

        let mut want = vec![0.0; m * n];
        let [a, a2, w, b2] = [a, a2, w, b2].map(|values| f64s(&values));
        let weight = |p: usize, j: usize| w[if form == Form::Rows { j * columns + p } else { p * columns + j }];
        reference::gemm(&mut want, m, k, n, |i, p| a[i * k + p], weight);
        let right = |p: usize, j: usize| b2[if form == Form::Rows { j * k2 + p } else { p * n + j }];
        reference::gemm(&mut want, m, k2, n, |i, p| a2[i * k2 + p], right);
        let c_pitch = n + 3;
        for by in [Instructions::Mma, Instructions::Wgmma] {
            let c = [(); 2].map(|()| Global::new(&vec![7.0f32; m * c_pitch]));
            let product = |c| {
                let c = Values::f32(ptr(c));
                let (c_pitch, second) = (c_pitch as u32, Some(second));
                Product { c, c_pitch, addend: Ptr::NULL, form, a: a_operand, w: &w_matrix, second }
            };
            run(gemm(by, &product(&c[0])), seed);
            product(&c[1]).apart(|first, joined| {
                assert!(first.is_none() && joined.second.is_none());
                run(gemm(by, &joined), seed);
            });
            for c in &c {
                let rows = c.values().chunks(c_pitch);
                let got: Vec<f32> = rows.clone().flat_map(|row| row[..n].to_vec()).collect();
                assert_close(&format!("{by:?} {form:?}"), &got, &want, 1e-5);
                assert!(rows.into_iter().all(|row| row[n..] == [7.0; 3]), "room is written");
            }
        }
        // Where one of the operands lies elsewhere there are two launches.
        let c = Values::f32(ptr(&all_a));
        let elsewhere = SecondProduct { a: Operand::new(ptr(&all_w), m as u32, k2 as u32), ..second };
        let product = Product {
            c,
            c_pitch: n as u32,
            addend: Ptr::NULL,
            form,
            a: a_operand,
            w: &w_matrix,
            second: Some(elsewhere),
        };
        assert!(product.apart(|first, _| first.is_some()));
    }
}

#[test]
fn around_the_tiles() {
    for form in [Form::Rows, Form::Columns] {
        for (i, size) in
            [[1, 1, 1, 0], [127, 129, 33, 1], [128, 128, 32, 8], [129, 63, 257, 12]].into_iter().enumerate()
        {
            let ([m, rows, columns, k2], adds) = (size, i % 2 == 1);
            check_gemm(Case { format: Format::Bf16, form, m, rows, columns, k2, adds, seed: i as u64 });
        }
    }
}

/// More rows of tiles than a group has, and a last group that isn't full.
#[test]
fn every_block_has_its_tile() {
    let (format, seed) = (Format::Bf16, 1);
    let (form, m) = (Form::Rows, 128 * 9 + 5);
    check_gemm(Case { format, form, m, rows: 301, columns: 16, k2: 0, adds: false, seed });
    let (form, m) = (Form::Columns, 128 * 10);
    check_gemm(Case { format, form, m, rows: 16, columns: 300, k2: 3, adds: true, seed });
}

#[test]
fn block_formats() {
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
        for form in [Form::Rows, Form::Columns] {
            check_gemm(Case { format, form, m: 3, rows: 40, columns: 64, k2: 6, adds: true, seed: 5 });
            check_gemm(Case { format, form, m: 130, rows: 131, columns: 160, k2: 0, adds: false, seed: 6 });
            // More tiles along k than there are stages, in both kernels.
            check_gemm(Case { format, form, m: 5, rows: 330, columns: 352, k2: 6, adds: true, seed: 7 });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn random_shapes(
        m in 1usize..150, rows in 1usize..150, blocks in 1usize..5, k2 in 0usize..40, adds: bool,
        format in 0usize..4, columns: bool, ragged in 0usize..32, seed: u64,
    ) {
        let format = Format::ALL[format];
        let form = if columns { Form::Columns } else { Form::Rows };
        let columns = 32 * blocks - if format == Format::Bf16 { ragged } else { 0 };
        check_gemm(Case { format, form, m, rows, columns, k2, adds, seed });
    }

    #[test]
    fn matrix_vector(
        tokens in 1usize..10, rows in 1usize..40, blocks in 1usize..20, ragged in 0usize..32, format in 0usize..4,
        columns2 in 0usize..40, (adds, bf16, some_ids) in any::<(bool, bool, bool)>(), seed: u64,
    ) {
        let (format, mut random) = (Format::ALL[format], Random::new(seed));
        let columns = 32 * blocks - if format == Format::Bf16 { ragged } else { 0 };
        let stored = Stored::new(format, rows, columns, &mut random);
        let x = rounded(&random.values(tokens * columns));
        let ids: Vec<u32> = (0..5).map(|_| random.bits() % rows as u32).collect();
        let wanted = if some_ids { ids.clone() } else { (0..rows as u32).collect() };
        let addend = random.values(tokens * wanted.len());
        let (device_x, device_ids, y) = (Global::new(&operand(&x, columns)), Global::new(&ids), C::new(&addend, bf16));
        let addend = if bf16 { rounded(&addend) } else { addend };
        let added_to = if adds { y.at().at } else { Ptr::NULL };
        let output = Output { y: y.at(), pitch: wanted.len() as u32, addend: added_to };
        let w = stored.matrix(format, rows, columns);
        let used = if some_ids { MatrixRows::Ids { at: ptr(&device_ids), count: 5 } } else { MatrixRows::All };
        let (x2, w2) = (rounded(&random.values(tokens * columns2)), random.values(wanted.len() * columns2));
        let (device_x2, device_w2) = (Global::new(&operand(&x2, columns2)), Global::new(&w2));
        let second = Operand::new(ptr(&device_x2), tokens as u32, columns2 as u32);
        let second = SecondMatvec { x: second, w: ptr(&device_w2) };
        let device_x = Operand::new(ptr(&device_x), tokens as u32, columns as u32);
        run(matvec(output, device_x, &w, used, (columns2 > 0).then_some(second)), seed);
        let (mut want, x) = (vec![0.0; addend.len()], f64s(&x));
        let weight = |p: usize, j: usize| stored.values[wanted[j] as usize * columns + p];
        reference::gemm(&mut want, tokens, columns, wanted.len(), |i, p| x[i * columns + p], weight);
        let (x2, w2) = (f64s(&x2), f64s(&w2));
        let weight = |p: usize, j: usize| w2[j * columns2 + p];
        reference::gemm(&mut want, tokens, columns2, wanted.len(), |i, p| x2[i * columns2 + p], weight);
        if adds {
            want.iter_mut().zip(&addend).for_each(|(want, &addend)| *want += f64::from(addend));
        }
        y.assert_close("matvec", &want, 1e-5);
    }

    #[test]
    fn blocks_decode(
        rows in 1usize..40, blocks in 1usize..20, format in 1usize..4, room in 0usize..3, seed: u64,
    ) {
        let (format, columns) = (Format::ALL[format], 32 * blocks);
        let stored = Stored::new(format, rows, columns, &mut Random::new(seed));
        let want: Vec<f32> = stored.values.iter().map(|&value| value as f32).collect();
        let pitch = columns + 8 * room;
        let out = Global::new(&vec![0x7fc0u16; rows * pitch + 3]);
        let to = Operand { at: ptr(&out), rows: rows as u32, columns: columns as u32, pitch: pitch as u32 };
        run(decode(to, &stored.matrix(format, rows, columns)), seed);
        let mut all = vec![0x7fc0; rows * pitch + 3];
        place(&mut all, pitch, &operand(&want, columns), columns);
        prop_assert_eq!(out.values(), &all, "and nothing else is written");
    }

    #[test]
    fn operands_are_padded(rows in 1usize..20, width in 1usize..70, room in 0usize..3, seed: u64) {
        let x = Random::new(seed).values(rows * width);
        let zeros = seed as usize % rows.min(3);
        let pitch = width.next_multiple_of(8) + 8 * room;
        for bf16 in [false, true] {
            let (mut x, out) = (C::new(&x, bf16), Global::new(&vec![0x7fc0u16; rows * pitch]));
            let to = Operand { at: ptr(&out), rows: rows as u32, columns: width as u32, pitch: pitch as u32 };
            run(operand_launch(to, x.at(), rows as u32 - zeros as u32), seed);
            let mut want = vec![0x7fc0; rows * pitch];
            x.f32s.values_mut()[(rows - zeros) * width..].fill(0.0);
            place(&mut want, pitch, &operand(x.f32s.values(), width), width.next_multiple_of(8));
            prop_assert_eq!(out.values(), &want);
        }
    }
}

#[test]
fn hopper_has_its_own_for_many_tiles() {
    use Instructions::{Mma, Wgmma};
    let w = Matrix::bf16(Operand::new(Ptr(256), 4096, 100));
    let (c, addend, c_pitch) = (Values::f32(Ptr(256)), Ptr::NULL, 4096);
    let best = |by: Instructions, m, form| {
        let a = Operand::new(Ptr(256), m, if form == Form::Rows { 100 } else { 4096 });
        by.best_for(&Product { c, c_pitch, addend, form, a, w: &w, second: None })
    };
    assert_eq!(best(Mma, 4096, Form::Rows), Mma);
    assert_eq!(best(Wgmma, 4096, Form::Rows), Wgmma);
    // 4 x 16 tiles, 5 x 16 and 1 x 1.
    assert_eq!(best(Wgmma, 512, Form::Rows), Mma);
    assert_eq!(best(Wgmma, 513, Form::Rows), Wgmma);
    assert_eq!(best(Wgmma, 100, Form::Columns), Mma);
    let w = Matrix { format: Format::Q8_0, scales: Ptr(256), ..w };
    let a = Operand::new(Ptr(256), 4096, 100);
    let blocks = Product { c, c_pitch, addend, form: Form::Rows, a, w: &w, second: None };
    assert_eq!(Wgmma.best_for(&blocks), Mma);
}

#[test]
fn nothing_to_do() {
    let (a, c) = (Global::new(&[0u16; 8]), C::new(&[1.0; 4], false));
    let w = Matrix::bf16(Operand::new(ptr(&a), 4, 8));
    let (form, addend, a) = (Form::Rows, Ptr::NULL, Operand::new(ptr(&a), 0, 8));
    let product = Product { c: c.at(), c_pitch: 4, addend, form, a, w: &w, second: None };
    for by in [Instructions::Mma, Instructions::Wgmma] {
        assert!(gemm(by, &product).is_empty());
    }
}
