//! Requests to the Hugging Face hub, or to the server that `HF_ENDPOINT` names.

use super::cache;
use crate::output::printable;
use std::time::Duration;
use ureq::{Agent, AgentBuilder, Response};

const HUB: &str = "https://huggingface.co";
/// How long a connection, and then each piece of an answer, may take.
const CONNECT: Duration = Duration::from_secs(10);
const READ: Duration = Duration::from_secs(60);
/// Before a server that is busy is asked again.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// From one address to the next.
const MOST_REDIRECTS: usize = 8;

/// Why there is no answer.
pub enum Failure {
    /// The hub can't be reached, or is not well.
    Silent(String),
    /// It says no.
    Refused(String),
}

/// Asks the hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What a request is about.
#[derive(Clone, Copy)]
pub enum Ask {
    /// The headers of the hub itself, which may name another server in them.
    Headers,
    /// All, from a byte on, wherever it is.
    From(u64),
}

impl Client {
    /// With the environment's endpoint, proxy and token.
    pub fn new() -> Self {
        let agent = AgentBuilder::new().timeout_connect(CONNECT).timeout_read(READ).redirects(0);
        let agent = agent.try_proxy_from_env(true).user_agent(concat!("hydra/", env!("CARGO_PKG_VERSION"))).build();
        let endpoint = cache::variable("HF_ENDPOINT").unwrap_or_else(|| HUB.into());
        Self { agent, endpoint: endpoint.trim_end_matches('/').into(), token: cache::token() }
    }

    /// An address of the hub; `path` is encoded.
    pub fn address(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint)
    }

    /// The answer of an address of the hub, 200 or 206; for [`Ask::Headers`] also one that sends on to another server.
    pub fn get(&self, address: &str, ask: Ask) -> Result<Response, Failure> {
        let mut waits = WAITS.iter();
        loop {
            match self.follow(address, ask) {
                Err((failure, true)) => match waits.next() {
                    Some(wait) => std::thread::sleep(*wait),
                    None => return Err(failure),
                },
                Err((failure, false)) => return Err(failure),
                Ok(response) => return Ok(response),
            }
        }
    }

    /// The answer, or why not and whether to ask again.
    fn follow(&self, address: &str, ask: Ask) -> Result<Response, (Failure, bool)> {
        let mut address = address.to_string();
        for _ in 0..MOST_REDIRECTS {
            let response = self.ask(&address, ask).map_err(|error| self.failure(error))?;
            let Some(next) = response.header("Location").filter(|_| (300..400).contains(&response.status())) else {
                return Ok(response);
            };
            let own = origin(&address);
            let next = if next.starts_with('/') { format!("{own}{next}") } else { next.to_string() };
            if matches!(ask, Ask::Headers) && origin(&next) != own {
                return Ok(response);
            }
            address = next;
        }
        Err((Failure::Refused(format!("it sends on to another address more than {MOST_REDIRECTS} times")), false))
    }

    fn ask(&self, address: &str, ask: Ask) -> Result<Response, Box<ureq::Error>> {
        let request = match ask {
            Ask::Headers => self.agent.head(address),
            Ask::From(0) => self.agent.get(address),
            Ask::From(start) => self.agent.get(address).set("Range", &format!("bytes={start}-")),
        };
        // The size and the digest are those of the file itself.
        let request = request.set("Accept-Encoding", "identity");
        // Nobody else gets the token.
        let token = self.token.as_ref().filter(|_| origin(address) == origin(&self.endpoint));
        let request =
            token.iter().fold(request, |request, token| request.set("Authorization", &format!("Bearer {token}")));
        request.call().map_err(Box::new)
    }

    fn failure(&self, error: Box<ureq::Error>) -> (Failure, bool) {
        let (code, response) = match *error {
            ureq::Error::Status(code, response) => (code, response),
            ureq::Error::Transport(error) => return (Failure::Silent(printable(&error.to_string())), false),
        };
        let said = response.header("X-Error-Message").unwrap_or_else(|| response.status_text());
        let said = format!("{code}, {}", printable(said));
        match code {
            408 | 429 | 500.. => (Failure::Silent(said), true),
            401 | 403 if self.token.is_some() => (
                Failure::Refused(format!("{said}; the token (HF_TOKEN, or of `hf auth login`) does not open it")),
                false,
            ),
            401 | 403 => (
                Failure::Refused(format!("{said}; if it is private or gated, set HF_TOKEN to a token that opens it")),
                false,
            ),
            _ => (Failure::Refused(said), false),
        }
    }
}

/// `https://host:port` of an address.
fn origin(address: &str) -> &str {
    let host = address.find("://").map_or(0, |at| at + 3);
    address[host..].find(['/', '?', '#']).map_or(address, |end| &address[..host + end])
}

/// A name as a part of an address; `slash` says whether slashes stay.
pub fn encoded(name: &str, slash: bool) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => text.push(byte.into()),
            b'/' if slash => text.push('/'),
            other => text += &format!("%{other:02X}"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_addresses() {
        for (address, wanted) in
            [("https://h:1/a/b?c", "https://h:1"), ("http://h", "http://h"), ("http://h?x", "http://h")]
        {
            assert_eq!(origin(address), wanted);
        }
        assert_eq!(encoded("a b/ü#1?.jsonl", true), "a%20b/%C3%BC%231%3F.jsonl");
        assert_eq!(encoded("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
