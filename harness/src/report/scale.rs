//! Axes: from a range of values to a scale with ticks that people would choose.

use super::text::{HUGE, number};

/// What an axis shows.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What is measured, and in which unit.
    pub title: String,
    /// How values are placed.
    pub kind: Kind,
}

/// How values are placed on an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linear; the ends are ticks.
    Linear,
    /// Linear over whole numbers (steps, layers, clusters): ticks at whole numbers only, ends at the data's ends.
    Whole,
    /// Logarithmic over positive values; ticks at 1, 2 and 5 times powers of ten.
    Logarithmic,
    /// Logarithmic, with a tick at each value that occurs: 1, 2, 4, ..
    Doubling,
    /// Linear without ticks: distances mean something, values don't.
    Bare,
}

impl Axis {
    /// An axis of a title.
    pub fn new(title: &str, kind: Kind) -> Self {
        Self { title: title.to_string(), kind }
    }

    /// Of training steps.
    pub fn steps() -> Self {
        Self::new("step", Kind::Whole)
    }

    /// Of cross-entropies.
    pub fn loss() -> Self {
        Self::new("cross-entropy, nats per token", Kind::Linear)
    }
}

/// A range with ticks.
#[derive(Clone, Debug)]
pub struct Scale {
    /// Smallest value on the axis.
    pub low: f64,
    /// Largest value on the axis.
    pub high: f64,
    /// Values with a tick, ascending, and what stands at them.
    pub ticks: Vec<(f64, String)>,
    /// Whether equal distances are equal ratios.
    pub logarithmic: bool,
}

/// Room at both ends of a logarithmic axis, as a share of its length.
const INSET: f64 = 0.06;
/// Ticks wanted on a linear axis, and the most on one over whole numbers.
const TICKS: f64 = 6.0;
const MOST_WHOLE: f64 = 8.0;
/// With more ticks than this, a logarithmic axis has them at powers of ten only.
const MOST_LOGARITHMIC: usize = 10;

impl Scale {
    /// The scale of an axis over finite values, of which there is at least one.
    pub fn new(kind: Kind, values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.filter(|&value| kind != Kind::Logarithmic || value > 0.0).collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let (low, high) = (values.first().copied().unwrap_or(0.1), values.last().copied().unwrap_or(1.0));
        match kind {
            Kind::Linear => Self::linear(low, high),
            Kind::Whole => Self::whole(low, high),
            Kind::Logarithmic => Self::logarithmic(low, high),
            Kind::Doubling => Self::doubling(&values),
            Kind::Bare => Self { ticks: Vec::new(), ..Self::linear(low, high) },
        }
    }

    fn linear(low: f64, high: f64) -> Self {
        // One value only: room above and below it.
        let (low, high) = if low < high { (low, high) } else { (low - 0.1 * low.abs(), high + 0.1 * high.abs()) };
        let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
        let step = round_step((high - low) / TICKS);
        let (first, last) = ((low / step + 1e-9).floor() as i64, (high / step - 1e-9).ceil() as i64);
        let values: Vec<f64> = (first..=last).map(|i| i as f64 * step).collect();
        Self { low: first as f64 * step, high: last as f64 * step, ticks: labels(&values, step), logarithmic: false }
    }

    fn whole(low: f64, high: f64) -> Self {
        let step = round_step((high - low) / MOST_WHOLE).max(1.0);
        let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
        let values: Vec<f64> = (first..=last).map(|i| i as f64 * step).collect();
        let (low, high) = if low < high { (low, high) } else { (low - 0.5, high + 0.5) };
        Self { low, high, ticks: labels(&values, step), logarithmic: false }
    }

    fn logarithmic(low: f64, high: f64) -> Self {
        let decades = low.log10().floor() as i32..=high.max(low).log10().floor() as i32 + 1;
        let all: Vec<f64> = decades.flat_map(|power| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(power))).collect();
        // From the last that is not above the values to the first that is not below them.
        let first = all.iter().rposition(|&tick| tick <= 1.000_001 * low).unwrap_or(0);
        let last = all.iter().position(|&tick| tick >= 0.999_999 * high).unwrap_or(all.len() - 1).max(first + 1);
        let few = last - first <= MOST_LOGARITHMIC;
        let shown = all[first..=last].iter().filter(|&&tick| few || (tick.log10() - tick.log10().round()).abs() < 1e-9);
        let ticks = shown.map(|&tick| (tick, number(tick))).collect();
        Self { low: all[first], high: all[last], ticks, logarithmic: true }
    }

    fn doubling(values: &[f64]) -> Self {
        let (first, last) = (values[0], values[values.len() - 1]);
        let room = if first < last { (last / first).powf(INSET / (1.0 - 2.0 * INSET)) } else { 2.0 };
        let ticks = values.iter().map(|&v| (v, number(v))).collect();
        Self { low: first / room, high: last * room, ticks, logarithmic: true }
    }

    /// Where a value stands, as a share of the axis; on a logarithmic one, what is not positive stands at its low end.
    pub fn place(&self, value: f64) -> f64 {
        match self.logarithmic {
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        }
    }
}

