//! The user's terminal, shared by the guest's console and a panel of a few lines below it.
//!
//! The console keeps a scroll region of its own (DECSTBM), so the guest may leave a line half-written, as a
//! prompt does, while the panel is redrawn below. Whatever happens, dropping the [`Terminal`] gives the whole
//! screen back.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::sys::tty;

/// A terminal with a panel at its bottom.
#[derive(Debug)]
pub struct Terminal {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rows: u16,
    cols: u16,
    height: u16,
    lines: Vec<String>,
    /// The whole screen was given back.
    closed: bool,
}

impl Terminal {
    /// Takes the bottom `height` lines of the terminal on standard output. `None` when that is not a
    /// terminal, or one too small.
    pub fn open(height: u16) -> Option<Arc<Terminal>> {
        let (rows, cols) = tty::size(io::stdout().as_raw_fd())?;
        if rows < height + 4 || cols < 40 {
            return None;
        }
        let state = State { rows, cols, height, lines: Vec::new(), closed: false };
        // Make room below the cursor without losing what is above.
        let mut out = "\n".repeat(height.into());
        out.push_str(&format!("\x1b[{height}A"));
        out.push_str(&state.region());
        put(out.as_bytes());
        Some(Arc::new(Terminal { state: Mutex::new(state) }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A half-drawn panel is drawn again.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.lock().cols.into()
    }

    /// Shows these lines in the panel; more than fit are cut off. They must not be wider than
    /// [`Terminal::width`].
    pub fn draw(&self, lines: Vec<String>) {
        let mut state = self.lock();
        state.lines = lines;
        if !state.closed {
            put(state.panel().as_bytes());
        }
    }

    /// Adapts to the terminal's new size.
    pub fn resized(&self) {
        let Some((rows, cols)) = tty::size(io::stdout().as_raw_fd()) else { return };
        let mut state = self.lock();
        if rows < state.height + 4 || state.closed {
            return;
        }
        (state.rows, state.cols) = (rows, cols);
        put(format!("{}{}", state.region(), state.panel()).as_bytes());
    }

    /// Gives the whole screen back, although others have a part in the terminal still: nothing is drawn from now on.
    pub fn close(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.closed, true) {
            let first = state.rows - state.height + 1;
            put(format!("\x1b7\x1b[r\x1b[{first};1H\x1b[J\x1b8").as_bytes());
        }
    }
}

impl State {
    /// Sets the scroll region above the panel and puts the cursor back where it was, or into the region.
    fn region(&self) -> String {
        format!("\x1b7\x1b[1;{}r\x1b8", self.rows - self.height)
    }

    fn panel(&self) -> String {
        // A guest may have reset the region; setting it again costs nothing.
        let mut out = format!("{}\x1b7", self.region());
        for (index, line) in self.lines.iter().take(self.height.into()).enumerate() {
            let row = self.rows - self.height + 1 + index as u16;
            out.push_str(&format!("\x1b[{row};1H\x1b[2K{line}\x1b[0m"));
        }
        out.push_str("\x1b8");
        out
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.close();
    }
}

/// Gives the whole screen back on a way out on which nothing is dropped: a panic aborts the process.
pub fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tty::restore();
        if tty::size(io::stdout().as_raw_fd()).is_some() {
            // Past the lock of `stdout`, which the panicking thread may hold.
            let _ = io::stderr().write_all(b"\x1b[r\n");
        }
        report(panic);
    }));
}

/// Writes to the terminal, past the buffer of `stdout`. A terminal that is gone has nobody to miss it.
fn put(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(bytes);
    let _ = out.flush();
}

/// The guest's console on a terminal with a panel.
pub struct Console(pub Arc<Terminal>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _panel_rests = self.0.lock();
        put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
