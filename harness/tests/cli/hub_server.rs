//! A server on this machine that answers as the Hugging Face hub does, and misbehaves as it is told.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Files by repository ("datasets/o/n") and name.
type Files = BTreeMap<(String, String), Vec<u8>>;

#[derive(Default)]
pub struct State {
    pub files: Files,
    /// What every revision is at.
    pub commit: String,
    /// Requests are refused without it.
    pub token: Option<&'static str>,
    /// Where files are, instead of here.
    pub elsewhere: Option<String>,
    /// An answer ends after so many bytes.
    pub cut: Option<usize>,
    /// Ranges are ignored.
    pub whole: bool,
    /// Files are not those that their tags name.
    pub damaged: bool,
    /// Before a file is sent.
    pub delay: Duration,
    /// This, with this status, instead of any answer.
    pub status: Option<&'static str>,
    /// Method and path of each request, and "token" if it had one.
    pub asked: Vec<String>,
}

pub struct Hub {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    /// Serves until the test's process ends.
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state =
            Arc::new(Mutex::new(State { commit: "0123456789abcdef".repeat(3)[..40].into(), ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = shared.clone();
                // A client that was killed, or that has read enough, is gone.
                std::thread::spawn(move || drop(answer(&stream.unwrap(), &state)));
            }
        });
        Self { endpoint, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn put(&self, repository: &str, name: &str, bytes: impl AsRef<[u8]>) {
        self.state().files.insert((repository.into(), name.into()), bytes.as_ref().to_vec());
    }

    /// The requests since the last call.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state().asked)
    }
}

struct Answer {
    status: &'static str,
    headers: String,
    body: Vec<u8>,
}

impl Answer {
    fn empty(status: &'static str, headers: String) -> Self {
        Self { status, headers, body: Vec::new() }
    }
}

fn answer(mut stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        let mut pairs = headers.iter().filter_map(|line| line.split_once(": "));
        pairs.find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    };
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = decoded(path.trim_start_matches('/'));
    let (answer, cut, delay) = {
        let mut state = state.lock().unwrap();
        let token = header("Authorization").and_then(|value| value.strip_prefix("Bearer "));
        state.asked.push(format!("{method} {path}{}", token.map_or("", |_| " token")));
        let range = header("Range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let answer = match path.strip_prefix("api/") {
            _ if state.status.is_some() => Answer::empty(state.status.unwrap(), String::new()),
            _ if state.token.is_some() && state.token != token => Answer::empty("401 Unauthorized", String::new()),
            Some(asked) => state.listing(asked),
            None => state.file(&path, range),
        };
        (answer, state.cut.filter(|_| !path.starts_with("api/")), state.delay)
    };
    let length = answer.body.len();
    let head = format!(
        "HTTP/1.1 {}\r\nContent-Length: {length}\r\nConnection: close\r\n{}\r\n",
        answer.status, answer.headers
    );
    stream.write_all(head.as_bytes())?;
    if method == "HEAD" {
        return Ok(());
    }
    if !path.starts_with("api/") {
        std::thread::sleep(delay);
    }
    stream.write_all(&answer.body[..cut.map_or(length, |cut| cut.min(length))])
}

impl State {
    fn listing(&self, asked: &str) -> Answer {
        let repository = asked.split("/revision/").next().unwrap();
        // Models have no prefix where their files are.
        let repository = repository.strip_prefix("models/").unwrap_or(repository);
        let names: Vec<_> = self.files.keys().filter(|(own, _)| own == repository).map(|(_, name)| name).collect();
        if names.is_empty() {
            return Answer::empty("404 Not Found", "X-Error-Message: Repository not found\r\n".into());
        }
        let siblings: Vec<_> = names.into_iter().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"sha": self.commit, "siblings": siblings});
        Answer { status: "200 OK", headers: "Content-Type: application/json\r\n".into(), body: info.to_string().into() }
    }

    fn file(&self, path: &str, range: Option<usize>) -> Answer {
        let found = path.split_once(&format!("/resolve/{}/", self.commit));
        let found = found.and_then(|(own, name)| self.files.get(&(own.into(), name.into())));
        let Some(bytes) = found else { return Answer::empty("404 Not Found", String::new()) };
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = if self.damaged { "0".repeat(64) } else { digest };
        // Files of less than a kilobyte are not in LFS: theirs is a digest of Git's.
        let headers = if bytes.len() < 1 << 10 {
            format!("ETag: \"{}\"\r\n", &digest[..40])
        } else {
            format!("ETag: \"other\"\r\nX-Linked-ETag: \"{digest}\"\r\nX-Linked-Size: {}\r\n", bytes.len())
        };
        if let Some(elsewhere) = &self.elsewhere {
            return Answer::empty("302 Found", format!("{headers}Location: {elsewhere}/{path}\r\n"));
        }
        match range.filter(|_| !self.whole) {
            Some(start) if start >= bytes.len() => Answer::empty("416 Range Not Satisfiable", String::new()),
            Some(start) => Answer {
                status: "206 Partial Content",
                headers: format!("{headers}Content-Range: bytes {start}-{}/{}\r\n", bytes.len() - 1, bytes.len()),
                body: bytes[start..].to_vec(),
            },
            None => Answer { status: "200 OK", headers, body: bytes.clone() },
        }
    }
}

fn decoded(path: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((&byte, more)) = rest.split_first() {
        let code = more.get(..2).filter(|_| byte == b'%').and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(code) => (bytes.push(code), rest = &more[2..]).1,
            None => (bytes.push(byte), rest = more).1,
        }
    }
    String::from_utf8(bytes).unwrap()
}
