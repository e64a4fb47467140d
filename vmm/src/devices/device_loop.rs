//! The device loop: one thread that serves the queues of all virtio devices.
//!
//! It is a thread of its own, apart from the one that has the console and the signals, because a disk may take
//! its time (an fsync, a slow read), and Ctrl-C must not wait for it.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::virtio::QueueWorker;

/// Why there is no device loop.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// A system resource.
    #[error("cannot {what} for the device loop: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The event manager.
    #[error("cannot make the device loop: {0}")]
    Events(#[from] event_manager::Error),
}

/// A running device loop. Dropping it stops it, after the requests that it is at.
#[derive(Debug)]
pub struct DeviceLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Ends the loop when its eventfd is signalled.
struct Stop {
    event: EventFd,
    stopped: bool,
}

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.event, EventSet::IN)) {
            eprintln!("vmm: the device loop cannot be told to stop: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.stopped = true;
    }
}

/// The loop's thread calls devices, and they call the file system.
const STACK: usize = 256 << 10;

impl DeviceLoop {
    /// Starts a loop that serves `workers`.
    ///
    /// # Errors
    /// When the process is out of file descriptors or threads.
    pub fn start(workers: Vec<QueueWorker>) -> Result<DeviceLoop, LoopError> {
        let system = |what| move |source| LoopError::System { what, source };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
        let event = stop.try_clone().map_err(system("copy an eventfd"))?;
        let control = Arc::new(Mutex::new(Stop { event, stopped: false }));
        let mut events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> = EventManager::new()?;
        events.add_subscriber(Arc::clone(&control) as _);
        for worker in workers {
            events.add_subscriber(Arc::new(Mutex::new(worker)));
        }
        let thread = thread::Builder::new()
            .name("devices".into())
            .stack_size(STACK)
            .spawn(move || {
                while !control.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).stopped {
                    if let Err(error) = events.run() {
                        eprintln!("vmm: the device loop broke, devices answer no more: {error}");
                        return;
                    }
                }
            })
            .map_err(system("start the thread"))?;
        Ok(DeviceLoop { stop, thread: Some(thread) })
    }
}

impl Drop for DeviceLoop {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then it is signalled as much as it can be.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panicked loop has printed its message.
            let _ = thread.join();
        }
    }
}
