//! What can be read from a userfaultfd.

use std::io::{self, Read};
use std::mem::offset_of;
use std::ops::Range;

use linux_raw_sys::general::{
    UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffd_msg,
};

use super::Uffd;

const MESSAGE: usize = size_of::<uffd_msg>();
/// Where a message has its three words: flags and address of a page fault, addresses of another event.
const WORDS_AT: usize = offset_of!(uffd_msg, arg);
const _: () = assert!(MESSAGE == 32 && WORDS_AT == 8 && offset_of!(uffd_msg, event) == 0);

/// Messages that one `read` takes at most.
const BATCH: usize = 64;

/// Why a thread sleeps at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Nothing is there.
    Missing {
        /// The thread wants to write.
        write: bool,
    },
    /// The file that is mapped there has the page; only the mapping has not.
    Minor {
        /// The thread wants to write.
        write: bool,
    },
    /// It is write-protected, and the thread wants to write.
    Protected,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A thread sleeps.
    Fault {
        /// The page's address, or one in it.
        address: u64,
        /// What it waits for.
        cause: Cause,
    },
    /// `madvise` or `fallocate` drops what is in this range, as soon as this has been read.
    Remove(Range<u64>),
    /// The range is unmapped, as soon as this has been read.
    Unmap(Range<u64>),
    /// The range was moved elsewhere by `mremap`.
    Remap(Range<u64>),
}

impl Message {
    /// None for an event that was not asked for.
    fn parse(message: &[u8; MESSAGE]) -> Option<Message> {
        let word = |index: usize| {
            u64::from_ne_bytes(std::array::from_fn(|byte| message[WORDS_AT + 8 * index + byte]))
        };
        let flag = |flag: u32| word(0) & u64::from(flag) != 0;
        let write = flag(UFFD_PAGEFAULT_FLAG_WRITE);
        match u32::from(message[0]) {
            UFFD_EVENT_PAGEFAULT => {
                let cause = if flag(UFFD_PAGEFAULT_FLAG_WP) {
                    Cause::Protected
                } else if flag(UFFD_PAGEFAULT_FLAG_MINOR) {
                    Cause::Minor { write }
                } else {
                    Cause::Missing { write }
                };
                Some(Message::Fault { address: word(1), cause })
            }
            UFFD_EVENT_REMOVE => Some(Message::Remove(word(0)..word(1))),
            UFFD_EVENT_UNMAP => Some(Message::Unmap(word(0)..word(1))),
            UFFD_EVENT_REMAP => Some(Message::Remap(word(0)..word(0).saturating_add(word(2)))),
            _ => None,
        }
    }
}

impl Uffd {
    /// Takes every message that waits, and appends it to `messages`.
    ///
    /// All, and not as many as fit: the kernel hands out faults before anything else, and a fault may be such as can
    /// only be served when an event behind it has been read. A thread has one fault at a time, so this ends.
    ///
    /// # Errors
    /// What `read` says; nothing to read is no error.
    pub fn messages(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut buffer = [[0; MESSAGE]; BATCH];
        loop {
            let read = match (&self.0).read(buffer.as_flattened_mut()) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            messages.extend(buffer.iter().take(read / MESSAGE).filter_map(Message::parse));
            if read < MESSAGE * BATCH {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u32, words: [u64; 3]) -> [u8; MESSAGE] {
        let mut bytes = [0; MESSAGE];
        bytes[0] = event as u8;
        bytes[WORDS_AT..].copy_from_slice(words.map(u64::to_ne_bytes).as_flattened());
        bytes
    }

    #[test]
    fn messages_are_told_apart() {
        let fault = |flags: u32| Message::parse(&message(UFFD_EVENT_PAGEFAULT, [flags.into(), 0x7000, 9]));
        let found = |cause| Some(Message::Fault { address: 0x7000, cause });
        assert_eq!(fault(0), found(Cause::Missing { write: false }));
        assert_eq!(fault(1), found(Cause::Missing { write: true }));
        assert_eq!(fault(2 | 1), found(Cause::Protected));
        assert_eq!(fault(4), found(Cause::Minor { write: false }));
        assert_eq!(fault(4 | 1), found(Cause::Minor { write: true }));
        let other = |event| Message::parse(&message(event, [0x1000, 0x3000, 0x5000]));
        assert_eq!(other(UFFD_EVENT_REMOVE), Some(Message::Remove(0x1000..0x3000)));
        assert_eq!(other(UFFD_EVENT_UNMAP), Some(Message::Unmap(0x1000..0x3000)));
        assert_eq!(other(UFFD_EVENT_REMAP), Some(Message::Remap(0x1000..0x6000)));
        assert_eq!(other(0), None);
    }
}
