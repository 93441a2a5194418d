//! Reports in headless Chromium: they render on a phone and on a screen, light and dark, the console is silent, and what they show
//! is what the JSON beside them says. Skipped where there is no browser, unless HYDRA_REQUIRE_BROWSER is set.

use super::compare::test_records;
use super::support::{Scratch, assets, column, json, succeeds};
use serde_json::Value;
use std::fs;
use std::process::Command;

/// Looks at the page in the frame: what has a size, what sticks out, what tables and pictures say.
const PROBE: &str = "
function look(frame) {
  const d = frame.contentDocument, box = e => e.getBoundingClientRect();
  d.querySelectorAll('details').forEach(e => e.open = true);
  const svg = s => ({
    title: s.closest('section').querySelector('h2').textContent,
    width: box(s).width, height: box(s).height,
    clipped: [...s.querySelectorAll('text')].filter(t => box(t).left < box(s).left - 1 || box(t).right > box(s).right + 1
      || box(t).bottom > box(s).bottom + 1).map(t => t.textContent),
    smallest: Math.min(...[...s.querySelectorAll('text')].map(t => box(t).height)),
    marks: [...s.querySelectorAll('circle')].map(c => ({title: c.textContent, x: +c.getAttribute('cx'), y: +c.getAttribute('cy')})),
    cloud: [...s.querySelectorAll('.cloud circle')].map(c => ({x: +c.getAttribute('cx'), y: +c.getAttribute('cy')})),
    lines: [...s.querySelectorAll('polyline')].map(p => p.getAttribute('points')),
    cells: [...s.querySelectorAll('rect.cell')].map(r => ({title: r.textContent, opacity: +r.getAttribute('fill-opacity')})),
  });
  const rows = t => [...t.rows].map(r => [...r.cells].map(c => c.innerText));
  const style = frame.contentWindow.getComputedStyle(d.body);
  const seen = {
    inner: frame.contentWindow.innerWidth, scroll: d.documentElement.scrollWidth,
    ink: style.color, paper: style.backgroundColor,
    svgs: [...d.querySelectorAll('svg')].map(svg), tables: [...d.querySelectorAll('table')].map(rows),
  };
  const out = document.createElement('pre');
  out.id = 'seen';
  out.textContent = JSON.stringify(seen).replace(/[<>&\\u00a0]/g, c => '\\\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
  document.body.append(out);
}";

fn browser() -> Option<&'static str> {
    let there = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    let found = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(there);
    if found.is_none() {
        let why = "no Chromium here (Debian: apt-get install chromium)";
        assert!(std::env::var_os("HYDRA_REQUIRE_BROWSER").is_none(), "HYDRA_REQUIRE_BROWSER is set, and {why}");
        eprintln!("skipped: {why}, so that reports are not looked at");
    }
    found
}

