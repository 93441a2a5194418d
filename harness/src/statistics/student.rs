//! Quantiles of Student's t, for degrees of freedom that need not be whole.

use std::f64::consts::PI;

/// The t that |T| does not exceed with probability `level`, for at least one degree of freedom.
pub fn two_sided(level: f64, freedom: f64) -> f64 {
    // P(|T| > t) = I_x(ν/2, 1/2) with x = ν / (ν + t²), which grows with x.
    let (mut low, mut high) = (0.0, 1.0);
    // Halves until no number lies between the two.
    loop {
        let x = 0.5 * (low + high);
        if x <= low || x >= high {
            return (freedom * (1.0 - x) / x).sqrt();
        }
        if incomplete_beta(x, 0.5 * freedom, 0.5) < 1.0 - level { low = x } else { high = x }
    }
}

/// The regularised incomplete beta function I_x(a, b), for x between 0 and 1: the continued fraction of DLMF 8.17.22, where it
/// converges fast, else 1 − I₁₋ₓ(b, a).
fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(1.0 - x, b, a);
    }
    let front = ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (-x).ln_1p();
    // Lentz's method: 1 / (1 + d₁ / (1 + d₂ / ..)) as a product.
    let bounded = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let (mut above, mut below, mut product) = (f64::INFINITY, 1.0f64, 1.0f64);
    for k in 1..10_000 {
        let m = f64::from(k / 2);
        let d = match k {
            k if k % 2 == 1 => -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0)),
            _ => m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m)),
        };
        below = 1.0 / bounded(1.0 + d * below);
        above = bounded(1.0 + d / above);
        let step = above * below;
        product *= step;
        if (step - 1.0).abs() < 1e-15 {
            break;
        }
    }
    front.exp() / a * product
}

/// ln Γ(x) for x > 0: Stirling's series (DLMF 5.11.1) beyond 10, which Γ(x + 1) = x Γ(x) leads to.
fn ln_gamma(x: f64) -> f64 {
    if x < 10.0 {
        return ln_gamma(x + 1.0) - x.ln();
    }
    const TERMS: [f64; 6] = [1.0 / 12.0, -1.0 / 360.0, 1.0 / 1260.0, -1.0 / 1680.0, 1.0 / 1188.0, -691.0 / 360_360.0];
    let series: f64 = TERMS.iter().rev().fold(0.0, |sum, term| sum / (x * x) + term);
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * PI).ln() + series / x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Level, degrees of freedom, and scipy.stats.t.isf((1 - level) / 2, freedom).
    const SCIPY: [(f64, f64, f64); 15] = [
        (0.95, 1.0, 12.706204736174694),
        (0.95, 1.37, 6.885073156641705),
        (0.95, 2.0, 4.302652729749462),
        (0.95, 2.5, 3.5746548420036817),
        (0.95, 4.0, 2.7764451051977934),
        (0.95, 9.0, 2.262157162798205),
        (0.95, 37.2, 2.025824819047783),
        (0.95, 385.0, 1.966144814842553),
        (0.95, 14041.0, 1.9601329520111468),
        (0.95, 1000000.0, 1.959966356814107),
        (0.5, 1.0, 1.0000000000000002),
        (0.5, 3.0, 0.7648923284043444),
        (0.999, 2.0, 31.599054576443606),
        (0.999999, 1.0, 636619.7723487513),
        (0.001, 5.0, 0.0013171532190937652),
    ];

    #[test]
    fn quantiles_are_those_of_scipy() {
        for (level, freedom, wanted) in SCIPY {
            let got = two_sided(level, freedom);
            assert!((got / wanted - 1.0).abs() < 1e-9, "{level}, {freedom}: {got} instead of {wanted}");
        }
    }
}
