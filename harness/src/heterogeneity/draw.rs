//! The draws: each seed orders the categories, and the records of each category, and draws the same number of records from the
//! first k categories, as evenly as possible.

use crate::data::order::Order;
use crate::data::records::Record;
use crate::output::printable;
use anyhow::{Result, bail};
use std::collections::BTreeMap;

/// Categories to draw from.
pub struct Draws<'r> {
    /// Number of records in each draw.
    pub records: usize,
    /// Numbers of categories, ascending.
    pub counts: Vec<usize>,
    /// Categories, and the indices of their records.
    categories: Vec<(&'r str, Vec<usize>)>,
}

impl<'r> Draws<'r> {
    /// Chooses among the categories of records; `None` stands for a default.
    pub fn new(
        all: &'r [Record],
        records: Option<usize>,
        among: Option<&[String]>,
        counts: Option<Vec<usize>>,
    ) -> Result<Self> {
        let mut categories = categories(all)?;
        if let Some(among) = among {
            if let Some(unknown) = among.iter().find(|name| !categories.contains_key(name.as_str())) {
                let known: Vec<&str> = categories.keys().copied().collect();
                bail!("--among: expected some of {}, found {unknown:?}", printable(&known.join(", ")));
            }
            categories.retain(|name, _| among.iter().any(|chosen| chosen == name));
        }
        let smallest = categories.values().map(Vec::len).min().unwrap_or(0);
        let records = records.unwrap_or(smallest);
        let size = |(name, own): (&&'r str, &Vec<usize>)| (own.len(), *name);
        let (most, largest) = categories.iter().map(size).max().unwrap_or_default();
        let few = categories.iter().find(|(_, own)| own.len() < records);
        if let (Some(_), Some((few, own))) = (among, few) {
            bail!("--among {}: expected at least --records {records} records, found {}", printable(few), own.len());
        }
        categories.retain(|_, own| own.len() >= records);
        if categories.is_empty() {
            bail!(
                "--records {records}: expected at most {most}, the size of the largest category, {}",
                printable(largest)
            );
        }
        let counts = check_counts(counts, categories.len(), records)?;
        Ok(Self { records, counts, categories: categories.into_iter().collect() })
    }

    /// The categories in the order of a seed.
    pub fn order(&self, seed: u64) -> Vec<&'r str> {
        self.places(seed).into_iter().map(|i| self.categories[i].0).collect()
    }

    fn places(&self, seed: u64) -> Vec<usize> {
        Order::new(self.categories.len(), Some(seed)).take(0, self.categories.len())
    }

    /// The places of the records drawn from the first `count` categories, ascending. What is drawn of a category for a larger
    /// count is among what is drawn of it for a smaller one.
    pub fn draw(&self, seed: u64, count: usize) -> Vec<usize> {
        let mut drawn = Vec::with_capacity(self.records);
        for (i, place) in self.places(seed)[..count].iter().enumerate() {
            let own = &self.categories[*place].1;
            let share = self.records / count + usize::from(i < self.records % count);
            // Another stream than the categories' order.
            let order = Order::new(own.len(), Some(seed ^ 0x5851_F42D_4C95_7F2D)).take(0, share);
            drawn.extend(order.into_iter().map(|i| own[i]));
        }
        drawn.sort_unstable();
        drawn
    }
}

/// The categories of records, and the indices of their records.
fn categories(all: &[Record]) -> Result<BTreeMap<&str, Vec<usize>>> {
    let mut categories: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, record) in all.iter().enumerate() {
        if let Some(category) = &record.category {
            categories.entry(category).or_default().push(i);
        }
    }
    if categories.is_empty() {
        bail!("--data: expected records with a \"category\", and none has one");
    }
    Ok(categories)
}

/// Ascending numbers of categories, of which there are `most`; by default 1, 2, 4, .. and all.
fn check_counts(counts: Option<Vec<usize>>, most: usize, records: usize) -> Result<Vec<usize>> {
    let mut counts = counts.unwrap_or_else(|| {
        let most = most.min(records);
        std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < most).chain([most]).collect()
    });
    counts.sort_unstable();
    counts.dedup();
    match counts.last() {
        Some(count) if *count > most => {
            bail!("--counts {count}: expected at most {most}, the categories with at least {records} records")
        }
        Some(count) if *count > records => bail!("--counts {count}: expected at most --records {records}"),
        _ => Ok(counts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let record = |category: &str| Record { category: Some(category.into()), ..Record::default() };
        let counts = [("a", 12), ("b", 8), ("c", 9), ("d", 3)];
        let mut all: Vec<Record> = counts.iter().flat_map(|&(name, n)| (0..n).map(move |_| record(name))).collect();
        all.push(Record::default());
        all
    }

    #[test]
    fn every_draw_has_as_many_and_the_first_category_is_in_all() {
        let all = records();
        let draws = Draws::new(&all, Some(8), None, None).unwrap();
        assert_eq!(draws.counts, [1, 2, 3]);
        let of = |seed, count| {
            let mut of: BTreeMap<&str, usize> = BTreeMap::new();
            for i in draws.draw(seed, count) {
                *of.entry(all[i].category.as_deref().unwrap()).or_default() += 1;
            }
            of
        };
        for seed in 0..5 {
            let order = draws.order(seed);
            for count in 1..=3 {
                let of = of(seed, count);
                assert_eq!((of.len(), of.values().sum::<usize>()), (count, 8));
                assert!(of.values().max().unwrap() - of.values().min().unwrap() <= 1);
                assert!(order[..count].iter().all(|name| of.contains_key(name)));
                let mut distinct = draws.draw(seed, count);
                distinct.dedup();
                assert_eq!(distinct.len(), 8, "no record twice");
            }
            assert!(
                draws
                    .draw(seed, 2)
                    .iter()
                    .filter(|i| all[**i].category.as_deref() == Some(order[0]))
                    .all(|i| draws.draw(seed, 1).contains(i))
            );
        }
        assert_ne!(draws.draw(1, 3), draws.draw(2, 3));
    }

    #[test]
    fn what_cannot_be_drawn_is_refused() {
        let all = records();
        let wrong = |records, among: Option<&[String]>, counts: Option<Vec<usize>>| {
            Draws::new(&all, records, among, counts).err().unwrap().to_string()
        };
        assert!(wrong(None, Some(&["x".into()]), None).contains("--among: expected some of a, b, c, d, found \"x\""));
        assert!(wrong(Some(5), Some(&["d".into()]), None).contains("at least --records 5 records, found 3"));
        assert!(wrong(Some(13), None, None).contains("at most 12, the size of the largest category, a"));
        assert!(wrong(Some(8), None, Some(vec![1, 4])).contains("--counts 4: expected at most 3"));
        assert!(Draws::new(&[Record::default()], None, None, None).is_err());
        let draws = Draws::new(&all, None, None, None).unwrap();
        assert_eq!((draws.records, draws.counts), (3, vec![1, 2, 3]));
    }
}