/// A page of this width in pixels, as the browser has it: the document, and what the console said.
fn open(browser: &str, scratch: &Scratch, html: &str, width: usize, dark: bool) -> (String, Vec<String>) {
    let text = serde_json::to_string(html).unwrap().replace('<', "\\u003c");
    let page = format!(
        "<!doctype html><meta charset=\"utf-8\"><body><iframe id=\"frame\" style=\"width:{width}px;height:900px;border:0\"></iframe>\
         <script>{PROBE}\nframe.onload = () => look(frame);\nframe.srcdoc = {text};</script></body>"
    );
    let page = scratch.write("page.html", page);
    let profile = scratch.path("profile");
    let _ = fs::remove_dir_all(&profile);
    let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
                 --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom";
    let scheme = format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 });
    let output = Command::new(browser)
        .args(flags.split_whitespace())
        .args([&format!("--user-data-dir={profile}"), &scheme, &format!("file://{page}")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let console = said.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect();
    (String::from_utf8(output.stdout).unwrap(), console)
}

fn seen(document: &str) -> Value {
    let (_, rest) = document.split_once("<pre id=\"seen\">").expect("the page was looked at");
    serde_json::from_str(rest.split_once("</pre>").unwrap().0).unwrap()
}

/// "rgb(20, 23, 27)" → their mean.
fn brightness(colour: &Value) -> f64 {
    let numbers = colour.as_str().unwrap().trim_start_matches("rgb(").trim_end_matches(')');
    numbers.split(", ").map(|n| n.parse::<f64>().unwrap()).sum::<f64>() / 3.0
}

/// Renders a report both ways, and gives what is seen on the phone.
fn report(browser: &str, scratch: &Scratch, out: &str) -> Value {
    let html = fs::read_to_string(format!("{out}/report.html")).unwrap();
    assert!(!html.contains("http"), "self-contained");
    let mut phone = Value::Null;
    for (width, dark) in [(1000, true), (360, false)] {
        let (document, console) = open(browser, scratch, &html, width, dark);
        assert!(console.is_empty(), "{out}: {console:?}");
        phone = seen(&document);
        assert!(number(&phone["scroll"]) <= number(&phone["inner"]), "{out}: wider than {width} pixels");
        let (ink, paper) = (brightness(&phone["ink"]), brightness(&phone["paper"]));
        assert!(
            if dark { paper < 60.0 && ink > 200.0 } else { paper > 200.0 && ink < 60.0 },
            "{out}: {ink} on {paper}"
        );
        for svg in phone["svgs"].as_array().unwrap() {
            let title = &svg["title"];
            assert!(number(&svg["width"]) > 100.0 && number(&svg["height"]) > 30.0, "{out} {title}: {svg}");
            assert_eq!(svg["clipped"], serde_json::json!([]), "{out} {title}, {width} pixels");
            assert!(number(&svg["smallest"]) > 9.0, "{out} {title}: text of {} pixels", svg["smallest"]);
        }
    }
    phone
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn svg<'a>(seen: &'a Value, title: &str) -> &'a Value {
    let found = seen["svgs"].as_array().unwrap().iter().find(|svg| svg["title"] == title);
    found.unwrap_or_else(|| panic!("no picture {title:?}"))
}

/// Places are values times one factor plus one offset.
fn follows(places: &[f64], values: &[f64], tolerance: f64) {
    assert_eq!(places.len(), values.len());
    let by_value = |a: &usize, b: &usize| values[*a].total_cmp(&values[*b]);
    let (low, high) = ((0..values.len()).min_by(by_value).unwrap(), (0..values.len()).max_by(by_value).unwrap());
    let factor = (places[high] - places[low]) / (values[high] - values[low]);
    for (place, value) in places.iter().zip(values) {
        let want = places[low] + factor * (value - values[low]);
        assert!((place - want).abs() < tolerance, "{value} is at {place}, wanted {want}");
    }
}

fn coordinates(points: &Value, key: &str) -> Vec<f64> {
    points.as_array().unwrap().iter().map(|point| number(&point[key])).collect()
}

fn text(value: f64) -> String {
    format!("{value:.4}")
}

#[test]
fn reports_render_and_show_what_their_json_says() {
    let Some(browser) = browser() else { return };
    let scratch = Scratch::new("browser");
    // The check itself: it hears what goes wrong.
    let (_, console) =
        open(browser, &scratch, "<section><h2>x</h2></section><script>nothing_there()</script>", 360, false);
    assert!(console.iter().any(|line| line.contains("nothing_there is not defined")), "{console:?}");

    let (model, train, test) =
        (assets("model"), assets("corpus/train.jsonl"), scratch.write("t.jsonl", test_records()));
    finetune(browser, &scratch, &model, &train, &test);
    let runs = compare(browser, &scratch, &model, &train, &test);
    analyze(browser, &scratch, &model, &test, &runs);
    heterogeneity(browser, &scratch, &model, &train, &test);
    cluster(browser, &scratch, &train);
}

/// Where a polyline's points are, down the picture.
fn heights(line: &Value) -> Vec<f64> {
    let points = line.as_str().unwrap().split(' ');
    points.map(|point| point.split_once(',').unwrap().1.parse().unwrap()).collect()
}

fn finetune(browser: &str, scratch: &Scratch, model: &str, train: &str, test: &str) {
    let out = scratch.path("finetune");
    let recipe = "--targets all --steps 12 --batch 4 --lr 3e-3 --heads 3";
    succeeds(&format!("finetune --model {model} --data {train} --eval-data {test} --out {out} {recipe}"));
    let seen = report(browser, scratch, &out);
    let line = &svg(&seen, "Loss by step")["lines"][0];
    follows(&heights(line), &column(&format!("{out}/metrics.jsonl"), "loss"), 0.15);
    let evals = fs::read_to_string(format!("{out}/evals.jsonl")).unwrap();
    let evals: Vec<Value> = evals.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rows = seen["tables"][0].as_array().unwrap();
    assert_eq!(rows.len(), 1 + 4 + 1);
    for row in &rows[1..] {
        let of = |eval: &Value| match row[0].as_str().unwrap() {
            "all" => number(&eval["loss"]),
            name => number(&eval["categories"][name]["loss"]),
        };
        assert_eq!((&row[1], &row[2]), (&text(of(&evals[0])).into(), &text(of(&evals[1])).into()));
    }
}

