//! Files compressed with gzip or Zstandard, which their first bytes tell.

use super::limit::Limit;
use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use std::io::{BufRead, ErrorKind, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a file's first bytes say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// None of the others.
    Plain,
    /// gzip, several members one after the other allowed.
    Gzip,
    /// Zstandard, several frames one after the other allowed.
    Zstd,
    /// Apache Parquet.
    Parquet,
    /// Something that isn't read: its name.
    Other(&'static str),
}

/// Bytes that any file may become, and times its own size.
const MOST_BYTES: u64 = 16 << 20;
const MOST_TIMES: u64 = 256;

impl Limit {
    /// For what so many compressed bytes may become, more than any text does.
    pub fn of_compressed(bytes: u64) -> Self {
        let bytes = MOST_TIMES.saturating_mul(bytes).saturating_add(MOST_BYTES);
        Self { bytes, why: "of text for its size, found more; if it is meant, unpack it by hand" }
    }
}

impl Container {
    /// From a file's first four bytes, or more.
    pub fn of(start: &[u8]) -> Self {
        match start {
            [0x1F, 0x8B, ..] => Self::Gzip,
            // A frame, or a frame to skip.
            [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] => Self::Zstd,
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            [b'B', b'Z', b'h', ..] => Self::Other("bzip2"),
            [0xFD, b'7', b'z', b'X', ..] => Self::Other("xz"),
            [0x04, 0x22, 0x4D, 0x18, ..] => Self::Other("LZ4"),
            [b'P', b'K', 3, 4, ..] => Self::Other("a zip archive"),
            // A file of Arrow's, or its stream.
            [b'A', b'R', b'R', b'O', ..] | [0xFF, 0xFF, 0xFF, 0xFF, ..] => Self::Other("Apache Arrow"),
            [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Self::Other("UTF-16"),
            _ => Self::Plain,
        }
    }

    /// All that a reader of a plain or compressed file has.
    pub fn read(self, mut reader: impl BufRead, limit: Limit) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        match self {
            Self::Gzip => append(&mut text, MultiGzDecoder::new(reader), limit, "gzip")?,
            Self::Zstd => {
                while !reader.fill_buf()?.is_empty() {
                    frame(&mut text, &mut reader, limit)?;
                }
            }
            Self::Plain | Self::Parquet => text = limit.read(reader)?,
            Self::Other(name) => {
                bail!("expected JSON, CSV or TSV in UTF-8 (also in gzip or Zstandard) or Parquet, found {name}")
            }
        }
        Ok(text)
    }
}

/// What the parts of a file may become altogether, counted down as they are unpacked.
#[derive(Clone)]
pub struct Budget {
    left: Arc<AtomicU64>,
    why: &'static str,
}

impl Budget {
    /// All of a limit.
    pub fn of(limit: Limit) -> Self {
        Self { left: Arc::new(AtomicU64::new(limit.bytes)), why: limit.why }
    }

    /// Unpacks Zstandard frames.
    pub fn zstd(&self, mut frames: &[u8]) -> Result<Vec<u8>> {
        let limit = Limit { bytes: self.left.load(Ordering::Relaxed), why: self.why };
        let mut bytes = Vec::new();
        while !frames.is_empty() {
            frame(&mut bytes, &mut frames, limit)?;
        }
        self.left.store(limit.bytes.saturating_sub(bytes.len() as u64), Ordering::Relaxed);
        Ok(bytes)
    }
}

/// Appends a Zstandard frame, and checks its checksum if it has one.
fn frame(text: &mut Vec<u8>, reader: &mut impl BufRead, limit: Limit) -> Result<()> {
    let mut decoder = match StreamingDecoder::new(&mut *reader) {
        Ok(decoder) => decoder,
        Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
            let skipped = std::io::copy(&mut reader.take(length.into()), &mut std::io::sink())?;
            if skipped < length.into() {
                bail!("truncated Zstandard file: expected {length} bytes to skip, found {skipped}");
            }
            return Ok(());
        }
        Err(error) => bail!("damaged or truncated Zstandard file, after {} bytes of text: {error}", text.len()),
    };
    append(text, &mut decoder, limit, "Zstandard")?;
    let decoder = decoder.into_frame_decoder();
    match (decoder.get_checksum_from_data(), decoder.get_calculated_checksum()) {
        (Some(expected), Some(found)) if expected != found => {
            bail!("damaged Zstandard file: expected checksum {expected:08x}, found {found:08x}")
        }
        _ => Ok(()),
    }
}

