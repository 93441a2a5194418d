//! One model with two adapters, used by four threads at once: what a server does.
//!
//!     cargo run --release -p hydra-runtime --example serve -- MODEL ADAPTER ADAPTER
//!
//! Requests wait in a queue. Each worker takes one at a time and generates with the adapter that the request names. The weights are
//! in memory once, and so is each adapter.

use hydra_runtime::model::{AttachedAdapter, Model};
use std::sync::{Mutex, mpsc};
use std::thread;

const WORKERS: usize = 4;
const REQUESTS: usize = 8;

struct Request {
    adapter: AttachedAdapter,
    prompt: String,
    seed: u64,
}

fn answer(model: &Model, request: &Request) -> hydra_runtime::Result<String> {
    let generate = model.generate(request.prompt.as_str()).adapter(&request.adapter);
    generate.temperature(0.8).seed(request.seed).max_tokens(24).stop("\n").text()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, adapters @ ..] = arguments.as_slice() else { return Err("usage: serve MODEL ADAPTER ADAPTER".into()) };
    let [first, second] = adapters else { return Err("usage: serve MODEL ADAPTER ADAPTER".into()) };
    let model = Model::open(model)?;
    let adapters = [model.load_adapter(first)?, model.load_adapter(second)?];

    let (requests, queue) = mpsc::channel::<Request>();
    let queue = Mutex::new(queue);
    let work = || {
        loop {
            // The lock is held while the worker waits for a request, and given up before it answers.
            let request = queue.lock().expect("no worker panics while it waits").recv();
            let Ok(request) = request else { break };
            match answer(&model, &request) {
                Ok(text) => println!("request {}: {text}", request.seed),
                Err(error) => println!("request {}: {error}", request.seed),
            }
        }
    };
    thread::scope(|scope| {
        (0..WORKERS).for_each(|_| drop(scope.spawn(work)));
        for seed in 0..REQUESTS as u64 {
            let adapter = adapters[seed as usize % adapters.len()].clone();
            let prompt = format!("Question {seed}: what has nine heads?\n");
            requests.send(Request { adapter, prompt, seed }).expect("the workers wait for requests");
        }
        // The workers end when the queue is closed and empty.
        drop(requests);
    });
    Ok(())
}