/// Gives the folders of two adapters.
fn compare(browser: &str, scratch: &Scratch, model: &str, train: &str, test: &str) -> [String; 2] {
    let config = "seeds = [1, 2]\n[defaults]\ntargets = 'all'\nsteps = 4\nbatch = 4\nlr = 3e-3\n[bootstrap]\nsamples = 100\n\
                  [mmlu]\nlimit = 2\nscoring = 'cloze'\n[[run]]\nname = 'LoRA & co'\nmethod = 'lora'\n[[run]]\nname = 'Hydra'\n";
    let (config, out) = (scratch.write("c.toml", config), scratch.path("compare"));
    let mmlu = assets("mmlu");
    succeeds(&format!(
        "compare --model {model} --data {train} --eval-data {test} --mmlu {mmlu} --config {config} --out {out}"
    ));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/compare.json")));
    let table = seen["tables"][0].as_array().unwrap();
    let rows = result["rows"].as_array().unwrap();
    let with_error =
        |estimate: &Value| format!("{} ± {}", text(number(&estimate["mean"])), text(number(&estimate["stderr"])));
    assert_eq!(table[1][4], text(number(&result["base"]["loss"]["loss"])));
    for (shown, row) in table[2..].iter().zip(rows) {
        assert_eq!(shown[0], row["name"]);
        assert_eq!(shown[1], row["trainable"].to_string());
        assert_eq!(shown[4], with_error(&row["scores"]["loss"]));
    }
    let difference = &rows[1]["difference"]["loss"];
    let [mid, low, high] = ["mean", "low", "high"].map(|key| number(&difference[key]));
    assert_eq!(table[3][5], format!("{mid:+.4} [{low:+.4}, {high:+.4}]"));
    let marks = &svg(&seen, "Held-out loss, mean ± standard error")["marks"];
    let means: Vec<f64> = rows.iter().map(|row| number(&row["scores"]["loss"]["mean"])).collect();
    follows(&coordinates(marks, "x"), &means, 0.15);
    assert!(marks[0]["title"].as_str().unwrap().starts_with(&format!("LoRA & co: {:.4} [", means[0])));
    let difference = &svg(&seen, "Held-out loss less that of the first run, with the interval")["marks"][0]["title"];
    assert_eq!(difference, &format!("Hydra: {mid:.4} [{low:.4}, {high:.4}]"));
    // The categories' table has each category's mean of each run.
    let categories = seen["tables"].as_array().unwrap().iter().find(|table| table[0][0] == "category").unwrap();
    for shown in &categories.as_array().unwrap()[1..] {
        let estimate = &rows[1]["scores"]["categories"][shown[0].as_str().unwrap()];
        assert_eq!(shown[3], with_error(estimate));
    }
    [1, 2].map(|seed| format!("{out}/runs/hydra/seed-{seed}"))
}

