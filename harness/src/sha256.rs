//! SHA-256 in hexadecimal.

use sha2::{Digest, Sha256};

/// Of a text.
pub fn of_text(text: &str) -> String {
    hex(Sha256::new_with_prefix(text))
}

/// Of some parts and their lengths.
pub fn of_parts<'b>(parts: impl IntoIterator<Item = &'b [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(hash)
}

/// Of what `hash` has been fed.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
