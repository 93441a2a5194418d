//! The analysis for people: tables on the terminal, charts, and `report.html`.

use crate::analyze::analysis::{About, Analysis, Point, Side, split};
use crate::analyze::gates::Gates;
use crate::analyze::similarity::{Compared, Similarity};
use crate::output::text_table;
use crate::report::{
    self, Axis, Chart, Kind, Look, Page, Series, count, details, figure, heat_maps, number, paragraph, row, table,
};
use anyhow::Result;
use std::path::Path;

const HEAD: [&str; 8] = ["matrix", "between", "pairs", "cosine", "CKA", "subspace", "by chance", "angle °"];

/// What the columns mean.
const LEGEND: &str = "Means over pairs of matrices at the same layer and projection. Cosine compares entry by entry. \
                      CKA and subspace (mean cos² of the principal angles) compare what a matrix reads (A) or writes \
                      (B), whatever the basis of its rank: 1 means the same; “by chance” is the subspace similarity \
                      of random matrices.";

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

/// Writes the charts and the page.
pub fn write(out: &Path, analysis: &Analysis) -> Result<()> {
    let adapters_of = count(analysis.adapters.len(), "adapter", "adapters");
    let mut page = Page::new(&format!("Inside {adapters_of}"), &lead(analysis));
    tiles(&mut page, analysis);
    let remarks: String = remarks(analysis).iter().map(|remark| paragraph(remark)).collect();
    page.section("Similarity of A and of B", &(table(&HEAD, &similarities(analysis)) + &paragraph(LEGEND) + &remarks));
    let by_layer = by_layer(analysis);
    if !by_layer.is_empty() {
        report::write_chart(&out.join("subspace.svg"), &by_layer)?;
        page.section("Similarity by layer", &figure(&by_layer, "", ""));
    }
    let clouds = clouds(out, analysis)?;
    if !clouds.is_empty() {
        let of = |side: &Side| side.perplexity.map_or("–".to_string(), number);
        let perplexity = format!("{TSNE} Perplexity: {} (A) and {} (B).", of(&analysis.a), of(&analysis.b));
        page.section("t-SNE of A and of B", &(paragraph(&perplexity) + &clouds));
    }
    let (head, rows) = adapters(analysis);
    page.section("Adapters", &table(&head, &rows));
    if !analysis.router.is_empty() {
        let (head, rows) = routers(analysis);
        page.section("Routers", &(table(&head, &rows) + &paragraph(ROUTER_LEGEND)));
    }
    for gates in &analysis.router {
        let title = |of: &str| format!("Mean router weight by category, layer and head, {of}");
        let mut html = heat_maps(&title("mean over projections"), &gates.routing(None));
        for projection in gates.projections() {
            html += &details(projection, &heat_maps(&title(projection), &gates.routing(Some(projection))));
        }
        page.section(&format!("Router of {}", gates.adapter), &html);
    }
    page.write(out)
}

const TSNE: &str = "One point for each layer, projection and head. Points that are close have similar entries; the \
                    axes and the distances between far points mean nothing.";

const ROUTER_LEGEND: &str = "Categories count alike. Entropy of a token's gate: 0 if it uses one head, 1 if all alike. Balance, the entropy \
     of the mean gate: 1 if all heads are used alike, 0 if one has all. The mutual information between head and \
     category says how much the head tells about the category; beside it, the most it could be.";

/// What was compared and what came of it.
fn lead(analysis: &Analysis) -> String {
    let names: Vec<&str> = analysis.adapters.iter().map(|about| about.name.as_str()).collect();
    let of = |compared: &Compared| compared.all.as_ref().map(|all| (all.subspace, all.chance));
    let said =
        |kind: &str, (found, chance): (f64, f64)| format!("{found:.3} for the {kind} matrices (by chance {chance:.3})");
    let both = [("A", of(&analysis.a.across_adapters)), ("B", of(&analysis.b.across_adapters))];
    let found: Vec<String> = both.into_iter().filter_map(|(kind, found)| Some(said(kind, found?))).collect();
    let found = match found.is_empty() {
        true => String::new(),
        false => format!(" Subspace similarity between adapters: {}.", found.join(", ")),
    };
    format!(
        "Do the A matrices of separately trained adapters agree while the B matrices differ? {}.{found}",
        names.join("; ")
    )
}

fn tiles(page: &mut Page, analysis: &Analysis) {
    page.tile(
        "Adapters",
        &analysis.adapters.len().to_string(),
        match analysis.same_seed {
            Some(true) => "trained with one seed",
            Some(false) if !analysis.shared_seeds().is_empty() => "some trained with the same seed",
            Some(false) => "trained with different seeds",
            None => "seeds not known",
        },
    );
    let points = [analysis.a.points.len(), analysis.b.points.len()].map(|n| n.to_string());
    page.tile("Matrices", &format!("{} A, {} B", points[0], points[1]), "over layers, projections and heads");
    for (between, compared) in [("adapters", &analysis.b.across_adapters), ("heads", &analysis.b.across_heads)] {
        if let Some(all) = &compared.all {
            let remark = format!("subspace; {} by chance", number(all.chance));
            page.tile(&format!("B between {between}"), &format!("{:.3}", all.subspace), &remark);
        }
    }
    if let [gates] = analysis.router.as_slice() {
        let bits = format!("{:.3} of {:.3} bits", gates.mean.mutual_information_bits, gates.most_bits);
        page.tile("Head and category", &bits, "mutual information");
    }
}

