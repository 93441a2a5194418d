//! How long a pattern may take that no automaton can match: fancy-regex tries its ways one after the other at each place.
//!
//! What an automaton can match takes a time that grows with the text's length. The rest is followed as fancy-regex compiles
//! it: how many ways an expression may match from one place, and how many steps it takes to try them all. Both are
//! polynomials in the text's length. `\s+(?!\S)` has as many ways as there are spaces, so it takes a number of steps that
//! grows with the length: that is what published tokenizers have. `\s+\s+(?!\S)` grows with the square, `(\s+)+(?!\S)` with
//! powers of two. (fancy-regex gives up a match after a million ways. By then seconds have passed for one place, and the
//! crate takes what is left of the text for one piece.)

use fancy_regex::{Assertion, Expr};

/// The most steps for a place in a text: of those that are always taken, and of those for each character behind it. The
/// patterns of published tokenizers have up to some 2,100 (Jais 2, with `\s{512}(?!\S)`) and some 30 (Command A).
const MOST_STEPS: Polynomial = [8192.0, 64.0, 0.0];

/// Its coefficients: of 1, of the length, and of all higher powers of it.
type Polynomial = [f64; 3];

const ONE: Polynomial = [1.0, 0.0, 0.0];
const LENGTH: Polynomial = [0.0, 1.0, 0.0];

/// In how many ways an expression may match, and in how many steps all are tried.
#[derive(Clone, Copy)]
struct Cost {
    ways: Polynomial,
    steps: Polynomial,
}

/// An error if a pattern may take too long. One that can't be read is the crate's to refuse.
pub(super) fn check(pattern: &str) -> Result<(), String> {
    let Ok(tree) = Expr::parse_tree(pattern) else { return Ok(()) };
    let steps = cost(&tree.expr, false).steps;
    if steps.iter().zip(MOST_STEPS).all(|(&found, most)| found <= most) {
        return Ok(());
    }
    Err("expected one open repetition (* or +) at most before or inside a look-around, and none inside another".into())
}

/// `followed` says that what stands behind may have it try its other ways.
fn cost(expr: &Expr, followed: bool) -> Cost {
    if !followed && !is_hard(expr) {
        return automaton(std::slice::from_ref(expr));
    }
    match expr {
        Expr::Concat(parts) => {
            // What an automaton can match at the end is matched by one.
            let easy = parts.iter().rev().take_while(|part| !followed && !is_hard(part)).count();
            let (parts, end) = parts.split_at(parts.len() - easy);
            let behind = (!end.is_empty()).then(|| automaton(end));
            parts.iter().map(|part| cost(part, true)).chain(behind).fold(Cost { ways: ONE, steps: [0.0; 3] }, then)
        }
        Expr::Alt(branches) => branches.iter().map(|branch| cost(branch, followed)).reduce(or).unwrap_or(STEP),
        Expr::Group(inner) => cost(inner, followed),
        // It matches in one way.
        Expr::LookAround(inner, _) | Expr::AtomicGroup(inner) => Cost { ways: ONE, ..cost(inner, false) },
        Expr::Repeat { child, lo: 0, hi: 1, .. } => or(STEP, cost(child, followed)),
        Expr::Repeat { child, lo, hi, .. } => repeated(cost(child, true), *lo, *hi),
        Expr::Conditional { condition, true_branch, false_branch } => {
            let [condition, yes, no] = [condition, true_branch, false_branch].map(|part| cost(part, true));
            or(then(condition, yes), no)
        }
        Expr::Backref(_) => Cost { ways: ONE, steps: LENGTH },
        _ => STEP,
    }
}

const STEP: Cost = Cost { ways: ONE, steps: ONE };

