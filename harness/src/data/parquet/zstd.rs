//! Pages compressed with Zstandard. The library would need C code for them. It is told that such a column is not compressed,
//! and each page is unpacked here.

use crate::data::compressed::Budget;
use parquet::basic::Compression;
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::RowGroupReader;
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use std::fs::File;
use std::sync::Arc;

/// A group of rows, some of whose columns may be compressed with Zstandard.
pub struct Group<'f> {
    /// The library's.
    pub inner: Box<dyn RowGroupReader + 'f>,
    /// The file.
    pub file: Arc<File>,
    /// What all pages of the file may become.
    pub budget: Budget,
}

impl RowGroupReader for Group<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.inner.metadata()
    }

    fn num_columns(&self) -> usize {
        self.inner.num_columns()
    }

    fn get_column_page_reader(&self, i: usize) -> Result<Box<dyn PageReader>> {
        let (column, rows) = (self.metadata().column(i), usize::try_from(self.metadata().num_rows())?);
        if !matches!(column.compression(), Compression::ZSTD(_)) {
            return self.inner.get_column_page_reader(i);
        }
        let plain = column.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build()?;
        let inner = SerializedPageReader::new(self.file.clone(), &plain, rows, None)?;
        Ok(Box::new(Pages { inner, budget: self.budget.clone() }))
    }

    fn get_column_bloom_filter(&self, i: usize) -> Option<&Sbbf> {
        self.inner.get_column_bloom_filter(i)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// The pages of a column.
struct Pages {
    inner: SerializedPageReader<File>,
    budget: Budget,
}

impl Pages {
    /// What a page has behind its first `plain` bytes is a frame, unless there is nothing.
    fn unpacked(&self, bytes: &[u8], plain: usize) -> Result<Vec<u8>> {
        let (plain, frame) = bytes.split_at_checked(plain).ok_or_else(|| error("levels beyond the page's end"))?;
        let mut page = plain.to_vec();
        if !frame.is_empty() {
            page.extend(self.budget.zstd(frame).map_err(error)?);
        }
        Ok(page)
    }
}

fn error(why: impl std::fmt::Display) -> ParquetError {
    ParquetError::General(format!("a page: {why:#}"))
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let Some(mut page) = self.inner.get_next_page()? else { return Ok(None) };
        match &mut page {
            Page::DataPage { buf, .. } | Page::DictionaryPage { buf, .. } => *buf = self.unpacked(buf, 0)?.into(),
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, is_compressed, .. } => {
                if *is_compressed {
                    let levels = *def_levels_byte_len as usize + *rep_levels_byte_len as usize;
                    *buf = self.unpacked(buf, levels)?.into();
                }
            }
        }
        Ok(Some(page))
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.inner.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.inner.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.inner.at_record_boundary()
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Result<Page>> {
        self.get_next_page().transpose()
    }
}