fn analyze(browser: &str, scratch: &Scratch, model: &str, test: &str, runs: &[String; 2]) {
    let out = scratch.path("analyze");
    succeeds(&format!("analyze {} {} --model {model} --data {test} --out {out}", runs[0], runs[1]));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/analysis.json")));
    let shown = seen["tables"][0].as_array().unwrap();
    for (row, (side, between)) in shown[1..].iter().zip([("a", "adapters"), ("b", "adapters"), ("b", "heads")]) {
        let similarity = &result[side][format!("across_{between}")]["all"];
        assert_eq!((&row[0], &row[1]), (&side.to_uppercase().into(), &between.into()));
        for (column, key) in [(3, "cosine"), (4, "cka"), (5, "subspace"), (6, "chance")] {
            assert_eq!(row[column], format!("{:.3}", number(&similarity[key])));
        }
    }
    for side in ["a", "b"] {
        let cloud = &svg(&seen, &format!("t-SNE of the {}, coloured by adapter", side.to_uppercase()))["cloud"];
        let points = result[side]["points"].as_array().unwrap();
        for (axis, key) in ["x", "y"].into_iter().enumerate() {
            let values: Vec<f64> = points.iter().map(|point| number(&point["place"][axis])).collect();
            follows(&coordinates(cloud, key), &values, 0.02);
        }
    }
    // The first map, of head 0: the mean over projections of each category and layer.
    let router = &result["router"][0];
    let name = router["adapter"].as_str().unwrap();
    let cells = svg(&seen, &format!("Router of {name}, mean over projections"))["cells"].as_array().unwrap();
    let places = router["places"].as_array().unwrap();
    let mean = |category: &str, layer: usize| {
        let here: Vec<f64> =
            places.iter().filter(|p| p["layer"] == layer).map(|p| number(&p["gate"][category][0])).collect();
        here.iter().sum::<f64>() / here.len() as f64
    };
    let names: Vec<&String> = router["watched"].as_object().unwrap().keys().collect();
    assert_eq!(cells.len(), names.len() * 4);
    let (mut opacities, mut weights) = (Vec::new(), Vec::new());
    for (i, cell) in cells.iter().enumerate() {
        let (category, layer) = (names[i / 4], i % 4);
        assert_eq!(cell["title"], format!("{category}, layer {layer}: {:.3}", mean(category, layer)));
        opacities.push(number(&cell["opacity"]));
        weights.push(mean(category, layer));
    }
    follows(&opacities, &weights, 0.01);
}

fn heterogeneity(browser: &str, scratch: &Scratch, model: &str, train: &str, test: &str) {
    let config = "seeds = [1, 2]\n[defaults]\nsteps = 2\nlr = 3e-3\n[bootstrap]\nsamples = 50\n[[run]]\nname = 'LoRA'\nmethod = 'lora'\n";
    let (config, out) = (scratch.write("h.toml", config), scratch.path("heterogeneity"));
    succeeds(&format!(
        "heterogeneity --model {model} --data {train} --eval-data {test} --records 8 --config {config} --out {out}"
    ));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/heterogeneity.json")));
    let points = result["rows"][0]["points"].as_array().unwrap();
    let marks = &svg(&seen, "Loss on all held-out records by number of categories trained on")["marks"];
    let marks = Value::Array(marks.as_array().unwrap().iter().filter(|mark| mark["title"] != "").cloned().collect());
    let means: Vec<f64> = points.iter().map(|point| number(&point["loss"]["mean"])).collect();
    follows(&coordinates(&marks, "y"), &means, 0.15);
    // 1, 2 and 4 categories, on a logarithmic axis.
    follows(&coordinates(&marks, "x"), &[0.0, 1.0, 2.0], 0.15);
    for (row, point) in seen["tables"][0].as_array().unwrap()[1..].iter().zip(points) {
        let [mean, error] = ["mean", "stderr"].map(|key| text(number(&point["loss"][key])));
        assert_eq!((&row[1], &row[3]), (&point["categories"].to_string().into(), &format!("{mean} ± {error}").into()));
    }
}

fn cluster(browser: &str, scratch: &Scratch, train: &str) {
    let out = scratch.path("cluster");
    succeeds(&format!("cluster --data {train} --k 2..6 --out {out}"));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/clusters.json")));
    let tried = result["tried"].as_array().unwrap();
    for (title, key) in
        [("Inertia by number of clusters", "inertia"), ("Silhouette by number of clusters", "silhouette")]
    {
        let values: Vec<f64> = tried.iter().filter_map(|one| one[key].as_f64()).collect();
        follows(&heights(&svg(&seen, title)["lines"][0]), &values, 0.15);
    }
    let tables = seen["tables"].as_array().unwrap();
    let rows = tables[0].as_array().unwrap();
    let sizes: Vec<String> = result["sizes"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(rows[1..].iter().map(|row| row[1].as_str().unwrap()).collect::<Vec<_>>(), sizes);
    let categories = tables.iter().find(|table| table[0][0] == "category").unwrap();
    for row in &categories.as_array().unwrap()[1..] {
        let counts = &result["categories"][row[0].as_str().unwrap()];
        for (shown, count) in row.as_array().unwrap()[1..].iter().zip(counts.as_array().unwrap()) {
            assert_eq!(*shown, count.to_string());
        }
    }
}
