//! COM1: a 16550 whose output is the console and whose input comes from it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::state::device::SerialPortState;

/// An interrupt line behind an irqfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the feeder of the receive FIFO when there is room again.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // An eventfd that cannot count on is readable already.
        let _ = self.0.write(1);
    }
}

struct Inner {
    uart: Uart<Line, Room, Box<dyn Write + Send>>,
    /// Typed, and not yet in the FIFO of 64 bytes.
    waiting: VecDeque<u8>,
}

/// Most input kept for a guest that does not read; what comes beyond is dropped, as a real line would.
const MAX_WAITING: usize = 1 << 20;

/// The serial port.
pub struct Serial {
    inner: Mutex<Inner>,
    interrupt: EventFd,
    room: EventFd,
}

impl Serial {
    /// A port that writes to `console`.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(console: Box<dyn Write + Send>) -> io::Result<Serial> {
        let interrupt = EventFd::new(EFD_NONBLOCK)?;
        let room = EventFd::new(EFD_NONBLOCK)?;
        let uart = Uart::with_events(Line(interrupt.try_clone()?), Room(room.try_clone()?), console);
        Ok(Serial { inner: Mutex::new(Inner { uart, waiting: VecDeque::new() }), interrupt, room })
    }

    /// Goes on from `state`, with the same console.
    ///
    /// # Errors
    /// Why it cannot; it is of no use any more then.
    pub fn restore(&self, state: &SerialPortState) -> Result<(), &'static str> {
        const NO_FD: &str = "there are no file descriptors left for it";
        if state.waiting.len() > MAX_WAITING {
            return Err("more input waits than is kept");
        }
        let lines = || {
            let line = self.interrupt.try_clone().map_err(|_| NO_FD)?;
            Ok::<_, &'static str>((Line(line), Room(self.room.try_clone().map_err(|_| NO_FD)?)))
        };
        let [dll, dlm, ier, iir, lcr, lsr, mcr, msr, scr] = state.registers;
        let uart = SerialState {
            baud_divisor_low: dll,
            baud_divisor_high: dlm,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch: scr,
            in_buffer: state.fifo.clone(),
        };
        let mut inner = self.lock();
        let (line, room) = lines()?;
        let nobody: Box<dyn Write + Send> = Box::new(io::sink());
        let before = std::mem::replace(&mut inner.uart, Uart::with_events(line, room, nobody));
        let (line, room) = lines()?;
        inner.uart = Uart::from_state(&uart, line, room, before.into_writer())
            .map_err(|_| "its receive FIFO is longer than it can be")?;
        inner.waiting = state.waiting.iter().copied().collect();
        inner.feed();
        Ok(())
    }

    /// The interrupt line, for an irqfd.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Readable when the guest has emptied the receive FIFO: call [`Serial::feed`] then.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The state of a UART is consistent between any two of its steps.
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The guest writes register `offset`. A console that cannot be written to loses the byte, as a line with
    /// nobody at its end does; the guest must not suffer for it.
    pub fn write(&self, offset: u8, value: u8) {
        let _ = self.lock().uart.write(offset, value);
    }

    /// The guest reads register `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        self.lock().uart.read(offset)
    }

    /// Queues `bytes` as input and gives the guest as much of it as fits.
    pub fn input(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let room = MAX_WAITING - inner.waiting.len().min(MAX_WAITING);
        inner.waiting.extend(&bytes[..bytes.len().min(room)]);
        inner.feed();
    }

    /// The state of the port.
    pub fn state(&self) -> SerialPortState {
        let inner = self.lock();
        let uart = inner.uart.state();
        SerialPortState {
            registers: [
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ],
            fifo: uart.in_buffer,
            waiting: inner.waiting.iter().copied().collect(),
        }
    }

    /// Gives the guest as much of the queued input as fits.
    pub fn feed(&self) {
        let _ = self.room.read();
        self.lock().feed();
    }
}

impl Inner {
    fn feed(&mut self) {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            // The FIFO being full is the only error that matters, and then the bytes stay queued.
            let Ok(taken @ 1..) = self.uart.enqueue_raw_bytes(front) else { return };
            self.waiting.drain(..taken);
        }
    }
}
