//! What the two sides say to each other besides the logs.
//!
//! A note is 4 bytes `VMN1`, the length of the rest (4, little-endian, at most [`LONGEST`]), and JSON.

use std::io::{self, Read, Write};

use dirty_track::log::StreamId;
use serde::{Deserialize, Serialize};

use crate::snapshot::Shape;

/// Version of the protocol: another major version is refused; a later minor one adds what may be ignored.
pub(super) const VERSION: (u16, u16) = (1, 0);

const MAGIC: [u8; 4] = *b"VMN1";

/// Most bytes of a note.
const LONGEST: usize = 64 << 10;

/// A source begins each connection with this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) version: (u16, u16),
    /// Of the migration: all its connections have the same.
    pub(super) id: StreamId,
    /// Which connection it is, from 0.
    pub(super) lane: usize,
    /// How many there are.
    pub(super) lanes: usize,
    /// What the machine is made of.
    pub(super) shape: Shape,
    /// The source may switch before all of memory is there.
    pub(super) postcopy: bool,
    /// It takes the place of one that broke off after the switch.
    #[serde(default)]
    pub(super) again: bool,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "note", rename_all = "kebab-case")]
pub(super) enum Note {
    /// The source: this is what comes.
    Hello(Box<Hello>),
    /// The destination: it may come.
    Welcome,
    /// The destination: it can not, or can not any more.
    Refused {
        /// Why.
        why: String,
    },
    /// The destination has all it needs, and does not run the machine yet.
    Ready,
    /// The source has given the machine away.
    Go,
    /// The destination runs it.
    Running,
}

/// What is no note.
#[derive(Debug, thiserror::Error)]
pub enum NoteError {
    /// The connection.
    #[error("{}", broken(.0))]
    Io(#[from] io::Error),
    /// Something else is on the other side.
    #[error("what is on the other side does not speak this protocol, or just one side has --tls-dir")]
    Foreign,
    /// It cannot be that long.
    #[error("a note of {0} bytes is none")]
    Long(usize),
    /// It cannot be understood.
    #[error("a note cannot be understood: {0}")]
    Json(#[from] serde_json::Error),
    /// It is not what is due.
    #[error("the other side says {said:?} where {due} is due")]
    Unexpected {
        /// What it says.
        said: String,
        /// What is due.
        due: &'static str,
    },
    /// The other side does not go on.
    #[error("the other side says: {0}")]
    Refused(String),
}

fn broken(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            "the other side broke off".into()
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the other side does not answer".into(),
        _ => format!("the connection: {error}"),
    }
}

impl Note {
    pub(super) fn write(&self, to: &mut impl Write) -> Result<(), NoteError> {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[0; 4]);
        serde_json::to_writer(&mut bytes, self)?;
        let length = bytes.len() - 8;
        if length > LONGEST {
            return Err(NoteError::Long(length));
        }
        bytes[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        to.write_all(&bytes)?;
        Ok(to.flush()?)
    }

    pub(super) fn read(from: &mut impl Read) -> Result<Note, NoteError> {
        let (mut magic, mut length) = ([0; 4], [0; 4]);
        from.read_exact(&mut magic)?;
        // What is foreign may be shorter than a note.
        if magic != MAGIC {
            return Err(NoteError::Foreign);
        }
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            return Err(NoteError::Long(length));
        }
        let mut text = vec![0; length];
        from.read_exact(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Reads a note, which has to be `due`.
    pub(super) fn expect(from: &mut impl Read, due: &Note, name: &'static str) -> Result<(), NoteError> {
        match Note::read(from)? {
            note if note == *due => Ok(()),
            Note::Refused { why } => Err(NoteError::Refused(why)),
            note => Err(NoteError::Unexpected { said: format!("{note:?}"), due: name }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Note {
        let shape = Shape { memory: 1 << 30, cpus: 2, disks: Vec::new(), rng: false, builtin: true };
        Note::Hello(Box::new(Hello {
            version: VERSION,
            id: StreamId(7),
            lane: 1,
            lanes: 4,
            shape,
            postcopy: false,
            again: false,
        }))
    }

    #[test]
    fn what_is_said_is_heard() {
        let mut bytes = Vec::new();
        let notes = [hello(), Note::Welcome, Note::Refused { why: "no".into() }, Note::Go];
        notes.iter().for_each(|note| note.write(&mut bytes).unwrap());
        let mut from = &bytes[..];
        for note in &notes {
            assert_eq!(Note::read(&mut from).unwrap(), *note);
        }
        assert!(matches!(Note::read(&mut from), Err(NoteError::Io(_))));
        let mut from = &bytes[..];
        assert!(matches!(Note::expect(&mut from, &Note::Go, "go"), Err(NoteError::Unexpected { .. })));
        assert!(matches!(
            Note::expect(&mut &b"GET / HTTP/1.1\r\n"[..], &Note::Go, "go"),
            Err(NoteError::Foreign)
        ));
        assert!(matches!(Note::read(&mut &b"VMN1\xff\xff\xff\x7f"[..]), Err(NoteError::Long(_))));
        assert!(Note::Refused { why: "x".repeat(1 << 17) }.write(&mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100), honest in any::<bool>()) {
            if honest && bytes.len() >= 8 {
                let length = bytes.len() as u32 - 8;
                bytes[..4].copy_from_slice(b"VMN1");
                bytes[4..8].copy_from_slice(&length.to_le_bytes());
            }
            let _ = Note::read(&mut &bytes[..]);
        }
    }
}
