//! Which pages the host's reclaim takes first: those that came along old, or those that the guest touched.
//!
//! A process in a memory cgroup of its own serves a guest that reads one page of each window; then the cgroup's limit
//! is lowered to half of what it has, and what is still there is counted. The process is this test's executable again;
//! the cgroup, and swap where the host has none, are made and removed by the test.

use std::env;
use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use dirty_track::addr::{Gfn, PAGE_SIZE};
use dirty_track::fault::{Age, Config, Policies, Server, Source};
use dirty_track::sys::pagemap::{Found, Pagemap};

use crate::machine::{Machine, kvm, skip};

const TEST: &str = "reclaim::what_came_along_old_is_reclaimed_before_what_was_touched";

/// Says to the executable that it is the process in the cgroup, and how old pages are there.
const AGE: &str = "DIRTY_TRACK_RECLAIM_AGE";

/// The guest's memory: 64 MiB.
const FIRST: Gfn = Gfn(0x400);
const PAGES: u64 = 0x4000;
/// Pages that are mapped by one fault: 64 KiB.
const WINDOW: u64 = 16;

const SWAP_BYTES: u64 = 128 << 20;

#[test]
fn what_came_along_old_is_reclaimed_before_what_was_touched() {
    if let Ok(age) = env::var(AGE) {
        return in_the_cgroup(age.parse().unwrap());
    }
    if kvm(TEST).is_none() {
        return;
    }
    let _swap = match Swap::on() {
        Ok(swap) => swap,
        Err(why) => return skip(TEST, format_args!("no swap: {why}")),
    };
    let mut kept = [(0.0, 0.0); 2];
    for (age, kept) in [Age::Old, Age::Young].into_iter().zip(&mut kept) {
        let cgroup = match Cgroup::new() {
            Ok(cgroup) => cgroup,
            Err(why) => return skip(TEST, why),
        };
        let Some(shares) = measure(&cgroup, age) else { return };
        println!("{age}: {:.1} % of what was touched kept, {:.1} % of what came along", shares.0, shares.1);
        *kept = shares;
    }
    let [(touched_old, along_old), (touched_young, _)] = kept;
    assert!(along_old < 75.0, "the host reclaimed too little to tell: {along_old:.1} % kept");
    assert!(touched_old > 90.0, "{touched_old:.1} % of what was touched is left");
    assert!(touched_young < touched_old, "young pages are no different: {touched_young:.1} % left");
}

