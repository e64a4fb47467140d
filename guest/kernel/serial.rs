//! Lines on COM1: a greeting, then one JSON object each.
//!
//! Every byte is an exit to the monitor, so what is printed is kept short, and nothing is before the workload
//! begins, except that something went wrong.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use crate::io::{in8, out8};

const COM1: u16 = 0x3f8;

/// Bytes that the transmitter surely still takes.
static ROOM: AtomicU32 = AtomicU32::new(0);

/// Whether the rest of the greeting, whose first letter the entry code sends, has been printed.
static GREETED: AtomicBool = AtomicBool::new(false);

/// Turns the transmitter's FIFO on.
pub(crate) fn install() {
    out8(COM1 + 2, 1);
}

fn print(bytes: &[u8]) {
    for &byte in bytes {
        let mut room = ROOM.load(Relaxed);
        if room == 0 {
            // The FIFO, empty, takes 16 bytes. Without a device there the status reads as all ones.
            for _ in 0..100_000 {
                if in8(COM1 + 5) & 0x20 != 0 {
                    break;
                }
            }
            room = 16;
        }
        ROOM.store(room - 1, Relaxed);
        out8(COM1, byte);
    }
}

/// A byte that says that time passes.
pub(crate) fn beat() {
    print(b".");
}

/// A line in the making: a JSON object, printed as it grows.
pub(crate) struct Line(());

impl Line {
    /// Begins the object `{"guest":kind`; the first one comes after the greeting.
    pub(crate) fn new(kind: &str) -> Line {
        if !GREETED.swap(true, Relaxed) {
            print(b"irty-track guest\r\n");
        }
        print(b"{\"guest\":\"");
        print(kind.as_bytes());
        print(b"\"");
        Line(())
    }

    fn key(&self, key: &str) {
        print(b",\"");
        print(key.as_bytes());
        print(b"\":");
    }

    /// Adds a number.
    pub(crate) fn number(self, key: &str, mut value: u64) -> Line {
        self.key(key);
        let mut digits = [0; 20];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (value % 10) as u8;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        print(&digits[first..]);
        self
    }

    /// Adds a number in hexadecimal, as a string.
    pub(crate) fn hex(self, key: &str, value: u64) -> Line {
        let mut digits = *b"0x0000000000000000";
        for (index, digit) in digits[2..].iter_mut().enumerate() {
            *digit = b"0123456789abcdef"[(value >> (60 - 4 * index) & 15) as usize];
        }
        self.bytes(key, &digits)
    }

    /// Adds a string.
    pub(crate) fn text(self, key: &str, value: &str) -> Line {
        self.bytes(key, value.as_bytes())
    }

    /// Adds a string of any origin: whatever is not a plain letter in it is replaced.
    pub(crate) fn bytes(self, key: &str, value: &[u8]) -> Line {
        self.key(key);
        print(b"\"");
        for &byte in value {
            let plain = (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
            print(&[if plain { byte } else { b'?' }]);
        }
        print(b"\"");
        self
    }

    /// Ends the line.
    pub(crate) fn end(self) {
        print(b"}\r\n");
    }
}
