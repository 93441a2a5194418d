//! The analysis for people: a table on the terminal, plots, `report.html`.

use crate::analyze::analysis::{About, Analysis, Point, Side, split};
use crate::analyze::gates::Gates;
use crate::analyze::similarity::{Compared, Similarity};
use crate::output::{printable, text_table};
use crate::report::{self, Curve, Group, curves, escape, heat_maps, scatter, section, table};
use anyhow::Result;
use std::path::Path;

const HEAD: [&str; 8] = ["", "between", "pairs", "cosine", "CKA", "subspace", "by chance", "angle °"];

/// What the columns mean.
const LEGEND: &str = "Means over pairs at the same layer and projection. Cosine: entry by entry. CKA and subspace (the mean cos² of the \
                      principal angles) compare what a matrix reads (A) or writes (B), whatever the basis of the rank's space: 1 the \
                      same, and “by chance” what subspace is for random matrices.";

/// For a terminal.
pub fn text(analysis: &Analysis) -> String {
    let head: Vec<String> = HEAD.iter().map(|&name| name.to_string()).collect();
    let mut text = text_table(&head, &similarities(analysis));
    let (head, rows) = adapters(analysis);
    text += &format!("\n{}", text_table(&head.map(str::to_owned), &rows));
    if !analysis.router.is_empty() {
        let (head, rows) = routers(analysis);
        text += &format!("\n{}", text_table(&head.map(str::to_owned), &rows));
    }
    remarks(analysis).into_iter().fold(text, |text, remark| text + &remark + "\n")
}

/// Plots and the page.
pub fn write(out: &Path, analysis: &Analysis) -> Result<()> {
    let mut body = section("How alike", &(table(&HEAD, &similarities(analysis)) + &paragraph(LEGEND)));
    for remark in remarks(analysis) {
        body += &paragraph(&remark);
    }
    let (head, rows) = adapters(analysis);
    body += &section("Adapters", &table(&head, &rows));
    let by_layer = by_layer(analysis);
    if !by_layer.is_empty() {
        let svg = curves(&by_layer);
        report::write_svg(&out.join("subspace.svg"), &svg)?;
        body += &section("Subspace similarity by layer", &svg);
    }
    for (kind, side) in [("A", &analysis.a), ("B", &analysis.b)] {
        for (by, groups) in colourings(analysis, side) {
            let svg = scatter(&groups);
            report::write_svg(&out.join(format!("tsne-{}-by-{by}.svg", kind.to_lowercase())), &svg)?;
            body += &section(&format!("t-SNE of the {kind}, coloured by {by}"), &svg);
        }
    }
    if !analysis.router.is_empty() {
        let (head, rows) = routers(analysis);
        body += &section("Routers", &(table(&head, &rows) + &paragraph(ROUTER_LEGEND)));
    }
    for gates in &analysis.router {
        let mut html = heat_maps(&gates.routing(None));
        for projection in gates.projections() {
            let maps = heat_maps(&gates.routing(Some(projection)));
            html += &format!("<details><summary>{projection}</summary>{maps}</details>\n");
        }
        body += &section(&format!("Router of {}, mean over projections", gates.adapter), &html);
    }
    report::write(out, "Hydra analyze", &body)
}

const ROUTER_LEGEND: &str = "Categories weighed alike. Entropy of a token's gate: 0 one head, 1 all alike. Balance, the entropy of the \
                             mean gate: 1 all heads have as much, 0 one has all. Mutual information between head and category, and \
                             what it could be at most.";

fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escape(text))
}

fn comparisons(analysis: &Analysis) -> [(&'static str, &'static str, &Compared); 4] {
    let (a, b) = (&analysis.a, &analysis.b);
    [
        ("A", "adapters", &a.across_adapters),
        ("B", "adapters", &b.across_adapters),
        ("A", "heads", &a.across_heads),
        ("B", "heads", &b.across_heads),
    ]
}

fn similarities(analysis: &Analysis) -> Vec<Vec<String>> {
    let line = |(kind, between, compared): (&str, &str, &Compared)| {
        let Similarity { pairs, cosine, cka, subspace, angle_degrees, chance } = compared.all.clone()?;
        let cosine = cosine.map_or("–".to_string(), |cosine| format!("{cosine:.3}"));
        let numbers = [cka, subspace, chance].map(|x| format!("{x:.3}"));
        let mut cells = vec![kind.to_string(), between.to_string(), pairs.to_string(), cosine];
        cells.extend(numbers);
        cells.push(format!("{angle_degrees:.1}"));
        Some(cells)
    };
    comparisons(analysis).into_iter().filter_map(line).collect()
}