/// Whether no automaton can match it.
fn is_hard(expr: &Expr) -> bool {
    use Assertion::{LeftWordBoundary, NotWordBoundary, RightWordBoundary, WordBoundary};
    match expr {
        Expr::Concat(parts) | Expr::Alt(parts) => parts.iter().any(is_hard),
        Expr::Group(inner) | Expr::Repeat { child: inner, .. } => is_hard(inner),
        Expr::Assertion(assertion) => {
            matches!(assertion, LeftWordBoundary | RightWordBoundary | WordBoundary | NotWordBoundary)
        }
        Expr::Empty | Expr::Any { .. } | Expr::Literal { .. } | Expr::Delegate { .. } => false,
        _ => true,
    }
}

/// An automaton reads on until no way is left.
fn automaton(parts: &[Expr]) -> Cost {
    let steps = if parts.iter().any(is_open) { LENGTH } else { ONE };
    Cost { ways: ONE, steps }
}

/// Whether what it matches may have any length.
fn is_open(expr: &Expr) -> bool {
    match expr {
        Expr::Concat(parts) | Expr::Alt(parts) => parts.iter().any(is_open),
        Expr::Group(inner) => is_open(inner),
        Expr::Repeat { child, hi, .. } => *hi == usize::MAX || is_open(child),
        _ => false,
    }
}

/// For each way of the first, all of the second are tried.
fn then(first: Cost, second: Cost) -> Cost {
    Cost { ways: times(first.ways, second.ways), steps: plus(first.steps, times(first.ways, second.steps)) }
}

fn or(first: Cost, second: Cost) -> Cost {
    Cost { ways: plus(first.ways, second.ways), steps: plus(first.steps, second.steps) }
}

fn repeated(child: Cost, lo: usize, hi: usize) -> Cost {
    let child = Cost { steps: plus(child.steps, ONE), ..child };
    let single = child.ways == ONE;
    if hi == usize::MAX {
        // Where each repetition has several ways, they are multiplied with each other.
        let ways = if single { LENGTH } else { [0.0, 0.0, f64::INFINITY] };
        return Cost { ways, steps: times(LENGTH, child.steps) };
    }
    if single {
        let (ways, most) = ((hi.saturating_sub(lo) + 1) as f64, hi as f64);
        return Cost { ways: [ways, 0.0, 0.0], steps: child.steps.map(|steps| most * steps) };
    }
    // More than this is too long in any case.
    let mut all = if lo == 0 { STEP } else { Cost { ways: [0.0; 3], steps: [0.0; 3] } };
    let mut repeated = Cost { ways: ONE, steps: [0.0; 3] };
    for count in 1..=hi.min(64) {
        repeated = then(repeated, child);
        all.steps = repeated.steps;
        if count >= lo {
            all.ways = plus(all.ways, repeated.ways);
        }
    }
    all
}

fn plus(a: Polynomial, b: Polynomial) -> Polynomial {
    [0, 1, 2].map(|power| a[power] + b[power])
}

