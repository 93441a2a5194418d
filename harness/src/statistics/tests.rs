use super::*;
use hydra_runtime::hydra_kernels::random::SplitMix64;

/// All items in one group, with equal weights.
fn plain(values: &[Vec<f64>], step: f64, level: f64) -> Option<Interval> {
    let n = values[0].len();
    Differences { values, weights: &vec![1.0; n], groups: &[(0..n).collect()], step }.interval(level)
}

fn ends(interval: Option<Interval>) -> [f64; 3] {
    let Interval { mean, ends } = interval.unwrap();
    let Ends { low, high } = ends.unwrap();
    [low, mean, high]
}

#[track_caller]
fn close(got: [f64; 3], wanted: [f64; 3]) {
    assert!(got.iter().zip(wanted).all(|(got, wanted)| (got - wanted).abs() < 1e-9), "{got:?} instead of {wanted:?}");
}

#[test]
fn one_seed_has_no_standard_error() {
    assert_eq!(Estimate::of(vec![2.0]), Estimate { mean: 2.0, stderr: None, seeds: vec![2.0] });
    let three = Estimate::of(vec![1.0, 2.0, 6.0]);
    // Deviations -2, -1, 3: 14 / 2 / 3.
    assert_eq!(three.mean, 3.0);
    assert!((three.stderr.unwrap() - (14.0f64 / 6.0).sqrt()).abs() < 1e-12);
}

#[test]
fn what_both_sides_share_has_no_width() {
    close(ends(plain(&vec![vec![0.5; 40]; 3], 0.0, 0.95)), [0.5; 3]);
}

/// Worked by hand; t(1) = 12.7062047362 and t(3) = 3.1824463053 are scipy's.
#[test]
fn two_seeds_on_four_items() {
    // Means 1 and 3: a standard error of 1. Less its mean, each seed moves the items by -1, 0, 0, 1 and -2, 0, 1, 1: the products
    // are 2, 0, 0, 1, so 3 / 4² · 4 / 3 = 1 / 4 is due to items.
    let values = [vec![0.0, 1.0, 1.0, 2.0], vec![1.0, 3.0, 4.0, 4.0]];
    let half = (12.706_204_736_174_694 + 0.25 * 3.182_446_305_283_708_6) / 1.25f64.sqrt();
    close(ends(plain(&values, 0.0, 0.95)), [2.0 - half, 2.0, 2.0 + half]);
    // With answers, one per seed more: 1 / 4² / 2.
    let half = (12.706_204_736_174_694 + 0.28125 * 3.182_446_305_283_708_6) / 1.28125f64.sqrt();
    close(ends(plain(&values, 1.0, 0.95)), [2.0 - half, 2.0, 2.0 + half]);
}

/// scipy.stats.t.interval(0.9, 3, mean, scipy.stats.sem(..)).
#[test]
fn one_seed_has_the_interval_of_its_items() {
    close(ends(plain(&[vec![1.0, 2.0, 4.0, 8.0]], 0.0, 0.9)), [0.107351188494611, 3.75, 7.392648811505387]);
}

/// The same of the means of three seeds.
#[test]
fn seeds_that_alone_differ_have_the_interval_of_their_means() {
    let values: Vec<Vec<f64>> = [1.0, 2.0, 6.0].iter().map(|&mean| vec![mean; 10]).collect();
    close(ends(plain(&values, 0.0, 0.95)), [-3.572410607728428, 3.0, 9.572410607728429]);
}

#[test]
fn groups_weigh_alike_and_items_by_their_weights() {
    let values = vec![vec![3.0, 3.0, 8.0]];
    let groups = [vec![0, 1], vec![2]];
    let differences = Differences { values: &values, weights: &[1.0, 2.0, 2.0], groups: &groups, step: 0.0 };
    assert_eq!(differences.interval(0.95).unwrap().mean, (2.0 + 4.0) / 2.0);
    assert!(Differences { groups: &[vec![]], ..differences }.interval(0.95).is_none());
}

#[test]
fn a_single_item_says_nothing_of_others() {
    let one = plain(&[vec![2.0], vec![4.0]], 0.0, 0.95).unwrap();
    assert_eq!((one.mean, one.ends, one.holds(0.0)), (3.0, None, true));
    // Groups of one are taken together.
    let values = [vec![1.0, 2.0, 4.0, 8.0]];
    let alone: Vec<Vec<usize>> = (0..4).map(|i| vec![i]).collect();
    let together = Differences { values: &values, weights: &[1.0; 4], groups: &alone, step: 0.0 }.interval(0.9);
    close(ends(together), ends(plain(&values, 0.0, 0.9)));
}

