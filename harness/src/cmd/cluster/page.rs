//! `elbow.svg` and the report of a clustering.

use super::found::Found;
use crate::cluster::{self, Clustering};
use crate::report::{Axis, Chart, Kind, Look, Page, Series, figure, file_name, integer, number, paragraph, row, table};

/// The inertia by number of clusters, with the two lines that make the elbow.
pub fn elbow(found: &Found<'_>) -> Chart {
    let Clustering { k, tried, .. } = found.clustering;
    let points = tried.iter().map(|one| (one.k as f64, one.inertia)).collect();
    let mut series = vec![Series::new("inertia", Look::Marks, points)];
    let fitted = found.clustering.lines();
    let rule = fitted.is_some().then(|| (*k as f64, format!("chosen: {k}")));
    if let Some([to, from]) = fitted {
        series.push(Series::new(&format!("line fitted up to {k}"), Look::Fit, to));
        series.push(Series::new(&format!("line fitted from {k} on"), Look::Fit, from));
    }
    let y = Axis::new("sum of squared distances to the centroids", Kind::Linear);
    Chart { title: "Inertia and its elbow".into(), x: clusters_axis(), y, series, rule }
}

fn silhouette(found: &Found<'_>) -> Chart {
    let points = found.clustering.tried.iter().filter_map(|one| Some((one.k as f64, one.silhouette?))).collect();
    let series = vec![Series::new("mean silhouette", Look::Marks, points)];
    let y = Axis::new("mean silhouette (1: well separated, 0: overlapping)", Kind::Linear);
    Chart { title: "Silhouette, shown for comparison".into(), x: clusters_axis(), y, series, rule: None }
}

/// The page.
pub fn page(found: &Found<'_>) -> Page {
    let Clustering { k, reason, tried, sizes, terms, nearest, .. } = found.clustering;
    let files: Vec<String> = found.data.iter().map(|path| file_name(&path.display().to_string())).collect();
    let mut page = Page::new(&format!("{k} clusters in {}", files.join(", ")), &lead(found));
    tiles(found, &mut page);
    if tried.len() > 1 {
        let why = paragraph(&format!("Why {k}: {reason}."));
        let charts = [figure(&elbow(found), "", "k"), figure(&silhouette(found), "", "k")];
        page.section("Number of clusters", &(why + &row(&charts)));
    }
    let rows = sizes.iter().zip(terms).enumerate();
    let rows: Vec<_> =
        rows.map(|(c, (size, terms))| vec![c.to_string(), integer(*size as u64), terms.join(" ")]).collect();
    page.section("Clusters", &table(&["cluster", "records", "most characteristic terms"], &rows));
    let near = nearest.iter().enumerate().flat_map(|(c, near)| near.iter().map(move |near| (c, near)));
    let line = |(c, near): (usize, &cluster::Near)| {
        vec![c.to_string(), near.record.to_string(), format!("{:.3}", near.distance), near.instruction.clone()]
    };
    let head = ["cluster", "record", "distance", "instruction"];
    page.section("Records nearest to the centroids", &table(&head, &near.map(line).collect::<Vec<_>>()));
    if let Some(agreement) = found.agreement {
        page.section("Clusters and categories", &categories(found, agreement));
    }
    page
}

fn categories(found: &Found<'_>, agreement: f64) -> String {
    let names: Vec<String> = (0..found.clustering.k).map(|c| format!("cluster {c}")).collect();
    let head: Vec<&str> = ["category"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let row = |(name, counts): (&String, &Vec<usize>)| {
        [name.clone()].into_iter().chain(counts.iter().map(|&n| integer(n as u64))).collect()
    };
    let rows: Vec<_> = found.meeting.iter().map(row).collect();
    let agree = format!(
        "Records of each category (rows) in each cluster (columns). Adjusted Rand index: {agreement:.3} (1: the same \
         partition, 0: unrelated)."
    );
    paragraph(&agree) + &table(&head, &rows)
}

/// What was done and what came of it.
fn lead(found: &Found<'_>) -> String {
    let Clustering { k, dimensions, without_terms, .. } = found.clustering;
    let without = match without_terms {
        0 => String::new(),
        n => format!(" {n} records have none of the counted terms."),
    };
    format!(
        "{} records fall into {k} clusters by k-means on TF-IDF vectors of instruction and context, reduced to \
         {dimensions} dimensions; seed {}.{without}",
        integer(found.records.len() as u64),
        found.seed
    )
}

fn tiles(found: &Found<'_>, page: &mut Page) {
    let Clustering { k, tried, vocabulary, sample, sizes, .. } = found.clustering;
    let numbers = match tried.as_slice() {
        [first, .., last] => format!("{} to {} tried", first.k, last.k),
        _ => "as asked for".to_string(),
    };
    page.tile("Clusters", &k.to_string(), &numbers);
    let [most, least] = [sizes.iter().max(), sizes.iter().min()].map(|n| integer(n.copied().unwrap_or(0) as u64));
    page.tile("Records", &integer(found.records.len() as u64), &format!("{least} to {most} in a cluster"));
    page.tile("Terms", &integer(*vocabulary as u64), "in two records or more, in half of them at most");
    if let Some(silhouette) = tried.iter().find(|one| one.k == *k).and_then(|one| one.silhouette) {
        page.tile("Mean silhouette", &number(silhouette), &format!("{} records", integer(*sample as u64)));
    }
    if let Some(agreement) = found.agreement {
        page.tile("Agreement", &format!("{agreement:.3}"), "adjusted Rand index with the categories");
    }
}

fn clusters_axis() -> Axis {
    Axis::new("number of clusters", Kind::Whole)
}
