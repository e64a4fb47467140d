//! What a running machine is told from outside: signals, the end of its time, keys, the end of the guest.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::machine::Machine;
use crate::sys::signals::Signals;
use crate::terminal::Terminal;

/// What the control loop hears, and whether the run is over by it.
pub(crate) struct Control {
    pub(crate) machine: Arc<Machine>,
    pub(crate) signals: Signals,
    /// Until the run's time is up.
    pub(crate) duration: Option<TimerFd>,
    /// Standard input, if it goes to the guest.
    pub(crate) input: Option<Input>,
    /// To be told of its new size.
    pub(crate) terminal: Option<Arc<Terminal>>,
    /// Readable when something else wants the run to end.
    pub(crate) quit: EventFd,
    pub(crate) ended: bool,
}

/// Standard input that goes to the guest.
pub(crate) struct Input {
    /// Without the buffer of `io::stdin`, which epoll knows nothing of.
    file: File,
    /// `Ctrl-A` is an escape, as on a raw terminal.
    escapes: bool,
    escaped: bool,
}

impl Input {
    pub(crate) fn new(file: File, escapes: bool) -> Input {
        Input { file, escapes, escaped: false }
    }
}

const SIGNALS: u32 = 0;
const ENDED: u32 = 1;
const TIMER: u32 = 2;
const STDIN: u32 = 3;
const ROOM: u32 = 4;
const QUIT: u32 = 5;

impl Control {
    fn key(&mut self, bytes: &[u8]) {
        let Some(input) = &mut self.input else { return };
        if !input.escapes {
            self.machine.platform().serial().input(bytes);
            return;
        }
        let mut typed = Vec::with_capacity(bytes.len());
        for byte in bytes {
            match (input.escaped, byte) {
                (false, 0x01) => input.escaped = true,
                (true, b'x' | b'X') => self.ended = true,
                // Ctrl-A twice is one Ctrl-A.
                (true, 0x01 | b'a') => {
                    input.escaped = false;
                    typed.push(0x01);
                }
                (true, _) => input.escaped = false,
                (false, byte) => typed.push(*byte),
            }
        }
        self.machine.platform().serial().input(&typed);
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let mut watch = |events: Events| {
            if let Err(error) = ops.add(events) {
                eprintln!("vmm: cannot watch an event source: {error}");
            }
        };
        watch(Events::with_data(&self.signals, SIGNALS, EventSet::IN));
        watch(Events::with_data(self.machine.ended(), ENDED, EventSet::IN));
        watch(Events::with_data(self.machine.platform().serial().room(), ROOM, EventSet::IN));
        watch(Events::with_data(&self.quit, QUIT, EventSet::IN));
        if let Some(timer) = &self.duration {
            watch(Events::with_data(timer, TIMER, EventSet::IN));
        }
        if let Some(input) = &self.input
            && ops.add(Events::with_data(&input.file, STDIN, EventSet::IN)).is_err()
        {
            // A regular file or /dev/null cannot be polled, and need not be.
            let mut text = Vec::new();
            if (&input.file).take(1 << 20).read_to_end(&mut text).is_ok() {
                self.key(&text);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            SIGNALS => {
                while let Some(signal) = self.signals.next() {
                    match signal {
                        libc::SIGWINCH => {
                            if let Some(terminal) = &self.terminal {
                                terminal.resized();
                            }
                        }
                        _ => self.ended = true,
                    }
                }
            }
            STDIN => {
                let Some(input) = &self.input else { return };
                let mut buffer = [0; 1024];
                match (&input.file).read(&mut buffer) {
                    Ok(n @ 1..) => self.key(&buffer[..n]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    _ => {
                        // End of input: the guest goes on without.
                        let _ = ops.remove(Events::empty(&input.file));
                    }
                }
            }
            ROOM => self.machine.platform().serial().feed(),
            _ => self.ended = true,
        }
    }
}
