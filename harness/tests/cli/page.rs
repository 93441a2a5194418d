//! The server's page in headless Chromium: it asks two adapters, and its colours are those of the gates that the API has.
//! Skipped where there is no browser, unless HYDRA_REQUIRE_BROWSER is set.

use super::browser::{brightness, browser, seen, visit};
use super::server::{Server, adapter, chat_model};
use super::support::Scratch;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

const QUESTION: &str = "Name three <b>uses</b> of a hydra.";
/// Uses the page in a frame.
const PROBE: &str = include_str!("page.js");

/// A server of this origin's own page `/probe`, which has the server's page in a frame, and of all that the server has.
fn beside(server: &Server, width: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let question = json!(QUESTION).to_string().replace('<', "\\u003c");
    let page = format!(
        "<!doctype html><meta charset=\"utf-8\"><link rel=\"icon\" href=\"data:,\"><body style=\"margin:0\">\
         <iframe id=\"frame\" style=\"width:{width}px;height:800px;border:0\"></iframe>\
         <script>const QUESTION = {question};\n{PROBE}\n\
         frame.onload = () => use(frame).then(show, error => show(String(error)));\nframe.src = '/';</script></body>"
    );
    let page = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
        page.len()
    );
    let server = server.address.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (page, server) = (page.clone(), server.clone());
            std::thread::spawn(move || pass_on(stream.unwrap(), &page, &server));
        }
    });
    address
}

/// Answers `/probe`, and passes other requests on, one for each connection.
fn pass_on(mut client: TcpStream, page: &str, server: &str) {
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    let head = loop {
        match client.read(&mut buffer) {
            Ok(count @ 1..) => request.extend_from_slice(&buffer[..count]),
            // A browser opens connections that it doesn't use.
            _ => return,
        }
        if let Some(end) = request.windows(4).position(|four| four == b"\r\n\r\n") {
            break String::from_utf8_lossy(&request[..end]).into_owned();
        }
    };
    if head.starts_with("GET /probe ") {
        client.write_all(page.as_bytes()).unwrap();
        return;
    }
    let mut server = TcpStream::connect(server).unwrap();
    let closing = head.replace("Connection: keep-alive", "Connection: close");
    server.write_all(closing.as_bytes()).unwrap();
    server.write_all(&request[head.len()..]).unwrap();
    let (mut sender, mut body) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut sender, &mut body);
    });
    let _ = std::io::copy(&mut server, &mut client);
    let _ = client.shutdown(std::net::Shutdown::Both);
}

