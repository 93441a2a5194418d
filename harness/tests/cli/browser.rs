//! Reports in headless Chromium: they render on a phone and on a screen, light and dark, the console is silent, pointer,
//! keys and clicks do what they should, and what is shown is what the JSON beside the report says. Skipped where there
//! is no browser, unless HYDRA_REQUIRE_BROWSER is set.

use super::compare::test_records;
use super::support::{Scratch, assets, column, json, succeeds};
use serde_json::{Value, json};
use std::fs;
use std::process::Command;

/// Looks at the page in the frame and uses it: what is there, what sticks out, what a pointer, a key and a click do.
const PROBE: &str = include_str!("probe.js");

pub fn browser() -> Option<&'static str> {
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
    visit(browser, scratch, &format!("file://{page}"), dark, &[])
}

/// The document that a browser has made of an address, and what its console said.
pub fn visit(browser: &str, scratch: &Scratch, address: &str, dark: bool, more: &[&str]) -> (String, Vec<String>) {
    let profile = scratch.path("profile");
    let _ = fs::remove_dir_all(&profile);
    let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
                 --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom";
    let scheme = format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 });
    let output = Command::new(browser)
        .args(flags.split_whitespace())
        .args([&format!("--user-data-dir={profile}"), &scheme])
        .args(more)
        .arg(address)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let console = said.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect();
    (String::from_utf8(output.stdout).unwrap(), console)
}

pub fn seen(document: &str) -> Value {
    let (_, rest) = document.split_once("<pre id=\"seen\">").expect("the page was looked at");
    serde_json::from_str(rest.split_once("</pre>").unwrap().0).unwrap()
}

/// "rgb(20, 23, 27)" → their mean.
pub fn brightness(colour: &Value) -> f64 {
    let numbers = colour.as_str().unwrap().trim_start_matches("rgb(").trim_end_matches(')');
    numbers.split(", ").map(|n| n.parse::<f64>().unwrap()).sum::<f64>() / 3.0
}

/// Renders a report on a screen and on a phone, and gives what is seen on the phone.
fn report(browser: &str, scratch: &Scratch, out: &str) -> Value {
    let html = fs::read_to_string(format!("{out}/report.html")).unwrap();
    assert!(!html.contains("http"), "self-contained");
    let mut phone = Value::Null;
    for (width, dark) in [(1400, true), (390, false)] {
        let (document, console) = open(browser, scratch, &html, width, dark);
        assert!(console.is_empty(), "{out}: {console:?}");
        phone = seen(&document);
        assert!(number(&phone["scroll"]) <= number(&phone["inner"]), "{out}: wider than {width} pixels");
        let (ink, paper) = (brightness(&phone["ink"]), brightness(&phone["paper"]));
        assert!(
            if dark { paper < 60.0 && ink > 200.0 } else { paper > 200.0 && ink < 60.0 },
            "{out}: {ink} on {paper}"
        );
        let at = format!("{out}, {width} pixels");
        assert!(phone["lead"].as_str().unwrap().len() > 40 && list(&phone["tiles"]).len() >= 4, "{at}: {phone}");
        list(&phone["charts"]).iter().for_each(|chart| well_drawn(chart, &at));
        list(&phone["heats"]).iter().for_each(|heat| well_mapped(heat, &at));
        for means in list(&phone["means"]) {
            assert_eq!((&means["outside"], &means["overlapping"]), (&json!([]), &json!([])), "{at} {}", means["title"]);
        }
        for table in list(&phone["tables"]) {
            sorts(table, &at);
        }
    }
    phone
}