/// A normal number.
fn normal(random: &mut SplitMix64) -> f64 {
    let (radius, angle) = (1.0 - random.uniform(), std::f64::consts::TAU * random.uniform());
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}

/// How many of a hundred intervals hold the truth.
fn coverage(mut holds: impl FnMut(&mut SplitMix64) -> bool) -> f64 {
    const TRIES: usize = 2000;
    let random = &mut SplitMix64::new(11);
    100.0 * (0..TRIES).filter(|_| holds(random)).count() as f64 / TRIES as f64
}

/// Losses of records of 5 to 100 targets: what seeds, records and both together add, from seeds alone to records alone.
#[test]
fn intervals_of_losses_hold_the_truth_as_often_as_they_say() {
    for (items, [of_seed, of_item, of_both]) in [
        (12, [1.0, 1.0, 1.0]),
        (40, [1.0, 0.5, 0.5]),
        (40, [0.2, 1.0, 1.0]),
        (40, [0.0, 1.0, 0.3]),
        (40, [0.1, 1.0, 0.3]),
    ] {
        for seeds in [2, 3, 5, 10] {
            let covered = coverage(|random| {
                let weights: Vec<f64> = (0..items).map(|_| 5.0 + random.below(96) as f64).collect();
                let shared: Vec<f64> = weights.iter().map(|_| of_item * normal(random)).collect();
                let values: Vec<Vec<f64>> = (0..seeds)
                    .map(|_| {
                        let seed = of_seed * normal(random);
                        let noise = |(shared, weight): (&f64, &f64)| {
                            weight * seed + weight.sqrt() * 5.0 * (shared + of_both * normal(random))
                        };
                        shared.iter().zip(&weights).map(noise).collect()
                    })
                    .collect();
                let groups = [(0..items).collect()];
                Differences { values: &values, weights: &weights, groups: &groups, step: 0.0 }
                    .interval(0.95)
                    .unwrap()
                    .holds(0.0)
            });
            let most = if seeds == 2 { 98.9 } else { 98.3 };
            assert!(
                (93.5..=most).contains(&covered),
                "{seeds} seeds, {items} items, {of_seed} {of_item} {of_both}: {covered} %"
            );
        }
    }
}

/// Right or wrong answers of two methods to questions in subjects of unlike sizes, overall and as the mean of the subjects.
#[test]
fn intervals_of_accuracies_hold_the_truth_as_often_as_they_say() {
    let sizes = [4, 10, 16, 50];
    let total: usize = sizes.iter().sum();
    let ranges = sizes.iter().scan(0, |start, size| {
        *start += size;
        Some((*start - size..*start).collect::<Vec<usize>>())
    });
    let subjects: Vec<Vec<usize>> = ranges.collect();
    for (groups, of_seed) in [(vec![(0..total).collect()], 0.05), (vec![(0..total).collect()], 0.4), (subjects, 0.2)] {
        for seeds in [2, 3, 5, 10] {
            let covered = coverage(|random| {
                let mut noise = |size: f64| size * normal(random);
                let ease: Vec<f64> = (0..total).map(|_| noise(1.0)).collect();
                let mut side = || -> Vec<Vec<f64>> {
                    let own: Vec<f64> = ease.iter().map(|ease| ease + noise(0.5)).collect();
                    let of_seed = (0..seeds).map(|_| {
                        let seed = noise(of_seed);
                        own.iter().map(|own| f64::from(own + seed + noise(0.5) > 0.0)).collect()
                    });
                    of_seed.collect()
                };
                let (one, other) = (side(), side());
                let differ = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a - b).collect();
                let values: Vec<Vec<f64>> = one.iter().zip(&other).map(differ).collect();
                let weights = vec![1.0; total];
                Differences { values: &values, weights: &weights, groups: &groups, step: 1.0 }
                    .interval(0.95)
                    .unwrap()
                    .holds(0.0)
            });
            let most = if seeds == 2 { 98.9 } else { 98.3 };
            assert!((93.5..=most).contains(&covered), "{seeds} seeds, {} groups, {of_seed}: {covered} %", groups.len());
        }
    }
}
