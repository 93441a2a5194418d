//! What the pages of a parquet file claim, checked before any is read: the library allocates as much as a page says that it
//! holds, and as a text in a page's header says that it is long.
//!
//! Page headers are in Thrift's compact protocol: <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>.

use crate::data::limit::Limit;
use anyhow::{Context, Result, bail};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::ChunkReader;

/// Bytes of a page's header that are looked at first, and at most: it may have long texts as statistics.
const WINDOW: u64 = 1 << 14;
const MOST_WINDOW: u64 = 1 << 24;
/// Structures in structures.
const MOST_DEPTH: usize = 16;

/// Fails if a page is outside the file, or all together claim more than its limit; the file has so many `bytes`.
pub fn check(metadata: &ParquetMetaData, file: &impl ChunkReader, bytes: u64, limit: Limit) -> Result<()> {
    let mut claimed = 0u64;
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let (start, length) = column.byte_range();
        let end = start.checked_add(length).filter(|&end| end <= bytes);
        let end = end.with_context(|| format!("a column ends beyond the file's {bytes} bytes"))?;
        let mut at = start;
        while at < end {
            let page = header(file, at, end - at)?;
            claimed = claimed.saturating_add(page.uncompressed);
            limit.check(claimed)?;
            // Some writers leave bytes behind the last page.
            at = at.saturating_add(page.length).saturating_add(page.compressed);
        }
    }
    Ok(())
}

/// What a page's header says.
struct Header {
    /// Its own bytes.
    length: u64,
    compressed: u64,
    uncompressed: u64,
}

fn header(file: &impl ChunkReader, at: u64, left: u64) -> Result<Header> {
    let read = |window: u64| {
        let bytes = file.get_bytes(at, left.min(window) as usize)?;
        let mut compact = Compact { rest: &bytes };
        let mut sizes = [None; 2];
        compact.structure(0, &mut |field, value| match field {
            2 => sizes[0] = Some(value),
            3 => sizes[1] = Some(value),
            _ => {}
        })?;
        let size = |size: Option<i64>| size.and_then(|size| u64::try_from(size).ok());
        let [uncompressed, compressed] = sizes.map(size);
        Ok::<_, anyhow::Error>(Header {
            length: (bytes.len() - compact.rest.len()) as u64,
            uncompressed: uncompressed.context("a page without its size")?,
            compressed: compressed.context("a page without its size")?,
        })
    };
    read(WINDOW).or_else(|_| read(MOST_WINDOW)).with_context(|| format!("damaged page header at byte {at}"))
}

/// Bytes in Thrift's compact protocol.
struct Compact<'b> {
    rest: &'b [u8],
}

impl<'b> Compact<'b> {
    fn take(&mut self, count: u64) -> Result<&'b [u8]> {
        let count = usize::try_from(count).ok().filter(|&count| count <= self.rest.len());
        let (taken, rest) = self.rest.split_at(count.context("a value beyond the end")?);
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        bail!("a number of more than 64 bits")
    }

    fn integer(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A structure; `number` gets the id and value of its own fields that are whole numbers.
    fn structure(&mut self, depth: usize, number: &mut dyn FnMut(i64, i64)) -> Result<()> {
        if depth > MOST_DEPTH {
            bail!("structures nested more than {MOST_DEPTH} times");
        }
        let mut id = 0i64;
        loop {
            let head = self.byte()?;
            let kind = head & 0x0F;
            if kind == 0 {
                return Ok(());
            }
            id = match head >> 4 {
                0 => self.integer()?,
                step => id.saturating_add(step.into()),
            };
            match kind {
                // A field's type says which one it is.
                1 | 2 => {}
                4..=6 => number(id, self.integer()?),
                kind => self.value(kind, depth)?,
            }
        }
    }

    /// A value that is not looked at.
    fn value(&mut self, kind: u8, depth: usize) -> Result<()> {
        match kind {
            1..=3 => drop(self.byte()?),
            4..=6 => drop(self.varint()?),
            7 => drop(self.take(8)?),
            8 => {
                let length = self.varint()?;
                self.take(length)?;
            }
            9 | 10 => {
                let head = self.byte()?;
                let size = if head >> 4 == 15 { self.varint()? } else { (head >> 4).into() };
                self.values(size, &[head & 0x0F], depth)?;
            }
            11 => {
                let size = self.varint()?;
                let kinds = if size > 0 { self.byte()? } else { 0 };
                self.values(size, &[kinds >> 4, kinds & 0x0F], depth)?;
            }
            12 => self.structure(depth + 1, &mut |_, _| {})?,
            13 => drop(self.take(16)?),
            _ => bail!("a value of an unknown type"),
        }
        Ok(())
    }

    fn values(&mut self, size: u64, kinds: &[u8], depth: usize) -> Result<()> {
        if depth >= MOST_DEPTH {
            bail!("lists nested more than {MOST_DEPTH} times");
        }
        if size > self.rest.len() as u64 {
            bail!("a list of {size} values in {} bytes", self.rest.len());
        }
        (0..size).try_for_each(|_| kinds.iter().try_for_each(|&kind| self.value(kind, depth + 1)))
    }
}