/// A chart has titles, ticks that can be read, values under the pointer and the keyboard, and switches.
fn well_drawn(chart: &Value, at: &str) {
    let title = chart["title"].as_str().unwrap();
    assert!(!title.is_empty() && chart["x_title"] != "" && chart["y_title"] != "", "{at}: {chart}");
    assert!(number(&chart["width"]) > 200.0 && number(&chart["height"]) > 100.0, "{at} {title}: {chart}");
    assert_eq!((&chart["outside"], &chart["overlapping"]), (&json!([]), &json!([])), "{at} {title}");
    assert!(number(&chart["smallest"]) >= 12.0, "{at} {title}: text of {} pixels", chart["smallest"]);
    assert!(chart["description"].as_str().unwrap().starts_with(title), "{at} {title}: {}", chart["description"]);
    let cloud = chart["cloud"] == true;
    for axis in ["x_ticks", "y_ticks"].iter().filter(|_| !cloud) {
        assert!(list(&chart[axis]).len() >= 2, "{at} {title}: {}", chart[axis]);
    }
    let whole = ["step", "layer", "number of clusters", "categories trained on"].map(Value::from);
    if whole.contains(&chart["x_title"]) {
        let is_whole = |tick: &Value| tick.as_str().unwrap().replace(',', "").parse::<u32>().is_ok();
        assert!(list(&chart["x_ticks"]).iter().all(is_whole), "{at} {title}: {}", chart["x_ticks"]);
    }
    // Half way along, each series says what it is there; and so at the first key.
    let series = list(&chart["data"]["series"]);
    for said in ["hovered", "keyed"] {
        let said = chart[said].as_str().unwrap();
        assert!(!said.is_empty(), "{at} {title}");
        let named = |one: &Value| said.contains(one["name"].as_str().unwrap());
        let place = said.starts_with(chart["x_title"].as_str().unwrap());
        assert!(cloud || place && (series.len() == 1 || series.iter().any(named)), "{at} {title}: {said}");
    }
    if series.len() > 1 {
        assert_eq!(chart["toggled"], json!(["none", "false", "", "true"]), "{at} {title}");
    }
}

/// All heads are in one panel as wide as the page, names are whole, cells say what they are.
fn well_mapped(heat: &Value, at: &str) {
    let title = &heat["title"];
    let weights = heat["data"]["category, layer, head"].as_object().unwrap();
    let (names, first) = (weights.keys().cloned().collect::<Vec<_>>(), weights.values().next().unwrap());
    let (layers, heads) = (list(first).len(), list(&first[0]).len());
    assert_eq!(list(&heat["maps"]).len(), heads, "{at} {title}");
    assert_eq!(heat["outside"], json!([]), "{at} {title}");
    assert!(heat["key"].as_str().unwrap().contains(&format!("1/{heads}")), "{at} {title}: {}", heat["key"]);
    let mut levels = Vec::new();
    for (head, map) in list(&heat["maps"]).iter().enumerate() {
        assert_eq!(map["names"], json!(names), "{at} {title}");
        assert_eq!(list(&map["cells"]).len(), names.len() * layers, "{at} {title}");
        for (i, cell) in list(&map["cells"]).iter().enumerate() {
            let weight = number(&weights[&names[i / layers]][i % layers][head]);
            assert!((number(&cell["weight"]) - weight).abs() < 1e-3, "{at} {title}: {cell}, {weight}");
            assert!(number(&cell["width"]) > 2.0 && number(&cell["height"]) > 8.0, "{at} {title}: {cell}");
            levels.push((weight, number(&cell["level"])));
        }
        assert!(map["keyed"].as_str().unwrap().contains(&format!("layer 0, head {head}")), "{at}: {}", map["keyed"]);
    }
    // Colours follow the weights, and the middle one is that of 1/N.
    levels.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert!(levels.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{at} {title}: {levels:?}");
    let even = 1.0 / heads as f64;
    for (weight, level) in levels {
        assert!(level == 8.0 || (weight > even) == (level > 8.0), "{at} {title}: {weight} has colour {level}");
    }
}

/// A click on a heading sorts by its column, another one the other way round; headings stand as their columns do.
fn sorts(table: &Value, at: &str) {
    assert_eq!(table["aligned"], true, "{at}: {}", table["rows"][0]);
    let value = |text: &Value| {
        let text = text.as_str().unwrap().replace(',', "");
        let number: String = text.chars().take_while(|c| "+-.e0123456789".contains(*c)).collect();
        number.parse::<f64>().ok()
    };
    let up: Vec<f64> = list(&table["ascending"]).iter().filter_map(value).collect();
    let down: Vec<f64> = list(&table["descending"]).iter().filter_map(value).collect();
    assert!(up.is_sorted(), "{at}: {up:?}");
    assert!(down.is_sorted_by(|a, b| a >= b) && up.len() == down.len(), "{at}: {down:?}");
    assert_eq!(table["states"], json!(["ascending", "descending"]), "{at}");
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn chart<'a>(seen: &'a Value, kind: &str, title: &str) -> &'a Value {
    let found = list(&seen[kind]).iter().find(|chart| chart["title"] == title);
    found.unwrap_or_else(|| panic!("no picture {title:?} among {kind}"))
}

