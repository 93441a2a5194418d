//! Who may ask: the key, and the names under which a browser may reach a server that only this machine sees.

use super::error::{ApiError, Result};
use crate::data::limit;
use anyhow::{Context, bail};
use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::path::Path;

/// The shortest key that is taken.
const SHORTEST_KEY: usize = 16;

/// A key's digest: what is compared does not depend on the key's length, and the key itself is not kept.
pub struct Key([u8; 32]);

impl Key {
    /// The first line of a file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = limit::settings(path).with_context(|| format!("--api-key-file {}", path.display()))?;
        let key = text.lines().next().unwrap_or_default().trim();
        if key.len() < SHORTEST_KEY || !key.chars().all(|c| c.is_ascii_graphic()) {
            let expected = format!("expected a line of at least {SHORTEST_KEY} visible ASCII characters");
            bail!("--api-key-file {}: {expected}, found {}", path.display(), key.chars().count());
        }
        Ok(Self::of(key))
    }

    fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Whether it is the same key, in a time that does not depend on where they differ.
    fn is(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |difference, (a, b)| std::hint::black_box(difference | (a ^ b))) == 0
    }
}

/// What a request has to show.
pub struct Access {
    key: Option<Key>,
    /// Names besides those of this machine under which it may be reached; `None`: any.
    hosts: Option<Vec<String>>,
}

impl Access {
    /// A server with a key or without one. One that listens on `address`, a loopback one, is reached under this machine's names
    /// and `hosts` alone: a page of another name that resolves to it (DNS rebinding) is refused.
    pub fn new(key: Option<Key>, address: IpAddr, hosts: Vec<String>) -> Self {
        let restricted = address.is_loopback() || !hosts.is_empty();
        Self { key, hosts: restricted.then_some(hosts) }
    }

    /// Fails if the request came under a name that is not the server's.
    pub fn check_host(&self, headers: &HeaderMap) -> Result<()> {
        let (Some(hosts), Some(host)) = (&self.hosts, headers.get(header::HOST)) else { return Ok(()) };
        let name = host.to_str().ok().map(without_port).unwrap_or_default();
        let own =
            name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        if own || hosts.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            return Ok(());
        }
        let name = hydra_runtime::printable(name);
        Err(ApiError::forbidden(format!("the header Host: {name:?} is not a name of this server: see --allow-host")))
    }

    /// Fails without the key.
    pub fn check_key(&self, headers: &HeaderMap) -> Result<()> {
        let Some(key) = &self.key else { return Ok(()) };
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = shown.and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        match token {
            Some(token) if key.is(&Key::of(token)) => Ok(()),
            _ => Err(ApiError::unauthorized()),
        }
    }
}

/// "127.0.0.1:8080" → "127.0.0.1"; "[::1]:8080" → "::1".
fn without_port(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn only_the_key_opens() {
        let access = Access::new(Some(Key::of("sk-0123456789abcdef")), [0, 0, 0, 0].into(), Vec::new());
        for (value, open) in [
            ("Bearer sk-0123456789abcdef", true),
            ("bearer sk-0123456789abcdef ", true),
            ("Bearer sk-0123456789abcdeg", false),
            ("Bearer sk-0123456789abcde", false),
            ("Bearer ", false),
            ("Basic sk-0123456789abcdef", false),
            ("sk-0123456789abcdef", false),
        ] {
            assert_eq!(access.check_key(&headers(header::AUTHORIZATION, value)).is_ok(), open, "{value}");
        }
        assert!(access.check_key(&HeaderMap::new()).is_err());
        assert!(Access::new(None, [127, 0, 0, 1].into(), Vec::new()).check_key(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn a_loopback_server_is_reached_by_its_own_names() {
        let access = |address: [u8; 4], hosts: &[&str]| {
            Access::new(None, address.into(), hosts.iter().map(|host| host.to_string()).collect())
        };
        let open = |access: &Access, host: &str| access.check_host(&headers(header::HOST, host)).is_ok();
        let local = access([127, 0, 0, 1], &[]);
        for host in ["127.0.0.1:8080", "localhost", "Localhost:1", "[::1]:8080", "127.3.2.1"] {
            assert!(open(&local, host), "{host}");
        }
        for host in ["evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1", ""] {
            assert!(!open(&local, host), "{host}");
        }
        assert!(open(&access([127, 0, 0, 1], &["llm.example"]), "LLM.example:443"));
        assert!(open(&access([0, 0, 0, 0], &[]), "any.example"));
        assert!(!open(&access([0, 0, 0, 0], &["llm.example"]), "any.example"));
    }

    #[test]
    fn a_short_key_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, ok) in [("0123456789abcdef\nx", true), ("short", false), ("", false), ("0123456789 abcdef", false)] {
            std::fs::write(file.path(), text).unwrap();
            assert_eq!(Key::read(file.path()).is_ok(), ok, "{text:?}");
        }
    }
}