/// The shares, in percent, of touched pages and of those that came along that are there after reclaim. None, and a line
/// on the terminal, on a host without what it takes.
fn measure(cgroup: &Cgroup, age: Age) -> Option<(f64, f64)> {
    let mut child = Stopped(
        Command::new(env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(AGE, age.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut orders = child.0.stdin.take().unwrap();
    let mut answers = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let mut ask = |order: &str| {
        writeln!(orders, "{order}").unwrap();
        // The test harness has lines of its own.
        let answer = answers
            .by_ref()
            .map(Result::unwrap)
            .find_map(|line| Some(line.split_once("reclaim: ")?.1.to_owned()));
        answer.expect("the process in the cgroup ended")
    };
    cgroup.add(child.0.id()).unwrap();
    let ready = ask("begin");
    if let Some(why) = ready.strip_prefix("skipped: ") {
        skip(TEST, why);
        return None;
    }
    let used = cgroup.usage().unwrap();
    assert!(used > PAGES * PAGE_SIZE, "{used} bytes are in use");
    cgroup.limit(used - PAGES * PAGE_SIZE / 2);
    let counts: Vec<u64> = ask("count").split(' ').map(|count| count.parse().unwrap()).collect();
    writeln!(orders, "end").unwrap();
    assert!(child.0.wait().unwrap().success());
    let share = |count: u64, of: u64| count as f64 / of as f64 * 100.0;
    Some((share(counts[0], PAGES / WINDOW), share(counts[1], PAGES - PAGES / WINDOW)))
}

/// What the process in the cgroup does: it waits for an order, and says when it was carried out.
fn in_the_cgroup(age: Age) {
    let mut orders = io::stdin().lines().map(Result::unwrap);
    assert_eq!(orders.next().unwrap(), "begin");
    let (machine, mut guest) = Machine::new(&kvm(TEST).unwrap(), &[(FIRST, PAGES)]);
    let slot = machine.slots[0].clone();
    let config = Config { policies: Policies { age, ..Policies::default() }, ..Config::default() };
    let server =
        match Server::start(vec![(slot.clone(), Source::Fetch(std::sync::Arc::new(Numbers)))], config) {
            Ok(server) => server,
            Err(why) => return println!("reclaim: skipped: {why}"),
        };
    let is_touched = |page: u64| page % WINDOW == page / WINDOW % WINDOW;
    let touched: Vec<_> =
        (0..PAGES).filter(|page| is_touched(*page)).map(|page| Gfn(FIRST.0 + page)).collect();
    guest.read(&touched);
    println!("reclaim: ready");
    assert_eq!(orders.next().unwrap(), "count");
    let (mut kept, pagemap) = ([0; 2], Pagemap::open().unwrap());
    let (mut from, end) = (slot.hva(), slot.hva() + slot.len());
    while from < end {
        let mut found = [Found::NOTHING; 64];
        let (runs, next) = pagemap.mapped(from, end, &mut found).unwrap();
        let present = found[..runs].iter().filter(|run| !run.is_swapped());
        for address in present.flat_map(|run| run.addresses().step_by(PAGE_SIZE as usize)) {
            kept[usize::from(!is_touched((address - slot.hva()) / PAGE_SIZE))] += 1;
        }
        from = next;
    }
    println!("reclaim: {} {}", kept[0], kept[1]);
    assert_eq!(orders.next().unwrap(), "end");
    // What went to swap comes back as it was.
    for page in 0..PAGES {
        assert_eq!(machine.stamp(Gfn(FIRST.0 + page)), page as u32 + 1);
    }
    drop(server);
}

/// No page is like another, so that none is shared.
#[derive(Debug)]
struct Numbers;

impl dirty_track::fault::PageSource for Numbers {
    fn fetch(&self, pages: dirty_track::addr::PageRange, into: &mut [u8]) -> io::Result<()> {
        for (gfn, page) in pages.iter().zip(into.chunks_mut(PAGE_SIZE as usize)) {
            page.fill(0);
            let number = (gfn.0 - FIRST.0) as u32 + 1;
            page.chunks_mut(4).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
        }
        Ok(())
    }
}

/// A process that ends with the test, however that ends.
struct Stopped(Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Files of a memory cgroup: its limit and its usage, in version 1 or 2 of cgroups.
struct Cgroup {
    path: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Cgroup {
    fn new() -> Result<Cgroup, String> {
        let (v1, v2) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let has = |root: &Path, file: &str, word: &str| {
            fs::read_to_string(root.join(file))
                .is_ok_and(|text| text.split_whitespace().any(|has| has == word))
        };
        let (root, limit, usage) = if v1.join("memory.limit_in_bytes").exists() {
            (v1, "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else if has(v2, "cgroup.subtree_control", "memory") {
            (v2, "memory.max", "memory.current")
        } else {
            return Err("this host has no memory cgroups at /sys/fs/cgroup".to_owned());
        };
        let path = root.join(format!("dirty-track-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("cannot make the cgroup {path:?}: {error}"))?;
        Ok(Cgroup { path, limit, usage })
    }

    fn add(&self, process: u32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), process.to_string())
    }

    fn usage(&self) -> io::Result<u64> {
        fs::read_to_string(self.path.join(self.usage))?.trim().parse().map_err(io::Error::other)
    }

    /// Lowers the limit, by steps that the kernel can reclaim while it is asked to.
    fn limit(&self, bytes: u64) {
        let now = self.usage().unwrap();
        for step in 1..=16 {
            let next = now - (now - bytes) / 16 * step;
            for _ in 0..100 {
                match fs::write(self.path.join(self.limit), next.to_string()) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        thread::sleep(Duration::from_millis(1));
                    }
                    outcome => {
                        outcome.unwrap();
                        break;
                    }
                }
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel lets go of a process a moment after it was waited for.
        for _ in 0..1000 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        eprintln!("cannot remove the cgroup {:?}", self.path);
    }
}

/// Swap of this test's own, where the host has none.
struct Swap(Option<PathBuf>);

impl Swap {
    fn on() -> Result<Swap, String> {
        let swaps = fs::read_to_string("/proc/swaps").map_err(|error| format!("/proc/swaps: {error}"))?;
        if swaps.lines().count() > 1 {
            return Ok(Swap(None));
        }
        let path = env::temp_dir().join(format!("dirty-track-{}.swap", std::process::id()));
        let swap = Swap(Some(path.clone()));
        write_swap(&path).map_err(|error| format!("{path:?}: {error}"))?;
        run("swapon", &path)?;
        Ok(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        // It may never have been turned on.
        let _ = run("swapoff", path);
        let _ = fs::remove_file(path);
    }
}

/// A file without holes, and the header that the kernel looks for (include/linux/swap.h, `union swap_header`).
fn write_swap(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let zeros = vec![0; 1 << 20];
    for at in (0..SWAP_BYTES).step_by(zeros.len()) {
        file.write_all_at(&zeros, at)?;
    }
    let mut header = [0; 12];
    header[..4].copy_from_slice(&1u32.to_le_bytes());
    header[4..8].copy_from_slice(&((SWAP_BYTES / PAGE_SIZE - 1) as u32).to_le_bytes());
    file.write_all_at(&header, 1024)?;
    file.write_all_at(b"SWAPSPACE2", PAGE_SIZE - 10)?;
    file.sync_all()
}

fn run(program: &str, path: &Path) -> Result<(), String> {
    let failed = |why: &dyn Display| format!("{program} {path:?}: {why}");
    let output = ["/sbin", "/usr/sbin", "/bin"]
        .into_iter()
        .map(|directory| Path::new(directory).join(program))
        .find(|program| program.exists())
        .ok_or_else(|| failed(&"no such program"))
        .and_then(|program| Command::new(program).arg(path).output().map_err(|error| failed(&error)))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(&String::from_utf8_lossy(&output.stderr).trim()))
    }
}