/// The rows of the table whose first heading and number of columns fit; all as texts.
fn table<'a>(seen: &'a Value, first: &str) -> &'a Vec<Value> {
    let found = list(&seen["tables"]).iter().find(|table| table["rows"][0][0] == first);
    list(&found.unwrap_or_else(|| panic!("no table of {first:?}"))["rows"])
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

/// Where a path's marks or a line's points are: x's, or y's downwards.
fn places(drawn: &Value, axis: usize) -> Vec<f64> {
    let text = drawn.as_str().unwrap().replace("h.01", " ").replace('M', "");
    let numbers: Vec<f64> = text.split([' ', ',']).filter_map(|number| number.parse().ok()).collect();
    numbers.chunks(2).map(|place| place[axis]).collect()
}

fn text(value: f64) -> String {
    format!("{value:.4}")
}

#[test]
fn reports_render_and_show_what_their_json_says() {
    let Some(browser) = browser() else { return };
    let scratch = Scratch::new("browser");
    // The check itself: it hears what goes wrong, and sees what sticks out.
    let bad = "<p style=\"width:500px\">x</p><script>nothing_there()</script>";
    let (document, console) = open(browser, &scratch, bad, 390, false);
    assert!(console.iter().any(|line| line.contains("nothing_there is not defined")), "{console:?}");
    assert!(number(&seen(&document)["scroll"]) > 390.0);

    let (model, train, test) =
        (assets("model"), assets("corpus/train.jsonl"), scratch.write("t.jsonl", test_records()));
    finetune(browser, &scratch, &model, &train, &test);
    let runs = compare(browser, &scratch, &model, &train, &test);
    analyze(browser, &scratch, &model, &test, &runs);
    heterogeneity(browser, &scratch, &model, &train, &test);
    cluster(browser, &scratch, &train);
}

fn finetune(browser: &str, scratch: &Scratch, model: &str, train: &str, test: &str) {
    let out = scratch.path("finetune");
    let recipe = "--targets all --steps 12 --batch 4 --lr 3e-3 --heads 3";
    succeeds(&format!("finetune --model {model} --data {train} --eval-data {test} --out {out} {recipe}"));
    let seen = report(browser, scratch, &out);
    let metrics = format!("{out}/metrics.jsonl");
    for (title, key) in
        [("Loss", "loss"), ("Learning rate", "lr"), ("Gradient norm", "grad_norm"), ("Throughput", "tokens_per_second")]
    {
        let line = &chart(&seen, "charts", title)["lines"][0];
        follows(&places(line, 1), &column(&metrics, key), 0.5);
        assert_eq!(list(&chart(&seen, "charts", title)["data"]["series"][0]["y"]).len(), 12);
    }
    let evals = fs::read_to_string(format!("{out}/evals.jsonl")).unwrap();
    let evals: Vec<Value> = evals.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rows = table(&seen, "category");
    assert_eq!(rows.len(), 1 + 4 + 1);
    for row in &rows[1..] {
        let of = |eval: &Value| match row[0].as_str().unwrap() {
            "all" => number(&eval["loss"]),
            name => number(&eval["categories"][name]["loss"]),
        };
        assert_eq!((&row[2], &row[3]), (&text(of(&evals[0])).into(), &text(of(&evals[1])).into()));
    }
    // What was run, and what came of it.
    let [before, after] = [&evals[0], &evals[1]].map(|eval| number(&eval["loss"]));
    let lead = seen["lead"].as_str().unwrap();
    for part in ["HydraLoRA (one A and 3 B of rank 4", "1,188 records", "12 steps", &text(before), &text(after)] {
        assert!(lead.contains(part), "{part:?} in {lead}");
    }
    let run = json(&format!("{out}/run.json"));
    let trainable = run["facts"]["trainable_parameters"].as_u64().unwrap();
    for (name, value) in [
        ("Held-out loss", format!("{before:.3} → {after:.3}")),
        ("Trainable parameters", format!("{},{:03}", trainable / 1000, trainable % 1000)),
        ("Steps", "12".into()),
    ] {
        let tile = list(&seen["tiles"]).iter().find(|tile| tile["name"] == name).unwrap();
        assert_eq!(tile["value"], value);
    }
}

