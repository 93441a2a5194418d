//! Texts as sparse vectors of unit length: (1 + ln tf) · (ln((1 + n) / (1 + df)) + 1), as scikit-learn's TfidfVectorizer with
//! `sublinear_tf`.
//!
//! A term is a run of at least two letters and digits that begins with a letter, in lower case. It counts if it is in at least
//! two texts and in at most half of them. There is no list of stop words, as none would fit every language. Terms are sorted
//! alphabetically.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Texts as rows.
pub struct Corpus {
    /// The terms, one for each column.
    pub terms: Vec<String>,
    /// Where each row starts in `entries`, and where the last one ends.
    starts: Vec<usize>,
    entries: Vec<(u32, f32)>,
}

impl Corpus {
    /// Weighs the terms of `texts`.
    pub fn new(texts: &[String]) -> Self {
        let mut frequency = HashMap::<String, usize>::new();
        for text in texts {
            for term in terms(text).collect::<HashSet<_>>() {
                *frequency.entry(term).or_default() += 1;
            }
        }
        let counts = |&(_, df): &(String, usize)| df >= 2 && df <= texts.len() / 2;
        let mut kept: Vec<(String, usize)> = frequency.into_iter().filter(counts).collect();
        kept.sort();
        let idf = |df: usize| ((1.0 + texts.len() as f64) / (1.0 + df as f64)).ln() + 1.0;
        let columns: HashMap<&str, (u32, f64)> =
            kept.iter().zip(0..).map(|((term, df), column)| (term.as_str(), (column, idf(*df)))).collect();
        let (mut starts, mut entries) = (vec![0], Vec::new());
        for text in texts {
            let mut row = BTreeMap::<u32, (f64, f64)>::new();
            for term in terms(text) {
                if let Some(&(column, idf)) = columns.get(term.as_str()) {
                    row.entry(column).or_insert((0.0, idf)).0 += 1.0;
                }
            }
            let weights: Vec<(u32, f64)> = row.into_iter().map(|(c, (tf, idf))| (c, (1.0 + tf.ln()) * idf)).collect();
            let norm = weights.iter().map(|(_, w)| w * w).sum::<f64>().sqrt();
            entries.extend(weights.into_iter().map(|(column, weight)| (column, (weight / norm) as f32)));
            starts.push(entries.len());
        }
        Self { terms: kept.into_iter().map(|(term, _)| term).collect(), starts, entries }
    }

    /// Number of texts.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The columns and weights of a text, ascending.
    pub fn row(&self, row: usize) -> impl Iterator<Item = (usize, f64)> {
        let entries = &self.entries[self.starts[row]..self.starts[row + 1]];
        entries.iter().map(|&(column, weight)| (column as usize, f64::from(weight)))
    }

    /// The terms whose mean weight in these rows most exceeds that in all rows, in descending order.
    pub fn distinctive(&self, rows: &[usize], count: usize) -> Vec<String> {
        let mut lead = vec![0.0; self.terms.len()];
        for row in 0..self.len() {
            self.row(row).for_each(|(column, weight)| lead[column] -= weight / self.len() as f64);
        }
        // If the rows are all rows, nothing exceeds the rest; the weights themselves are ranked.
        if rows.len() == self.len() {
            lead.fill(0.0);
        }
        for &row in rows {
            self.row(row).for_each(|(column, weight)| lead[column] += weight / rows.len() as f64);
        }
        let mut order: Vec<usize> = (0..lead.len()).filter(|&column| lead[column] > 0.0).collect();
        order.sort_by(|&a, &b| lead[b].total_cmp(&lead[a]).then(a.cmp(&b)));
        order.into_iter().take(count).map(|column| self.terms[column].clone()).collect()
    }
}

fn terms(text: &str) -> impl Iterator<Item = String> {
    let runs = text.split(|c: char| !c.is_alphanumeric());
    let term = |run: &&str| run.chars().next().is_some_and(char::is_alphabetic) && run.chars().nth(1).is_some();
    runs.filter(term).map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_definition() {
        let texts = ["The cat, the CAT", "a cat 42 on mats", "mats on", "on on dogs dogs dogs", ""].map(String::from);
        let corpus = Corpus::new(&texts);
        // "on" is in more than half of the five; the others once, or no terms.
        assert_eq!(corpus.terms, ["cat", "mats"]);
        let rows: Vec<Vec<_>> = (0..5).map(|row| corpus.row(row).collect()).collect();
        assert_eq!(rows[0], [(0, 1.0)]);
        assert_eq!(rows[1].iter().map(|&(c, w)| (c, (w * 1e3).round())).collect::<Vec<_>>(), [(0, 707.0), (1, 707.0)]);
        assert!(rows[3].is_empty() && rows[4].is_empty());
        assert_eq!(
            (corpus.distinctive(&[0, 1], 1), corpus.distinctive(&[2], 9)),
            (vec!["cat".into()], vec!["mats".to_string()])
        );
    }

    #[test]
    fn frequent_and_rare_terms_weigh_differently() {
        let texts = ["xx yy yy", "xx yy", "xx", "zz", "zz", "q", "q", "q"].map(String::from);
        let corpus = Corpus::new(&texts);
        let first: Vec<_> = corpus.row(0).collect();
        let (idf, tf) = (|df: f64| (9.0 / (1.0 + df)).ln() + 1.0, 1.0 + 2f64.ln());
        let ratio = first[1].1 / first[0].1;
        assert!((ratio - tf * idf(2.0) / idf(3.0)).abs() < 1e-5, "{ratio}");
    }
}