/// Of a length of 1 or more.
fn times(a: Polynomial, b: Polynomial) -> Polynomial {
    let product = |x: f64, y: f64| if x == 0.0 || y == 0.0 { 0.0 } else { x * y };
    let higher = [(1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2)];
    [
        product(a[0], b[0]),
        product(a[0], b[1]) + product(a[1], b[0]),
        higher.into_iter().map(|(x, y)| product(a[x], b[y])).sum(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What published tokenizers cut texts by, as their tokenizer.json has it.
    const PUBLISHED: [(&str, &str); 31] = [
        ("GPT-2, SmolLM, StarCoder", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
        ("CLIP", r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
        (
            "LLaMA 3, GLM 4, DBRX",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        (
            "Qwen 2, Qwen 3, Grok 2",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        (
            "Qwen 3.5",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        (
            "Seed-Coder",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        (
            "GPT-4, Phi-4",
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
        (
            "GPT-4, as tiktoken has it now",
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        ),
        (
            "Bailing",
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
        (
            "GPT-4o, gpt-oss, MiniMax M2",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        (
            "Mistral's tekken",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        (
            "Kimi K2",
            r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ("DeepSeek 3, numbers", r"\p{N}{1,3}"),
        ("DeepSeek 3, Chinese", r"[一-龥぀-ゟ゠-ヿ]+"),
        (
            "DeepSeek 3, Hunyuan",
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
        ),
        ("DeepSeek Coder, words", r"\s?\p{L}+"),
        ("DeepSeek LLM, punctuation", r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        ("DeepSeek LLM, spaces", r"\s+$"),
        ("Falcon", r"[0-9][0-9][0-9]"),
        ("BLOOM, Poro, Viking", r" ?[^(\s|.,!?…。，、।۔،)]+"),
        ("SuperBPE", r"(?=(\d{3})+(?!\d))"),
        ("Command A, Aya, Trinity", r"\d{1,3}(?=(?:\d{3})*\b)"),
        ("Chameleon, images", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
        ("Chameleon, spaces", "([\\t\\n]|    |  )"),
        (
            "EXAONE 4",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
        (
            "Jais 2",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        ),
        ("Laguna", r"[^\n]+|[\n]+"),
        ("Gemma 4", r"[^\n]+|[\n]+"),
        ("T5, ALBERT", r" {2,}"),
        ("VITS", r"(?=.)|(?<!^)$"),
        ("XLNet, of old", r"(?<!\n)^"),
    ];

    #[test]
    fn patterns_of_published_tokenizers() {
        for (whose, pattern) in PUBLISHED {
            assert!(fancy_regex::Regex::new(pattern).is_ok(), "{whose}: {pattern}");
            assert_eq!(
                check(pattern),
                Ok(()),
                "{whose}: {:?}",
                cost(&Expr::parse_tree(pattern).unwrap().expr, false).steps
            );
        }
    }

    #[test]
    fn patterns_that_try_too_many_ways() {
        let patterns = [
            r"(?:a+)+(?!b)",
            r"(a|a)*(?=b)",
            r"a*a*(?=b)",
            r"a+(?=.*b)",
            r"(?=a+a+(?!b))",
            r"(?:a?){12}(?!b)",
            r"(?:a{1,4}){9}\b",
            r"a+(?:b|\b.*c)",
            r"(a+)+\1",
            r"(?>(?=a*b)a)*",
            r"(a+)?a+\b",
            r"(?<=a)(?:a|aa){1000000000}(?!b)",
            r"a{0,9000}(?!b)",
            r"(a)(?(1)(a+)+b|c)",
            r"\s+|(?:x*\b)*",
        ];
        for pattern in patterns {
            assert!(fancy_regex::Expr::parse_tree(pattern).is_ok(), "{pattern}");
            assert!(check(pattern).is_err(), "{pattern}");
        }
        for pattern in ["(", r"(?=a", r"(a+)+b", r"(?<=[a-z])(?=[A-Z])", r"(?:(?=\p{L})[^a-z])+", r"\b\w+\b", ""] {
            assert_eq!(check(pattern), Ok(()), "{pattern}");
        }
    }

    /// fancy-regex gives up after more.
    #[test]
    fn the_steps_are_a_bound_of_what_is_tried_again() {
        let texts = ["a", " ", "1", "a1 ", "'\r\n"].map(|text| text.repeat(300));
        for (whose, pattern) in PUBLISHED {
            let steps = cost(&Expr::parse_tree(pattern).unwrap().expr, false).steps;
            let most = steps[0] + 900.0 * (1.0 + steps[1]);
            let mut builder = fancy_regex::RegexBuilder::new(&format!(r"\A(?:{pattern})"));
            let regex = builder.backtrack_limit(most as usize).build().unwrap();
            for text in &texts {
                let gave_up = (0..text.len()).find(|&at| regex.find(&text[at..]).is_err());
                assert_eq!(gave_up, None, "{whose}: more than {most}");
            }
        }
    }
}