/// Gives the folders of two adapters.
fn compare(browser: &str, scratch: &Scratch, model: &str, train: &str, test: &str) -> [String; 2] {
    let config = "seeds = [1, 2]\n[defaults]\ntargets = 'all'\nsteps = 4\nbatch = 4\nlr = 3e-3\n\
                  [mmlu]\nlimit = 2\nscoring = 'cloze'\n[[run]]\nname = 'LoRA & co'\nmethod = 'lora'\n[[run]]\nname = 'Hydra'\n";
    let (config, out) = (scratch.write("c.toml", config), scratch.path("compare"));
    let mmlu = assets("mmlu");
    succeeds(&format!(
        "compare --model {model} --data {train} --eval-data {test} --mmlu {mmlu} --config {config} --out {out}"
    ));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/compare.json")));
    let main = table(&seen, "run");
    let rows = list(&result["rows"]);
    let with_error =
        |estimate: &Value| format!("{} ± {}", text(number(&estimate["mean"])), text(number(&estimate["stderr"])));
    assert_eq!(main[1][4], text(number(&result["base"]["loss"]["loss"])));
    for (shown, row) in main[2..].iter().zip(rows) {
        assert_eq!(shown[0], row["name"]);
        assert_eq!(shown[1], row["trainable"].to_string());
        assert_eq!(shown[4], with_error(&row["scores"]["loss"]));
    }
    let difference = &rows[1]["difference"]["loss"];
    let [mid, low, high] = ["mean", "low", "high"].map(|key| number(&difference[key]));
    let difference = format!("{mid:+.4} [{low:+.4}, {high:+.4}]");
    assert_eq!(main[3][5], difference);
    let losses = list(&chart(&seen, "means", "Held-out loss")["rows"]);
    let means: Vec<f64> = rows.iter().map(|row| number(&row["scores"]["loss"]["mean"])).collect();
    let marks: Vec<f64> = losses.iter().map(|row| places(&row["mark"], 0)[0]).collect();
    follows(&marks, &means, 0.5);
    assert_eq!(
        (&losses[0]["name"], &losses[0]["value"]),
        (&"LoRA & co".into(), &with_error(&rows[0]["scores"]["loss"]).into())
    );
    let differences = &chart(&seen, "means", "Held-out loss: difference from “LoRA & co”")["rows"];
    assert_eq!((&differences[0]["name"], &differences[0]["value"]), (&"Hydra".into(), &difference.into()));
    // The categories' table has each category's mean of each run.
    let categories = table(&seen, "category");
    assert_eq!(categories.len(), 1 + 4);
    for shown in &categories[1..] {
        let estimate = &rows[1]["scores"]["categories"][shown[0].as_str().unwrap()];
        assert_eq!(shown[3], with_error(estimate));
    }
    [1, 2].map(|seed| format!("{out}/runs/hydra/seed-{seed}"))
}