fn append(text: &mut Vec<u8>, reader: impl Read, limit: Limit, what: &str) -> Result<()> {
    let left = limit.bytes.saturating_sub(text.len() as u64).saturating_add(1);
    if let Err(error) = reader.take(left).read_to_end(text) {
        let bytes = text.len();
        match error.kind() {
            ErrorKind::UnexpectedEof => bail!("truncated {what} file: it ends after {bytes} bytes of text"),
            _ => {
                return Err(error)
                    .with_context(|| format!("damaged or truncated {what} file, after {bytes} bytes of text"));
            }
        }
    }
    limit.check(text.len() as u64).with_context(|| format!("{what} file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use std::io::Write;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(text: &[u8]) -> Vec<u8> {
        compress_to_vec(text, CompressionLevel::Fastest)
    }

    fn read(bytes: &[u8]) -> Result<Vec<u8>> {
        Container::of(bytes).read(bytes, Limit::of_compressed(bytes.len() as u64))
    }

    #[test]
    fn several_parts_are_one_text() {
        let text = b"{\"text\": \"a hydra\"}\n".repeat(300);
        for compress in [gzip, zstd] {
            assert_eq!(read(&compress(&text)).unwrap(), text);
            let two = [compress(&text[..777]), compress(&text[777..])].concat();
            assert_eq!(read(&two).unwrap(), text);
        }
        let skipped = [b"\x50\x2A\x4D\x18\x03\0\0\0abc".to_vec(), zstd(&text)].concat();
        assert_eq!(read(&skipped).unwrap(), text);
        assert_eq!(read(b"{}").unwrap(), b"{}");
    }

    #[test]
    fn what_is_not_read_is_named() {
        for (start, name) in
            [(&b"BZh91AY"[..], "bzip2"), (b"\xFD7zXZ\0", "xz"), (b"ARROW1\0\0", "Arrow"), (b"\xFF\xFE{\0", "UTF-16")]
        {
            let error = read(start).unwrap_err().to_string();
            assert!(error.starts_with("expected JSON, CSV or TSV in UTF-8") && error.ends_with(name), "{error}");
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let text: Vec<u8> = (0..500u32).flat_map(|i| (i * i).to_string().into_bytes()).collect();
        for (compressed, what) in [(gzip(&text), "gzip"), (zstd(&text), "Zstandard")] {
            for length in 4..compressed.len() {
                let error = format!("{:#}", read(&compressed[..length]).unwrap_err());
                assert!(error.contains("truncated") && error.contains(what), "{length}: {error}");
            }
        }
    }

    /// 32 MiB of zeros in a kilobyte: blocks of one byte that is repeated.
    fn zstd_bomb() -> Vec<u8> {
        let (blocks, size) = (256, 128 << 10);
        let mut bytes = b"\x28\xB5\x2F\xFD\x00\x50".to_vec();
        for block in 1..=blocks {
            let header: u32 = u32::from(block == blocks) | 1 << 1 | size << 3;
            bytes.extend_from_slice(&header.to_le_bytes()[..3]);
            bytes.push(0);
        }
        bytes
    }

    #[test]
    fn bombs() {
        for bomb in [gzip(&vec![0; 32 << 20]), zstd_bomb()] {
            let error = format!("{:#}", read(&bomb).map(|text| text.len()).unwrap_err());
            assert!(error.contains("expected at most") && error.contains("MiB of text"), "{error}");
        }
    }
}