/// The smallest of 1, 2, 5, 10, .. times a power of ten that is not below `rough`.
fn round_step(rough: f64) -> f64 {
    if rough <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough * 0.999_999).unwrap_or(10.0) * power
}

/// All with the same number of decimals, or with the same exponent where they are small or huge.
fn labels(values: &[f64], step: f64) -> Vec<(f64, String)> {
    let most = values.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
    let decimals = (-step.log10() + 1e-9).floor().max(0.0) as usize;
    let rest = (step * 10f64.powi(decimals as i32)).fract();
    let decimals = decimals + usize::from((1e-6..1.0 - 1e-6).contains(&rest));
    let power = most.log10().floor();
    let label = |&value: &f64| match value {
        0.0 => "0".to_string(),
        _ if !(0.01..HUGE).contains(&most) => format!("{}e{power}", number(value / 10f64.powf(power))),
        _ if most >= 1000.0 && step >= 1.0 => number(value),
        _ => format!("{value:.decimals$}"),
    };
    values.iter().map(|value| (*value, label(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(kind: Kind, values: &[f64]) -> String {
        let scale = Scale::new(kind, values.iter().copied());
        scale.ticks.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(Kind::Linear, &[0.01, 5.08]), "0 1 2 3 4 5 6");
        assert_eq!(ticks(Kind::Linear, &[2.31, 2.35]), "2.31 2.32 2.33 2.34 2.35");
        assert_eq!(ticks(Kind::Linear, &[-1.0, 1.0]), "-1.0 -0.5 0 0.5 1.0");
        assert_eq!(ticks(Kind::Linear, &[0.0, 2e-4]), "0 0.5e-4 1e-4 1.5e-4 2e-4");
        assert_eq!(ticks(Kind::Linear, &[612.0, 1080.0]), "600 700 800 900 1,000 1,100");
        assert_eq!(ticks(Kind::Linear, &[1000.0, 1000.5]), "1000.0 1000.1 1000.2 1000.3 1000.4 1000.5");
        assert_eq!(ticks(Kind::Linear, &[1e13, 3e13]), "1e13 1.5e13 2e13 2.5e13 3e13");
        assert_eq!(ticks(Kind::Linear, &[4.0]), "3.6 3.8 4.0 4.2 4.4");
        assert_eq!(ticks(Kind::Linear, &[0.0]), "0 0.2 0.4 0.6 0.8 1.0");
    }

    #[test]
    fn whole_numbers_have_no_ticks_between_them() {
        assert_eq!(ticks(Kind::Whole, &[1.0, 16.0]), "2 4 6 8 10 12 14 16");
        assert_eq!(ticks(Kind::Whole, &[0.0, 3.0]), "0 1 2 3");
        assert_eq!(ticks(Kind::Whole, &[0.0, 29.0]), "0 5 10 15 20 25");
        assert_eq!(ticks(Kind::Whole, &[1.0, 400.0]), "50 100 150 200 250 300 350 400");
        assert_eq!(ticks(Kind::Whole, &[1.0, 20_000.0]), "5,000 10,000 15,000 20,000");
        assert_eq!(ticks(Kind::Whole, &[7.0]), "7");
    }

    #[test]
    fn logarithmic_ticks_are_one_two_and_five() {
        assert_eq!(ticks(Kind::Logarithmic, &[0.06, 4.5]), "0.05 0.1 0.2 0.5 1 2 5");
        assert_eq!(ticks(Kind::Logarithmic, &[1e-4, 30.0]), "1e-4 1e-3 0.01 0.1 1 10");
        assert_eq!(ticks(Kind::Logarithmic, &[2.0]), "2 5");
        let scale = Scale::new(Kind::Logarithmic, [0.1, 10.0].into_iter());
        assert!((scale.place(1.0) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn doubling_ticks_are_where_the_values_are() {
        let scale = Scale::new(Kind::Doubling, [4.0, 1.0, 2.0, 1.0].into_iter());
        assert_eq!(scale.ticks.iter().map(|tick| tick.1.as_str()).collect::<Vec<_>>(), ["1", "2", "4"]);
        let places: Vec<f64> = scale.ticks.iter().map(|tick| scale.place(tick.0)).collect();
        for (place, want) in places.iter().zip([0.06, 0.5, 0.94]) {
            assert!((place - want).abs() < 1e-9, "{places:?}");
        }
    }
}
