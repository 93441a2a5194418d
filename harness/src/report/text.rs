//! Texts and numbers as pages show them.

use crate::output::escaped;

/// Text for HTML, SVG and quoted attributes. Control characters, which XML forbids, are escaped.
pub fn escape(text: &str) -> String {
    escaped(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A name that may break after its underscores, hyphens and slashes, in HTML.
pub fn breakable(name: &str) -> String {
    let mut html = escape(name);
    for mark in ["_", "-", "/"] {
        html = html.replace(mark, &format!("{mark}<wbr>"));
    }
    html
}

/// `113,664`
pub fn integer(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// From here on, numbers have an exponent.
pub const HUGE: f64 = 1e12;

/// A value with about four significant digits: `1,840`, `0.3121`, `2.14e-3`, `2.35e12`; `–` where it is not finite.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        return "–".into();
    }
    if (999.5..HUGE).contains(&size) {
        let sign = if value < 0.0 { "-" } else { "" };
        return format!("{sign}{}", integer(size.round() as u64));
    }
    if size >= HUGE || (size > 0.0 && size < 0.01) {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", trimmed(digits));
    }
    trimmed(&format!("{value:.*}", if size >= 99.95 { 1 } else { 4 })).to_string()
}

/// Without zeros at the end of a decimal fraction.
fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

/// `8.3 s`, `1 min 5 s`, `2 h 10 min`
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 59.95 => format!("{seconds:.1} s"),
        0..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// `812 MiB`, `1.2 GiB`
pub fn memory(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1000.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// `1 step`, `2 steps`
pub fn count(n: usize, one: &str, many: &str) -> String {
    format!("{} {}", integer(n as u64), if n == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_markup_and_no_control_characters() {
        assert_eq!(escape("a<b> & \"c\"\u{1b}[31m\n"), "a&lt;b&gt; &amp; &quot;c&quot;\\u{1b}[31m\\n");
        assert_eq!(breakable("bbh_web<x"), "bbh_<wbr>web&lt;x");
    }

    #[test]
    fn numbers_for_people() {
        let shown = [0.0, 2e-4, 2.142e-3, 0.31214, 2.0, 118.24, 999.6, -1840.4, f64::NAN].map(number);
        assert_eq!([9.9e11, 2.346e12, -1e300].map(number), ["990,000,000,000", "2.35e12", "-1e300"]);
        assert_eq!(shown, ["0", "2e-4", "2.14e-3", "0.3121", "2", "118.2", "1,000", "-1,840", "–"]);
        assert_eq!([7, 1000, 1_234_567].map(integer), ["7", "1,000", "1,234,567"]);
        assert_eq!([8.26, 59.97, 65.0, 7800.0].map(duration), ["8.3 s", "1 min 0 s", "1 min 5 s", "2 h 10 min"]);
        assert_eq!([850 << 20, 1229 << 20].map(memory), ["850 MiB", "1.2 GiB"]);
        assert_eq!((count(1, "step", "steps"), count(2, "step", "steps")), ("1 step".into(), "2 steps".into()));
    }
}
