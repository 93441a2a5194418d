//! The page at `/`: a chat with the loaded adapters side by side. It is part of the program, and asks nobody but this server.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

/// The reports' colours and text, and what this page has besides.
const STYLE: &str =
    concat!(include_str!("../report/chart.css"), include_str!("../report/page.css"), include_str!("page/page.css"));
const SCRIPT: &str = include_str!("page/page.js");
const BODY: &str = include_str!("page/body.html");

static PAGE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Hydra</title><link rel=\"icon\" href=\"data:,\"><style>{STYLE}</style></head>\n<body>\n{BODY}<footer>hydra {}</footer>\n\
         <script>{SCRIPT}</script></body></html>\n",
        env!("CARGO_PKG_VERSION")
    )
});

/// What a browser lets the page do: run this script, look like this, and talk to this server.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let script = base64(&Sha256::digest(SCRIPT.as_bytes()));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    );
    HeaderValue::try_from(policy).expect("a policy of ASCII")
});

/// `GET /`.
pub async fn page() -> Response {
    let mut response = PAGE.as_str().into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CONTENT_SECURITY_POLICY, POLICY.clone());
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        text.extend((0..4).map(|i| match i <= three.len() {
            true => char::from(ALPHABET[(bits >> (18 - 6 * i)) as usize % 64]),
            false => '=',
        }));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_4648() {
        for (text, wanted) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), wanted);
        }
    }

    #[test]
    fn nothing_comes_from_elsewhere() {
        assert!(!PAGE.contains("http:") && !PAGE.contains("https:") && !PAGE.contains("@import"));
        // The script stands in the page as it is hashed.
        assert!(PAGE.contains(&format!("<script>{SCRIPT}</script>")) && !SCRIPT.contains("</script"));
    }
}