/// Pictures of A beside those of B, a row for each colouring.
fn clouds(out: &Path, analysis: &Analysis) -> Result<String> {
    let mut html = String::new();
    for by in ["adapter", "head", "projection"] {
        let mut figures = Vec::new();
        for (kind, side) in [("A", &analysis.a), ("B", &analysis.b)] {
            if let Some(chart) = cloud(analysis, side, kind, by) {
                report::write_chart(&out.join(format!("tsne-{}-by-{by}.svg", kind.to_lowercase())), &chart)?;
                figures.push(figure(&chart, "", ""));
            }
        }
        html += &if figures.is_empty() { String::new() } else { row(&figures) };
    }
    Ok(html)
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
        let mut cells: Vec<String> = [&about.name, about.method, about.gate].map(str::to_owned).to_vec();
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
        let mut cells = vec![gates.adapter.clone()];
        let n = &gates.mean;
        cells.extend(
            [n.entropy, n.balance, n.largest, n.mutual_information_bits, gates.most_bits].map(|x| format!("{x:.3}")),
        );
        cells
    };
    let head = ["router of", "entropy", "balance", "largest mean gate", "mutual information, bits", "at most, bits"];
    (head, analysis.router.iter().map(line).collect())
}

fn remarks(analysis: &Analysis) -> Vec<String> {
    let mut remarks = Vec::new();
    match (analysis.adapters.len(), analysis.same_seed) {
        (1, _) => remarks.push("One adapter: there is nothing to compare between adapters.".to_string()),
        (_, Some(true)) => remarks.push(
            "All adapters were trained with the same seed, so their A matrices started as the same matrices. They \
             may be similar only because they have moved little from there; see “cosine of A to its start”."
                .to_string(),
        ),
        (_, Some(false)) => remarks.extend(analysis.shared_seeds().iter().map(alike)),
        (_, None) => remarks.push(
            "Some folders have no run.json that states the seed, so the A matrices may have started as the same \
             matrices."
                .to_string(),
        ),
    }
    if analysis.adapters.iter().all(|about| about.heads == 1 || !split(about.method)) {
        remarks.push("No adapter has several A matrices: there is nothing to compare between heads for A.".to_string());
    }
    if analysis.a.points.iter().all(|point| point.place.is_none()) {
        remarks.push("Too few matrices for a t-SNE picture.".to_string());
    }
    remarks
}

/// What it means that some adapters, but not all, had one seed.
fn alike((seed, names): (&u64, &Vec<&str>)) -> String {
    let [first @ .., last] = names.as_slice() else { return String::new() };
    format!(
        "{} and {last} were trained with seed {seed}, so their A matrices started as the same matrices: the means between adapters \
         include these pairs.",
        first.join(", ")
    )
}

/// A line for each comparison that has pairs.
fn by_layer(analysis: &Analysis) -> Chart {
    let series = |(kind, between, compared): (&str, &str, &Compared)| {
        let points = compared.by_layer.iter().enumerate();
        let points: Vec<_> = points.filter_map(|(layer, s)| Some((layer as f64, s.as_ref()?.subspace))).collect();
        (!points.is_empty()).then(|| Series::new(&format!("{kind} between {between}"), Look::Marks, points))
    };
    Chart {
        title: "Subspace similarity by layer".into(),
        x: Axis::new("layer", Kind::Whole),
        y: Axis::new("mean cos² of the principal angles (1: the same subspace)", Kind::Linear),
        series: comparisons(analysis).into_iter().filter_map(series).collect(),
        rule: None,
    }
}

/// Points of one colour, and what each is.
#[derive(Default)]
struct Group {
    name: String,
    points: Vec<(f64, f64)>,
    notes: Vec<String>,
}

/// `None` where there are too few points, or one group only (but for projections, so that there is a picture).
fn cloud(analysis: &Analysis, side: &Side, kind: &str, by: &str) -> Option<Chart> {
    let name = |point: &Point| match by {
        "adapter" => analysis.adapters[point.adapter].name.clone(),
        "head" => point.name.clone(),
        _ => point.projection.to_string(),
    };
    // In the order in which they first occur.
    let mut groups: Vec<Group> = Vec::new();
    for point in &side.points {
        let Some(place) = point.place else { continue };
        let (name, adapter) = (name(point), &analysis.adapters[point.adapter].name);
        let at = groups.iter().position(|group| group.name == name).unwrap_or_else(|| {
            groups.push(Group { name, ..Group::default() });
            groups.len() - 1
        });
        groups[at].points.push(place);
        groups[at].notes.push(format!("{adapter}, layer {}, {}, {}", point.layer, point.projection, point.name));
    }
    let enough = groups.len() > 1 || (by == "projection" && !groups.is_empty());
    let axis = |i: u8| Axis::new(&format!("t-SNE dimension {i}"), Kind::Bare);
    enough.then(|| Chart {
        title: format!("t-SNE of the {kind} matrices, coloured by {by}"),
        x: axis(1),
        y: axis(2),
        series: groups.into_iter().map(|group| Series::cloud(&group.name, group.points, group.notes)).collect(),
        rule: None,
    })
}
