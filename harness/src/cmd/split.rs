//! `hydra split`: records to train on and records to evaluate on, with the same share of each category.

use crate::data::format::Format;
use crate::data::order::Order;
use crate::data::records::{self, Reading, Record};
use crate::experiment::stage::{raw_records, text_of};
use crate::hub::locate_data;
use crate::interrupt;
use crate::options::{Seed, Share};
use crate::output::{self, text_table};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::atomic::{NewFolder, write_atomically};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Options of `split`.
#[derive(Args)]
#[command(
    after_help = "Each category is drawn from by itself, so that both files have it; a category of one record is for training. Equal \
    lines stay together, so that nothing is evaluated on what was trained on. Both files keep the records' order. The same seed gives \
    the same split. DIR gets train.jsonl and test.jsonl, for --data and --eval-data."
)]
pub struct Arguments {
    /// Records to split, as for finetune; several files must have one format
    #[arg(long, value_name = "FILE", num_args = 1.., required = true, help_heading = "Data")]
    data: Vec<PathBuf>,
    /// Format of the records, where their keys fit several [default: the one that the keys tell]
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Data")]
    data_format: Option<Format>,
    /// Share of each category that goes into test.jsonl
    #[arg(long, value_name = "SHARE", default_value_t = Share::new(0.1), help_heading = "Split")]
    test: Share,
    /// Random seed of the draw
    #[arg(long, value_name = "SEED", default_value_t = Seed::new(41), help_heading = "Split")]
    seed: Seed,
    /// Folder for train.jsonl and test.jsonl; must be new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: PathBuf,
}

/// Splits, and shows how many records of each category went where.
pub fn run(mut arguments: Arguments) -> Result<()> {
    arguments.data = locate_data(&arguments.data)?;
    arguments.data.iter().try_for_each(|path| records::readable_twice(path))?;
    let folder = NewFolder::begin(&arguments.out).context("--out")?;
    interrupt::discard(folder.path())?;
    let records = Reading::new(arguments.data_format).read_all(&arguments.data)?;
    let lines = raw_records(&arguments.data)?;
    if let Some(other) = records.iter().find(|record| record.format != records[0].format) {
        let (expected, found) = (records[0].format, other.format);
        bail!("{}: mixed formats: expected {expected}, as in {}, found {found}", other.place, records[0].place);
    }
    let test = held_out(&records, &lines, arguments.test.get(), arguments.seed.get());
    if !test.contains(&true) {
        let (names, all) = (records::names(&arguments.data), records.len());
        bail!("--data {names}: {all} records, or so few different ones, can't be split");
    }
    for (name, part) in [("train.jsonl", false), ("test.jsonl", true)] {
        let own = lines.iter().zip(&test).filter(|&(_, &test)| test == part);
        let text = text_of(own.map(|(line, _)| line.as_slice()));
        let written = write_atomically(&folder.path().join(name), &text).context("can't write");
        output::named(written, folder.path(), &arguments.out)?;
    }
    folder.keep()?;
    output::print(table(&records, &test))?;
    output::print(format_args!("{}\n", arguments.out.display()))?;
    Ok(())
}

/// Whether each record is held out.
fn held_out(records: &[Record], lines: &[Vec<u8>], share: f64, seed: u64) -> Vec<bool> {
    let mut categories: BTreeMap<Option<&str>, BTreeMap<&[u8], Vec<usize>>> = BTreeMap::new();
    for (i, (record, line)) in records.iter().zip(lines).enumerate() {
        categories.entry(record.category.as_deref()).or_default().entry(line).or_default().push(i);
    }
    let mut test = vec![false; records.len()];
    for equal in categories.into_values() {
        let mut equal: Vec<Vec<usize>> = equal.into_values().collect();
        equal.sort_unstable();
        let all: usize = equal.iter().map(Vec::len).sum();
        let mut room = ((share * all as f64).round() as usize).max(1).min(all - 1);
        for chosen in Order::new(equal.len(), Some(seed)).take(0, equal.len()) {
            if equal[chosen].len() <= room {
                room -= equal[chosen].len();
                equal[chosen].iter().for_each(|&i| test[i] = true);
            }
        }
    }
    test
}

/// Numbers of records, a line per category.
fn table(records: &[Record], test: &[bool]) -> String {
    let mut categories: BTreeMap<&str, [usize; 2]> = BTreeMap::new();
    let mut all = [0; 2];
    for (record, &test) in records.iter().zip(test) {
        all[usize::from(test)] += 1;
        if let Some(category) = &record.category {
            categories.entry(category).or_default()[usize::from(test)] += 1;
        }
    }
    let row =
        |(name, [train, test]): (&str, [usize; 2])| vec![output::printable(name), train.to_string(), test.to_string()];
    let rows: Vec<Vec<String>> = categories.into_iter().chain([("all", all)]).map(row).collect();
    text_table(&["category", "train", "test"].map(str::to_owned), &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_category_is_on_both_sides_and_equal_lines_on_one() {
        let category = |i: usize| ["large", "small", "single"][if i == 63 { 2 } else { usize::from(i >= 60) }];
        let record = |i| Record { category: Some(category(i).into()), ..Record::default() };
        let records: Vec<Record> = (0..64).map(record).collect();
        // Each line of the large category is there three times.
        let lines: Vec<Vec<u8>> = (0..64).map(|i| format!("{}", if i < 60 { i % 20 } else { i }).into()).collect();
        for seed in 0..8 {
            let test = held_out(&records, &lines, 0.2, seed);
            let count = |range: std::ops::Range<usize>| test[range].iter().filter(|&&test| test).count();
            assert_eq!([count(0..60), count(60..63), count(63..64)], [12, 1, 0], "seed {seed}");
            assert!((0..20).all(|i| test[i] == test[i + 20] && test[i] == test[i + 40]), "seed {seed}");
            assert_eq!(test, held_out(&records, &lines, 0.2, seed));
        }
        assert_ne!(held_out(&records, &lines, 0.2, 0), held_out(&records, &lines, 0.2, 1));
    }
}