fn adapters(analysis: &Analysis) -> ([&'static str; 9], Vec<Vec<String>>) {
    let line = |about: &About| {
        let mut cells: Vec<String> = [&about.name, about.method, about.gate].map(printable).to_vec();
        cells.extend([about.rank.to_string(), about.heads.to_string()]);
        cells.push(about.seed.map_or("–".to_string(), |seed| seed.to_string()));
        cells.extend([about.effective_rank_a, about.effective_rank_b].map(|rank| format!("{rank:.2}")));
        cells.push(about.cosine_of_a_to_its_start.map_or("–".to_string(), |cosine| format!("{cosine:.3}")));
        cells
    };
    let head = [
        "adapter",
        "method",
        "gate",
        "rank",
        "heads",
        "seed",
        "effective rank of A",
        "of B",
        "cosine of A to its start",
    ];
    (head, analysis.adapters.iter().map(line).collect())
}

fn routers(analysis: &Analysis) -> ([&'static str; 6], Vec<Vec<String>>) {
    let line = |gates: &Gates| {
        let mut cells = vec![printable(&gates.adapter)];
        let n = &gates.mean;
        cells.extend(
            [n.entropy, n.balance, n.largest, n.mutual_information_bits, gates.most_bits].map(|x| format!("{x:.3}")),
        );
        cells
    };
    let head = ["router of", "entropy", "balance", "largest head", "mutual information, bits", "at most"];
    (head, analysis.router.iter().map(line).collect())
}

fn remarks(analysis: &Analysis) -> Vec<String> {
    let mut remarks = Vec::new();
    match (analysis.adapters.len(), analysis.same_seed) {
        (1, _) => remarks.push("One adapter: there is nothing to compare across adapters.".to_string()),
        (_, Some(true)) => remarks.push(
            "All adapters have the same seed, so that A's of one shape started as the same matrix: how alike they are is in part how \
             little they moved from there (the cosine of A to its start)."
                .to_string(),
        ),
        (_, Some(false)) => {}
        (_, None) => remarks.push("Not every folder says its seed: A's may have started as the same matrix.".to_string()),
    }
    if analysis.adapters.iter().all(|about| about.heads == 1 || !split(about.method)) {
        remarks.push("No adapter has several A: there is nothing to compare across heads on that side.".to_string());
    }
    if analysis.a.points.iter().all(|point| point.place.is_none()) {
        remarks.push("Too few matrices for a t-SNE picture.".to_string());
    }
    remarks
}

/// Curves of what there is.
fn by_layer(analysis: &Analysis) -> Vec<Curve> {
    let curve = |(kind, between, compared): (&str, &str, &Compared)| {
        let points = compared.by_layer.iter().enumerate();
        let points: Vec<_> = points.filter_map(|(layer, s)| Some((layer as f64, s.as_ref()?.subspace))).collect();
        (!points.is_empty()).then(|| Curve { name: format!("{kind}, {between}"), points })
    };
    comparisons(analysis).into_iter().filter_map(curve).collect()
}

/// By adapter and by head where there are several, and by projection.
fn colourings(analysis: &Analysis, side: &Side) -> Vec<(&'static str, Vec<Group>)> {
    let name = |point: &Point| analysis.adapters[point.adapter].name.clone();
    let by_adapter = grouped(side, name);
    let by_head = grouped(side, |point| point.name.clone());
    let by_projection = grouped(side, |point| point.projection.to_string());
    let all = [("adapter", by_adapter), ("head", by_head), ("projection", by_projection)];
    all.into_iter().filter(|(by, groups)| groups.len() > 1 || (*by == "projection" && !groups.is_empty())).collect()
}

/// In the order in which they first occur; without points that have no place.
fn grouped(side: &Side, name: impl Fn(&Point) -> String) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for point in &side.points {
        let Some(place) = point.place else { continue };
        let name = name(point);
        match groups.iter_mut().find(|group| group.name == name) {
            Some(group) => group.points.push(place),
            None => groups.push(Group { name, points: vec![place] }),
        }
    }
    groups
}
