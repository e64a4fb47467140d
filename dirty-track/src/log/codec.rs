//! Compression of pages.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the contents of pages are compressed. What does not become shorter is written as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all: the fastest.
    #[default]
    None,
    /// LZ4, block format: about as fast as a disk.
    Lz4,
    /// Zstandard at level 1: the shortest.
    Zstd,
}

impl Compression {
    /// Name, as it is written and read.
    pub const fn name(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Compression, String> {
        let all = [Compression::None, Compression::Lz4, Compression::Zstd];
        all.into_iter()
            .find(|compression| compression.name() == text)
            .ok_or_else(|| format!("there is no compression {text:?}: use none, lz4 or zstd"))
    }
}

pub(super) const AS_IT_IS: u8 = 0;
pub(super) const LZ4: u8 = 1;
pub(super) const ZSTD: u8 = 2;

const ZSTD_LEVEL: i32 = 1;

/// Compresses one chunk after the other.
pub(super) struct Encoder {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.compression.fmt(f)
    }
}

impl Encoder {
    pub(super) fn new(compression: Compression) -> io::Result<Encoder> {
        let zstd = match compression {
            Compression::Zstd => Some(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
            _ => None,
        };
        Ok(Encoder { compression, zstd })
    }

    /// Appends `contents`, compressed, to `to` and returns the encoding; `None` and nothing appended when that would not
    /// be shorter.
    pub(super) fn encode(&mut self, contents: &[u8], to: &mut Vec<u8>) -> io::Result<Option<u8>> {
        let start = to.len();
        let (encoding, written) = match (&mut self.zstd, self.compression) {
            (Some(zstd), _) => {
                to.resize(start + zstd::zstd_safe::compress_bound(contents.len()), 0);
                (ZSTD, zstd.compress_to_buffer(contents, &mut to[start..])?)
            }
            (None, Compression::Lz4) => {
                to.resize(start + lz4_flex::block::get_maximum_output_size(contents.len()), 0);
                let written = lz4_flex::block::compress_into(contents, &mut to[start..]);
                (LZ4, written.map_err(io::Error::other)?)
            }
            (None, _) => return Ok(None),
        };
        let shorter = written < contents.len();
        to.truncate(start + if shorter { written } else { 0 });
        Ok(shorter.then_some(encoding))
    }
}

/// Undoes it.
pub(super) struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decoder {
    pub(super) fn new() -> Decoder {
        Decoder { zstd: None }
    }

    /// Fills `to` with what `bytes` are, in `encoding`. An error says why they are not that.
    pub(super) fn decode(&mut self, encoding: u8, bytes: &[u8], to: &mut [u8]) -> Result<(), &'static str> {
        let written = match encoding {
            LZ4 => lz4_flex::block::decompress_into(bytes, to).ok(),
            ZSTD => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Decompressor::new().ok();
                }
                self.zstd.as_mut().and_then(|zstd| zstd.decompress_to_buffer(bytes, to).ok())
            }
            _ => return Err("its pages have an encoding that does not exist"),
        };
        match written {
            Some(written) if written == to.len() => Ok(()),
            _ => Err("its pages cannot be decompressed"),
        }
    }
}
