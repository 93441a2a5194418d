//! `hydra serve` as its clients meet it, over loopback, on the demo's tiny model.

use super::server::{Reply, Server, adapter, chat_model};
use super::support::{Scratch, assets, command, fails, succeeds};
use hydra_runtime::checkpoint::Checkpoint;
use serde_json::{Value, json};
use std::io::Read;

/// Prompts of the demo's domains.
const PROMPTS: [&str; 4] = ["What is 3 plus 4?", "Name three", "Once upon a time", "The capital of"];

fn completion(server: &Server, model: &str, prompt: impl Into<Value>, more: Value) -> Value {
    let mut body = json!({ "model": model, "prompt": prompt.into(), "temperature": 0, "max_tokens": 12 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    server.post("/v1/completions", &body).ok()
}

fn text(choice: &Value) -> &str {
    choice["text"].as_str().unwrap()
}

/// What `hydra generate` continues a prompt with.
fn generated(model: &str, adapter: Option<&str>, prompt: &str) -> String {
    let mut command = command(&format!("generate --model {model} --max-tokens 12"));
    command.args(["--prompt", prompt]);
    if let Some(adapter) = adapter {
        command.args(["--adapter", adapter]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().strip_suffix('\n').unwrap().into()
}

#[test]
fn completions_are_those_of_the_command_line_alone_and_together() {
    let scratch = Scratch::new("serve-completions");
    let model = chat_model(&scratch);
    let (hydra, lora) = (adapter(&scratch, "hydra", "--targets all"), adapter(&scratch, "lora", "--method lora"));
    let adapters = format!("--adapter hydra={hydra} --adapter lora={lora}");
    let server = Server::start(&format!("--model {model} {adapters} --parallel 3 --ctx 300"));

    let models = server.get("/v1/models").ok();
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert_eq!((&models["object"], names), (&"list".into(), vec!["tiny", "hydra", "lora"]));
    assert_eq!(models["data"][0]["max_model_len"], 300);
    assert_eq!(server.get("/v1/models/lora").ok()["parent"], "tiny");
    assert_eq!(server.get("/v1/models/none").status, 404);

    let kinds = [("tiny", None), ("hydra", Some(hydra.as_str())), ("lora", Some(lora.as_str()))];
    let wanted: Vec<(&str, &str, String)> = kinds
        .iter()
        .flat_map(|(name, folder)| PROMPTS.map(|prompt| (*name, prompt, generated(&model, *folder, prompt))))
        .collect();
    assert_ne!(wanted[0].2, wanted[4].2, "the adapter changes what is said");
    let check = |(name, prompt, wanted): &(&str, &str, String)| {
        let answer = completion(&server, name, *prompt, json!({}));
        assert_eq!(text(&answer["choices"][0]), wanted, "{name} after {prompt:?}");
    };
    wanted.iter().for_each(check);
    // Four times as many clients as slots.
    std::thread::scope(|scope| wanted.iter().for_each(|one| drop(scope.spawn(move || check(one)))));

    // What prompts share is computed once, and changes nothing.
    let long = "Name three uses of a hydra. ".repeat(12);
    let first = completion(&server, "hydra", long.as_str(), json!({}));
    let hits = server.metric("hydra_prefix_hit_tokens_total");
    let again = completion(&server, "hydra", long.as_str(), json!({}));
    assert_eq!(first["choices"], again["choices"]);
    assert!(server.metric("hydra_prefix_hit_tokens_total") >= hits + 64.0);

    // Several prompts, as texts and as token ids; several choices of each.
    let all = completion(&server, "tiny", json!(PROMPTS), json!({ "n": 2, "temperature": 0.8, "seed": 5 }));
    let choices = all["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    assert_ne!(text(&choices[0]), text(&choices[1]), "choices of one prompt are drawn apart");
    let again = completion(&server, "tiny", PROMPTS[0], json!({ "n": 2, "temperature": 0.8, "seed": 5 }));
    assert_eq!(again["choices"].as_array().unwrap()[..], choices[..2], "a seed repeats them");
    // Equal prompts of one request are drawn apart, too, unless there is a seed.
    let twice = |more| {
        let all = completion(&server, "tiny", json!([PROMPTS[0], PROMPTS[0]]), more);
        [0, 1].map(|i| text(&all["choices"][i]).to_string())
    };
    let [one, two] = twice(json!({ "temperature": 2 }));
    assert_ne!(one, two);
    let [one, two] = twice(json!({ "temperature": 2, "seed": 5 }));
    assert_eq!(one, two);
    let tokenizer = Checkpoint::open(&model).unwrap().tokenizer().unwrap();
    let ids = PROMPTS.map(|prompt| tokenizer.encode_prompt(prompt).unwrap());
    let by_ids = completion(&server, "tiny", json!(ids), json!({}));
    assert_eq!(by_ids["usage"]["prompt_tokens"], ids.iter().map(Vec::len).sum::<usize>());
    for ((choice, ids), (.., wanted)) in by_ids["choices"].as_array().unwrap().iter().zip(&ids).zip(&wanted) {
        assert_eq!(text(choice), wanted);
        assert_eq!(completion(&server, "tiny", json!(ids), json!({}))["choices"][0]["text"], *wanted);
    }
    // Stop strings cut what was generated.
    let whole = &wanted[0].2;
    let stop: String = whole.chars().skip(3).take(2).collect();
    let cut = completion(&server, "tiny", PROMPTS[0], json!({ "stop": [stop, "never there"] }));
    assert_eq!(text(&cut["choices"][0]), &whole[..whole.find(&stop).unwrap()]);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
}

#[test]
fn log_probabilities_echo_and_streams_agree() {
    let scratch = Scratch::new("serve-logprobs");
    let model = chat_model(&scratch);
    let server = Server::start(&format!("--model {model}"));
    let options = json!({ "logprobs": 3, "echo": true, "max_tokens": 6 });
    let answer = completion(&server, "tiny", PROMPTS[0], options.clone());
    let choice = &answer["choices"][0];
    assert!(text(choice).starts_with(PROMPTS[0]));
    let logprobs = &choice["logprobs"];
    let list = |key: &str| logprobs[key].as_array().unwrap();
    let (tokens, values, top) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    let usage = &answer["usage"];
    assert_eq!(usage["total_tokens"], tokens.len());
    assert!(values[0].is_null() && top[0].is_null() && tokens[0] == "<s>");
    for ((token, value), top) in tokens.iter().zip(values).zip(top).skip(1) {
        let value = value.as_f64().unwrap();
        let top = top.as_object().unwrap();
        assert!(value <= 0.0 && (3..=4).contains(&top.len()), "{token}: {top:?}");
        assert!(top.values().all(|other| other.as_f64().unwrap() <= 0.0));
    }
    // Greedy: what was drawn is the likeliest.
    let drawn = usage["completion_tokens"].as_u64().unwrap() as usize;
    for (value, top) in values.iter().zip(top).rev().take(drawn) {
        let best = top.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(value.as_f64().unwrap(), best);
    }
    let offsets: Vec<usize> = list("text_offset").iter().map(|offset| offset.as_u64().unwrap() as usize).collect();
    assert!(offsets.is_sorted() && offsets[1] == 0);
    // Scored again as a prompt, what was generated has the same log-probabilities.
    let prompt = Checkpoint::open(&model).unwrap().tokenizer().unwrap().encode_prompt(text(choice)).unwrap();
    let scored = completion(&server, "tiny", json!(prompt), json!({ "logprobs": 0, "echo": true, "max_tokens": 0 }));
    let scored = &scored["choices"][0]["logprobs"];
    assert_eq!(scored["tokens"], logprobs["tokens"]);
    for (a, b) in scored["token_logprobs"].as_array().unwrap().iter().zip(values).skip(1) {
        assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4, "{a} {b}");
    }

    // A stream says the same in pieces.
    let mut body = json!({ "model": "tiny", "prompt": PROMPTS[0], "temperature": 0, "stream": true,
                           "stream_options": { "include_usage": true } });
    body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    let events = server.post("/v1/completions", &body).events();
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!((&last["usage"], &last["choices"]), (usage, &json!([])));
    let joined: String = pieces.iter().map(|piece| text(&piece["choices"][0])).collect();
    assert_eq!(joined, text(choice));
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts = pieces.iter().flat_map(|piece| piece["choices"][0]["logprobs"][key].as_array().unwrap().clone());
        assert_eq!(&parts.collect::<Vec<_>>(), list(key), "{key}");
    }
    assert!(pieces.iter().all(|piece| piece["usage"].is_null() && piece["id"] == pieces[0]["id"]));
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], choice["finish_reason"]);

    // The token that ends a text has a log-probability, too, so that the last token of an answer can be told.
    let scored = completion(&server, "tiny", PROMPTS[0], json!({ "logprobs": 0, "max_tokens": 1, "echo": true }));
    let count = scored["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len();
    assert_eq!(scored["usage"]["prompt_tokens"].as_u64().unwrap() as usize + 1, count);

    chat(&server);
}

fn chat(server: &Server) {
    let messages = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Name three" }]);
    let mut body = json!({ "model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 8,
                           "logprobs": true, "top_logprobs": 2 });
    let whole = server.post("/v1/chat/completions", &body).ok();
    let choice = &whole["choices"][0];
    let content = choice["message"]["content"].as_str().unwrap();
    assert_eq!((&whole["object"], &choice["message"]["role"]), (&"chat.completion".into(), &"assistant".into()));
    let rendered = "system: Be brief.\nuser: Name three\nassistant:";
    assert_eq!(content, text(&completion(server, "tiny", rendered, json!({ "max_tokens": 8 }))["choices"][0]));
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(logprobs.len() as u64, whole["usage"]["completion_tokens"].as_u64().unwrap());
    let bytes: Vec<u8> = logprobs
        .iter()
        .flat_map(|one| one["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert_eq!(String::from_utf8_lossy(&bytes), content);
    assert!(logprobs.iter().all(|one| one["top_logprobs"].as_array().unwrap().len() == 2));
    body["stream"] = true.into();
    let events = server.post("/v1/chat/completions", &body).events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    let joined: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(joined, content);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], choice["finish_reason"]);
    body["messages"][1]["content"] = "Name three ".repeat(300).into();
    let error = server.post("/v1/chat/completions", &body).json()["error"].clone();
    assert_eq!((&error["code"], &error["param"]), (&"context_length_exceeded".into(), &"messages".into()), "{error}");
}

#[test]
fn what_is_wrong_is_said_in_openais_shape() {
    let scratch = Scratch::new("serve-errors");
    let server = Server::start(&format!("--model {} --max-body 1 --parallel 1 --queue 1", assets("model")));
    let refused = |reply: Reply, status: u16, code: Value, wanted: &str| {
        assert_eq!(reply.status, status, "{reply:?}");
        let error = &reply.json()["error"];
        assert_eq!(error["code"], code, "{error}");
        assert!(error["message"].as_str().unwrap().contains(wanted), "{wanted:?} in {error}");
        assert!(error["type"].is_string() && error.as_object().unwrap().contains_key("param"), "{error}");
    };
    let post = |body: &str| server.request("POST", "/v1/completions", &[], body);
    refused(post("{"), 400, Value::Null, "not JSON");
    refused(post("{\"model\": \"model\", \"prompt\": \"a\", \"temperature\": NaN}"), 400, Value::Null, "not JSON");
    refused(post("{\"model\": \"model\", \"prompt\": 1}"), 400, Value::Null, "prompt: expected");
    refused(post("{\"model\": \"gpt-4\", \"prompt\": \"a\"}"), 404, "model_not_found".into(), "/v1/models");
    refused(post("{\"model\": \"model\", \"prompt\": [2048]}"), 400, Value::Null, "below 2048, found 2048");
    let long = json!({ "model": "model", "prompt": vec![5; 512] }).to_string();
    refused(post(&long), 400, "context_length_exceeded".into(), "512 tokens: expected at most 511");
    refused(post("{\"model\": \"model\", \"prompt\": \"a\", \"n\": 3}"), 400, Value::Null, "3 sequences");
    let body = "x".repeat((1 << 20) + 1);
    refused(post(&body), 413, "request_too_large".into(), "1048576 bytes");
    let plain = [("Content-Type", "text/plain")];
    refused(server.request("POST", "/v1/completions", &plain, "{}"), 415, Value::Null, "application/json");
    refused(server.get("/v1/completions"), 405, "method_not_allowed".into(), "method");
    refused(server.get("/v2/models"), 404, "unknown_url".into(), "/v2/models");
    refused(server.get("/v1/models/%FF"), 404, "unknown_url".into(), "%FF");
    refused(server.post("/v1/embeddings", &json!({})), 400, Value::Null, "no embeddings");
    let chat = json!({ "model": "model", "messages": [{ "role": "user", "content": "a" }] });
    refused(server.post("/v1/chat/completions", &chat), 400, Value::Null, "no chat template");
    let mut tools = chat.clone();
    tools["tools"] = json!([{ "type": "function" }]);
    refused(server.post("/v1/chat/completions", &tools), 400, "unsupported_parameter".into(), "does not call tools");
    refused(server.request("GET", "/v1/models", &[("Host", "evil.example")], ""), 403, Value::Null, "--allow-host");
    let load = json!({ "lora_name": "a", "lora_path": "/etc" });
    refused(server.post("/v1/load_lora_adapter", &load), 403, Value::Null, "--adapter-dir");
    assert_eq!(server.get("/health").ok(), json!({ "status": "ok" }));
    assert!(
        server.get("/metrics").body.contains("hydra_http_requests_total{path=\"/v1/completions\",status=\"413\"} 1")
    );

    // What is wrong with the command line.
    let model = assets("model");
    let key = scratch.write("key", "short\n");
    fails(1, &format!("serve --model {model} --api-key-file {key}"), &["key: expected a line of at least 16"]);
    fails(1, &format!("serve --model {model} --ctx 513"), &["--ctx: expected a number from 2 to 512", "513"]);
    fails(2, &format!("serve --model {model} --adapter =run"), &["expected PATH or NAME=PATH"]);
    fails(
        1,
        &format!("serve --model {model} --parallel 1000000000"),
        &["--parallel 1000000000 and --prompt-tokens 256: "],
    );
    fails(
        1,
        &format!("serve --model {model} --adapter a={}", scratch.path("none")),
        &["--adapter a: ", "none: No such file"],
    );
    let taken = server.address.rsplit_once(':').unwrap().1;
    fails(1, &format!("serve --model {model} --port {taken}"), &["can't listen on 127.0.0.1"]);
}

/// A request that takes long: many choices, one after another.
fn long_request(stream: bool) -> String {
    json!({ "model": "model", "prompt": "Once", "n": 100, "max_tokens": 500, "temperature": 2, "seed": 1, "stream": stream })
        .to_string()
}

#[test]
fn whoever_goes_away_leaves_a_free_slot_and_who_comes_too_late_may_come_again() {
    let server = Server::start(&format!("--model {} --parallel 1 --queue 99", assets("model")));
    for stream in [true, false] {
        let before = server.metric("hydra_disconnected_total");
        let mut connection = server.send("POST", "/v1/completions", &[], &long_request(stream));
        if stream {
            let mut bytes = [0; 512];
            assert!(connection.read(&mut bytes).unwrap() > 0);
        }
        server.until("it runs", |server| server.metric("hydra_requests_running") == 1.0);
        // It needs all places, and some are taken.
        let busy = server.request("POST", "/v1/completions", &[], &long_request(false));
        assert_eq!((busy.status, &busy.json()["error"]["code"]), (429, &"rate_limit_exceeded".into()), "{busy:?}");
        assert!(busy.headers["retry-after"].parse::<u64>().unwrap() >= 1);
        drop(connection);
        server.until("it is noticed", |server| server.metric("hydra_disconnected_total") == before + 1.0);
        server.until("the slots and the queue are free", |server| {
            server.metric("hydra_requests_running") == 0.0 && server.metric("hydra_requests_queued") == 0.0
        });
        let next = server.post("/v1/completions", &json!({ "model": "model", "prompt": "a", "max_tokens": 2 }));
        assert_eq!(next.status, 200, "{next:?}");
    }
}

#[test]
fn an_answer_that_takes_too_long_is_cut_off() {
    let server = Server::start(&format!("--model {} --parallel 1 --queue 99 --timeout 1", assets("model")));
    let late = server.request("POST", "/v1/completions", &[], &long_request(false));
    assert_eq!((late.status, &late.json()["error"]["code"]), (408, &"timeout".into()), "{late:?}");
    assert_eq!(late.headers["x-should-retry"], "false");
    let idle = |server: &Server| {
        server.metric("hydra_requests_running") == 0.0 && server.metric("hydra_requests_queued") == 0.0
    };
    server.until("nothing runs", idle);
    let events = server.request("POST", "/v1/completions", &[], &long_request(true)).events();
    assert_eq!(events.last().unwrap()["error"]["code"], "timeout");
    server.until("nothing runs", idle);
}

#[test]
fn a_key_opens_all_but_the_health_check() {
    let scratch = Scratch::new("serve-key");
    let key = scratch.write("key", "sk-test-0123456789\n");
    let server = Server::start(&format!("--model {} --api-key-file {key}", assets("model")));
    for path in ["/v1/models", "/metrics", "/v1/none"] {
        let reply = server.get(path);
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (401, &"invalid_api_key".into()), "{path}");
        let wrong = [("Authorization", "Bearer sk-test-0123456780")];
        assert_eq!(server.request("GET", path, &wrong, "").status, 401, "{path}");
    }
    let right = [("Authorization", "Bearer sk-test-0123456789")];
    assert_eq!(server.request("GET", "/v1/models", &right, "").status, 200);
    assert_eq!(server.get("/health").status, 200);
}

#[cfg(unix)]
#[test]
fn sigterm_drains() {
    let mut server = Server::start(&format!("--model {} --parallel 1", assets("model")));
    let body = json!({ "model": "model", "prompt": "Once", "n": 8, "max_tokens": 100, "temperature": 2, "seed": 1,
                       "stream": true });
    let mut connection = server.send("POST", "/v1/completions", &[], &body.to_string());
    let mut bytes = vec![0; 64];
    connection.read_exact(&mut bytes).unwrap();
    let process = i32::try_from(server.child.id()).unwrap();
    // Twice, as `timeout` sends it; far enough apart to be delivered twice.
    for _ in 0..2 {
        // SAFETY: the process is a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(process, libc::SIGTERM) }, 0);
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
    let mut rest = String::new();
    connection.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "what was begun is finished: {rest}");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    assert!(std::net::TcpStream::connect(&server.address).is_err());
}

#[test]
fn penalties_and_biases_change_what_is_drawn() {
    let scratch = Scratch::new("serve-penalties");
    let model = chat_model(&scratch);
    let server = Server::start(&format!("--model {model}"));
    let tokens = |more: Value| -> Vec<String> {
        let mut options = json!({ "logprobs": 0, "max_tokens": 40 });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = completion(&server, "tiny", PROMPTS[2], options);
        serde_json::from_value(answer["choices"][0]["logprobs"]["tokens"].clone()).unwrap()
    };
    let plain = tokens(json!({}));
    for same in [
        json!({ "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "repetition_penalty": 1, "top_k": -1, "min_p": 0 }),
        json!({ "temperature": 2, "top_k": 1 }),
        json!({ "temperature": 2, "min_p": 1 }),
    ] {
        assert_eq!(tokens(same.clone()), plain, "{same}");
    }
    let [one, two] = ["300", "301"].map(|id| {
        let drawn = tokens(json!({ "logit_bias": { id: 100 } }));
        assert!(drawn.len() == 40 && drawn.iter().all(|token| *token == drawn[0]), "{drawn:?}");
        drawn[0].clone()
    });
    // Of two that are far above all others, each is drawn until it has been drawn too often.
    let drawn = tokens(json!({ "logit_bias": { "300": 100, "301": 99 }, "frequency_penalty": 2 }));
    for token in [&one, &two] {
        let times = drawn.iter().filter(|other| other == &token).count();
        assert!((5..=35).contains(&times), "{times} times {token:?} in {drawn:?}");
    }
    // Tokens of the prompt count as repeated.
    let options =
        json!({ "logprobs": 0, "max_tokens": 3, "logit_bias": { "300": 100, "301": 60 }, "repetition_penalty": 4 });
    let answer = completion(&server, "tiny", json!([300]), options);
    let drawn: Vec<String> = serde_json::from_value(answer["choices"][0]["logprobs"]["tokens"].clone()).unwrap();
    assert_eq!(drawn, [&two, &one, &one].map(String::as_str), "60 against 25, then 25 against 15");
    // What is banned is not drawn: the first token is in one half of the vocabulary.
    let banned = |ids: std::ops::Range<u32>| ids.map(|id| (id.to_string(), json!(-100))).collect::<Value>();
    let changed = [0..1024, 1024..2048].map(|half| tokens(json!({ "logit_bias": banned(half) }))[0] != plain[0]);
    assert!(changed[0] != changed[1], "{changed:?}");
    let outside = json!({ "model": "tiny", "prompt": "a", "logit_bias": { "4000000": 1 } });
    let error = server.post("/v1/completions", &outside);
    assert_eq!((error.status, &error.json()["error"]["param"]), (400, &"logit_bias".into()), "{error:?}");
}

#[test]
fn adapters_come_and_go() {
    let scratch = Scratch::new("serve-adapters");
    let hydra = adapter(&scratch, "adapters/hydra", "--targets all");
    let model = assets("model");
    let wanted = generated(&model, Some(&hydra), PROMPTS[1]);
    let server = Server::start(&format!("--model {model} --adapter-dir {}", scratch.path("adapters")));
    let load =
        |name: &str, path: &str| server.post("/v1/load_lora_adapter", &json!({ "lora_name": name, "lora_path": path }));
    for path in ["../adapters/hydra", &hydra, "", ".", "/", "none"] {
        let reply = load("one", path);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &"lora_path".into()), "{path}: {reply:?}");
    }
    assert_eq!(load("model", "hydra").status, 400, "the model's own name");
    assert_eq!(load("a b", "hydra").status, 400);
    let loaded = load("one", "hydra");
    assert_eq!((loaded.status, loaded.body.as_str()), (200, "Success: LoRA adapter 'one' added successfully."));
    assert_eq!(load("one", "hydra").status, 400, "it is loaded already");
    assert_eq!(text(&completion(&server, "one", PROMPTS[1], json!({}))["choices"][0]), wanted);
    assert_eq!(server.metric("hydra_adapters"), 1.0);

    // A LoRA in llama.cpp's form is one file.
    let (lora, file) = (adapter(&scratch, "lora", "--method lora"), scratch.path("adapters/lora.gguf"));
    succeeds(&format!("export --model {model} --adapter {lora} --format gguf-lora --out {file}"));
    assert_eq!(load("gguf", "lora.gguf").status, 200);
    let said = completion(&server, "gguf", PROMPTS[1], json!({}));
    assert_eq!(text(&said["choices"][0]), generated(&model, Some(&file), PROMPTS[1]));
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({ "lora_name": "gguf" })).status, 200);

    // A request that runs goes on when its adapter is unloaded.
    let body = json!({ "model": "one", "prompt": "Once", "n": 60, "max_tokens": 100, "temperature": 2, "seed": 1, "stream": true });
    let connection = server.send("POST", "/v1/completions", &[], &body.to_string());
    server.until("it runs", |server| server.metric("hydra_requests_running") > 0.0);
    let unload = json!({ "lora_name": "one" });
    let unloaded = server.post("/v1/unload_lora_adapter", &unload);
    assert_eq!((unloaded.status, unloaded.body.as_str()), (200, "Success: LoRA adapter 'one' removed successfully."));
    let events = Reply::read(connection).events();
    assert!(events.iter().all(|event| event["error"].is_null()));
    let again = server.post("/v1/unload_lora_adapter", &unload);
    assert_eq!((again.status, &again.json()["error"]["param"]), (404, &"lora_name".into()), "{again:?}");
    assert_eq!(server.post("/v1/completions", &body).status, 404);
}
