//! Which records are drawn: for a seed, the categories in an order, each category's records in an order, and of the first k
//! categories as many as make up the number, as evenly as can be.

use crate::data::order::Order;
use crate::data::records::Record;
use anyhow::{Result, bail};
use std::collections::BTreeMap;

/// What can be drawn.
pub struct Draws<'r> {
    /// Records of each draw.
    pub records: usize,
    /// Numbers of categories, ascending.
    pub counts: Vec<usize>,
    /// Categories and their records' places.
    categories: Vec<(&'r str, Vec<usize>)>,
}

impl<'r> Draws<'r> {
    /// From records; `None` leaves a choice to the defaults.
    pub fn new(
        all: &'r [Record],
        records: Option<usize>,
        among: Option<&[String]>,
        counts: Option<Vec<usize>>,
    ) -> Result<Self> {
        let mut categories: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, record) in all.iter().enumerate() {
            if let Some(category) = &record.category {
                categories.entry(category).or_default().push(i);
            }
        }
        if categories.is_empty() {
            bail!("--data: no record has a category");
        }
        if let Some(among) = among {
            if let Some(unknown) = among.iter().find(|name| !categories.contains_key(name.as_str())) {
                let known: Vec<&str> = categories.keys().copied().collect();
                bail!("--among {unknown:?}: no such category in --data, which has {}", known.join(", "));
            }
            categories.retain(|name, _| among.iter().any(|wanted| wanted == name));
        }
        let smallest = categories.values().map(Vec::len).min().unwrap_or(0);
        let records = records.unwrap_or(smallest);
        let (name, largest) =
            categories.iter().map(|(name, own)| (*name, own.len())).max_by_key(|c| c.1).unwrap_or_default();
        let few = categories.iter().find(|(_, own)| own.len() < records);
        match (among, few) {
            (Some(_), Some((few, own))) => {
                bail!("--among {few}: has {} records, and --records is {records}", own.len())
            }
            _ => categories.retain(|_, own| own.len() >= records),
        }
        if categories.is_empty() {
            bail!("--records {records}: the largest category, {name}, has {largest}");
        }
        let most = categories.len();
        let mut counts = match counts {
            Some(counts) => counts,
            None => {
                let most = most.min(records);
                std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < most).chain([most]).collect()
            }
        };
        counts.sort_unstable();
        counts.dedup();
        if let Some(count) = counts.iter().find(|&&count| count > most) {
            bail!("--counts {count}: {most} categories have {records} records or more");
        }
        if let Some(count) = counts.iter().find(|&&count| count > records) {
            bail!("--counts {count}: more than --records {records}");
        }
        Ok(Self { records, counts, categories: categories.into_iter().collect() })
    }

    /// The categories in the seed's order.
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
        assert!(
            wrong(None, Some(&["x".into()]), None)
                .contains("--among \"x\": no such category in --data, which has a, b, c, d")
        );
        assert!(wrong(Some(5), Some(&["d".into()]), None).contains("has 3 records, and --records is 5"));
        assert!(wrong(Some(13), None, None).contains("the largest category, a, has 12"));
        assert!(wrong(Some(8), None, Some(vec![1, 4])).contains("--counts 4: 3 categories have 8"));
        assert!(Draws::new(&[Record::default()], None, None, None).is_err());
        let draws = Draws::new(&all, None, None, None).unwrap();
        assert_eq!((draws.records, draws.counts), (3, vec![1, 2, 3]));
    }
}