/// The strongest head of each token of an answer that has text, over the places that `counts` chooses; −1 where there is no choice.
fn strongest(answer: &Value, counts: impl Fn(&Value) -> bool) -> Vec<i64> {
    let (hydra, length) = (&answer["hydra"], answer["message"]["content"].as_str().unwrap().chars().count());
    // An empty answer has no tokens.
    let all = hydra["tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ends = all.iter().skip(1).map(|next| next["offset"].clone()).chain([length.into()]);
    let tokens: Vec<&Value> =
        all.iter().zip(ends).filter(|(token, end)| token["offset"] != *end).map(|(t, _)| t).collect();
    let Some(heads) = hydra["heads"].as_u64().filter(|&heads| heads > 1) else { return vec![-1; tokens.len()] };
    let places = hydra["places"].as_array().unwrap();
    let of_token = |token: &&Value| {
        let gates: Vec<f64> = token["gates"].as_array().unwrap().iter().map(|gate| gate.as_f64().unwrap()).collect();
        let sum = |head: usize| {
            let rows = places.iter().enumerate().filter(|(_, place)| counts(place));
            rows.map(|(row, _)| gates[row * heads as usize + head]).sum::<f64>()
        };
        (0..heads as usize).rev().max_by(|&a, &b| sum(a).total_cmp(&sum(b))).unwrap() as i64
    };
    tokens.iter().map(of_token).collect()
}

#[test]
fn the_page_asks_adapters_and_colours_tokens_by_their_heads() {
    let Some(browser) = browser() else { return };
    let scratch = Scratch::new("serve-page");
    let model = chat_model(&scratch);
    let (hydra, lora) = (adapter(&scratch, "hydra", "--targets all"), adapter(&scratch, "lora", "--method lora"));
    let server = Server::start(&format!("--model {model} --adapter hydra={hydra} --adapter lora={lora}"));
    let wanted = ["tiny", "hydra", "lora"].map(|name| {
        let messages = json!([{ "role": "user", "content": QUESTION }]);
        let body =
            json!({ "model": name, "messages": messages, "temperature": 0, "max_tokens": 8, "hydra_gates": true });
        server.post("/v1/chat/completions", &body).ok()["choices"][0].clone()
    });
    for (width, dark) in [(1400, true), (390, false)] {
        let address = format!("http://{}/probe", beside(&server, width));
        let (document, console) = visit(browser, &scratch, &address, dark, &[]);
        let seen = seen(&document);
        assert!(seen.is_object(), "{width}: {seen}");
        assert_eq!(console, [""; 0], "{width}");
        assert_eq!(seen["models"], json!(["tiny", "hydra", "lora"]));
        assert_eq!(seen["asked"], json!([QUESTION, "again"]));
        assert_eq!((&seen["unlabelled"], &seen["after_reset"]), (&json!([]), &json!(0)));
        assert!(seen["scroll"].as_f64() <= seen["inner"].as_f64(), "wider than {width} pixels");
        let (ink, paper) = (brightness(&seen["ink"]), brightness(&seen["paper"]));
        assert!(if dark { paper < 60.0 && ink > 200.0 } else { paper > 200.0 && ink < 60.0 }, "{ink} on {paper}");
        assert_eq!(seen["legend"].as_array().unwrap().len(), 4, "{}", seen["legend"]);
        // The heads' colours stand in one line, and differ.
        let dots = seen["dots"].as_array().unwrap();
        assert!(dots.iter().all(|dot| dot[0].as_f64().unwrap() > 5.0 && dot[1] == dots[0][1]), "{dots:?}");
        assert!((1..dots.len()).all(|i| dots[i][2] != dots[i - 1][2]), "{dots:?}");
        let answers = seen["answers"].as_array().unwrap();
        for (i, (answer, wanted)) in answers.iter().zip(&wanted).enumerate() {
            assert_eq!(answer["text"], wanted["message"]["content"], "{answer}");
            assert!(answer["note"].as_str().unwrap().contains("tokens"), "{answer}");
            assert_eq!(answer["heads"], json!(strongest(wanted, |_| true)), "{}", answer["model"]);
            let of_one = |place: &Value| place["layer"] == 1 && place["projection"] == "up_proj";
            assert_eq!(seen["one_place"][i], json!(strongest(wanted, of_one)), "{}", answer["model"]);
        }
        let hydra = &answers[1];
        for said in ["hovered", "keyed"] {
            let said = hydra[said].as_str().unwrap();
            let weights: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            // "head 0 0.251": the heads' numbers are whole.
            let sum: f64 = weights.iter().filter(|weight| weight.fract() != 0.0).sum();
            assert!((sum - 1.0).abs() < 5e-3, "{width}: {said:?}");
        }
        assert_eq!(hydra["left_alone"], true);
        let inner = seen["inner"].as_f64().unwrap();
        assert!(hydra["tip"]["left"].as_f64().unwrap() >= 0.0 && hydra["tip"]["right"].as_f64().unwrap() <= inner);
        // Side by side on a screen, one below the other on a phone.
        let [first, second] = [&answers[0], &answers[1]].map(|answer| answer["top"].as_f64().unwrap());
        assert_eq!(first == second, width > 1000, "{width}: {first}, {second}");
    }
}