fn analyze(browser: &str, scratch: &Scratch, model: &str, test: &str, runs: &[String; 2]) {
    let out = scratch.path("analyze");
    succeeds(&format!("analyze {} {} --model {model} --data {test} --out {out}", runs[0], runs[1]));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/analysis.json")));
    let shown = table(&seen, "matrix");
    for (row, (side, between)) in shown[1..].iter().zip([("a", "adapters"), ("b", "adapters"), ("b", "heads")]) {
        let similarity = &result[side][format!("across_{between}")]["all"];
        assert_eq!((&row[0], &row[1]), (&side.to_uppercase().into(), &between.into()));
        for (column, key) in [(3, "cosine"), (4, "cka"), (5, "subspace"), (6, "chance")] {
            assert_eq!(row[column], format!("{:.3}", number(&similarity[key])));
        }
    }
    for side in ["a", "b"] {
        let title = format!("t-SNE of the {} matrices, coloured by adapter", side.to_uppercase());
        let cloud = list(&chart(&seen, "charts", &title)["dots"]);
        let points = list(&result[side]["points"]);
        for (axis, key) in ["x", "y"].into_iter().enumerate() {
            let values: Vec<f64> = points.iter().map(|point| number(&point["place"][axis])).collect();
            // A group for each adapter, in the points' order.
            let drawn: Vec<f64> = cloud.iter().flat_map(|group| places(group, axis)).collect();
            follows(&drawn, &values, 0.5);
            assert!(key == "x" || drawn.len() == points.len());
        }
    }
    // The mean over projections of each category, layer and head.
    let router = &result["router"][0];
    let name = router["adapter"].as_str().unwrap();
    let heats = list(&seen["heats"]).iter().filter(|heat| heat["section"] == format!("Router of {name}"));
    let heats: Vec<&Value> = heats.collect();
    // All projections together, and one each.
    assert_eq!(heats.len(), 1 + 7);
    let weights = &heats[0]["data"]["category, layer, head"];
    let places = list(&router["places"]);
    for (category, layers) in weights.as_object().unwrap() {
        for (layer, heads) in list(layers).iter().enumerate() {
            for (head, weight) in list(heads).iter().enumerate() {
                let here = places.iter().filter(|p| p["layer"] == layer);
                let here: Vec<f64> = here.map(|p| number(&p["gate"][category][head])).collect();
                let mean = here.iter().sum::<f64>() / here.len() as f64;
                assert!((mean - number(weight)).abs() < 1e-4, "{category}, {layer}, {head}");
            }
        }
    }
}

fn heterogeneity(browser: &str, scratch: &Scratch, model: &str, train: &str, test: &str) {
    let config = "seeds = [1, 2]\n[defaults]\nsteps = 2\nlr = 3e-3\n[[run]]\nname = 'LoRA'\nmethod = 'lora'\n";
    let (config, out) = (scratch.write("h.toml", config), scratch.path("heterogeneity"));
    succeeds(&format!(
        "heterogeneity --model {model} --data {train} --eval-data {test} --records 8 --config {config} --out {out}"
    ));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/heterogeneity.json")));
    let points = list(&result["rows"][0]["points"]);
    let drawn = chart(&seen, "charts", "Loss on all held-out records");
    let means: Vec<f64> = points.iter().map(|point| number(&point["loss"]["mean"])).collect();
    follows(&places(&drawn["dots"][0], 1), &means, 0.5);
    // 1, 2 and 4 categories, on a logarithmic axis.
    follows(&places(&drawn["dots"][0], 0), &[0.0, 1.0, 2.0], 0.5);
    assert_eq!(drawn["x_ticks"], json!(["1", "2", "4"]));
    for (row, point) in table(&seen, "run")[1..].iter().zip(points) {
        let [mean, error] = ["mean", "stderr"].map(|key| text(number(&point["loss"][key])));
        assert_eq!((&row[1], &row[3]), (&point["categories"].to_string().into(), &format!("{mean} ± {error}").into()));
    }
}

fn cluster(browser: &str, scratch: &Scratch, train: &str) {
    let out = scratch.path("cluster");
    succeeds(&format!("cluster --data {train} --k 2..6 --out {out}"));
    let (seen, result) = (report(browser, scratch, &out), json(&format!("{out}/clusters.json")));
    let tried = list(&result["tried"]);
    for (title, key) in [("Inertia and its elbow", "inertia"), ("Silhouette, shown for comparison", "silhouette")] {
        let values: Vec<f64> = tried.iter().filter_map(|one| one[key].as_f64()).collect();
        follows(&places(&chart(&seen, "charts", title)["dots"][0], 1), &values, 0.5);
    }
    assert_eq!(chart(&seen, "charts", "Inertia and its elbow")["x_ticks"], json!(["1", "2", "3", "4", "5", "6"]));
    let rows = table(&seen, "cluster");
    let sizes: Vec<String> = list(&result["sizes"]).iter().map(Value::to_string).collect();
    assert_eq!(rows[1..].iter().map(|row| row[1].as_str().unwrap()).collect::<Vec<_>>(), sizes);
    for row in &table(&seen, "category")[1..] {
        let counts = list(&result["categories"][row[0].as_str().unwrap()]);
        for (shown, count) in list(row)[1..].iter().zip(counts) {
            assert_eq!(*shown, count.to_string());
        }
    }
}
