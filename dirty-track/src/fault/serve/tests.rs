//! Handlers, harvests and a guest on a kernel that is simulated: page tables, a file's cache, and calls that fail.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::fault::sweep::NONE;
use crate::fault::{Split, Threshold, Window};
use crate::tracker::TrackerError;

/// A slot that begins and ends within blocks, in the guest and in this process alike.
const FRAMES: PageRange = PageRange { start: Gfn(0x2f0), pages: 0x520 };
const HVA: u64 = 0x7000_0000_0000 + 0xf0 * 4096;
const PAGES: usize = FRAMES.pages as usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    protected: bool,
}

/// What the kernel knows.
#[derive(Debug)]
struct Tables {
    mapped: Vec<Option<Mapped>>,
    /// First byte of each page: of private memory as long as it is mapped, of a file always.
    contents: Vec<u8>,
    /// The file has the page.
    cache: Vec<bool>,
    file: bool,
    /// Calls from now until one fails with an error, and which.
    trouble: Vec<(usize, i32)>,
    woken: BTreeSet<usize>,
}

type Hook = Box<dyn Fn(usize) + Send>;

struct Sim {
    tables: Mutex<Tables>,
    /// Called with a page that has become writable, before anybody knows.
    opened: Mutex<Option<Hook>>,
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.tables.fmt(f)
    }
}

impl Sim {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap()
    }

    fn tell(&self, page: usize) {
        if let Some(hook) = &*self.opened.lock().unwrap() {
            hook(page);
        }
    }
}

impl Tables {
    fn trouble(&mut self) -> Option<i32> {
        let (left, error) = self.trouble.last_mut()?;
        if *left > 0 {
            *left -= 1;
            return None;
        }
        let error = *error;
        self.trouble.pop();
        Some(error)
    }
}

impl Kernel for Sim {
    fn fill(&self, slot: usize, pages: Range<usize>, mut with: Fill<'_>, protected: bool) -> Progress {
        assert_eq!(slot, 0);
        let mut done = 0;
        for (index, page) in pages.clone().enumerate() {
            let mut tables = self.tables();
            if let Some(error) = tables.trouble() {
                return Progress { pages: done, error: Some(error) };
            }
            let there = tables.mapped[page].is_some() || tables.cache[page] && !matches!(with, Fill::Cache);
            let error = match with {
                _ if there => Some(libc::EEXIST),
                Fill::Cache if !tables.cache[page] => Some(libc::EFAULT),
                _ => None,
            };
            if error.is_some() {
                // The first page's error is told, another's is for the next call.
                return Progress { pages: done, error: if done == 0 { error } else { Some(libc::EAGAIN) } };
            }
            match with {
                Fill::Bytes(bytes) => {
                    assert_eq!(bytes.len(), pages.len() * PAGE_BYTES);
                    tables.contents[page] = bytes[index * PAGE_BYTES];
                }
                Fill::Lent(ref mut lent, first) => {
                    assert!(!protected);
                    tables.contents[page] = lent.bytes()[(first + index) * PAGE_BYTES];
                    lent.bytes()[(first + index) * PAGE_BYTES] = 0;
                }
                Fill::ZeroPage => {
                    assert!(!protected);
                    tables.contents[page] = 0;
                }
                Fill::Cache => {}
                Fill::Staged => {
                    assert!(!protected);
                    tables.contents[page] = original(page);
                }
            }
            tables.cache[page] = tables.file;
            tables.mapped[page] = Some(Mapped { protected });
            drop(tables);
            if !protected {
                self.tell(page);
            }
            done += 1;
        }
        Progress { pages: done, error: None }
    }

    fn open(&self, _: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        let mut tables = self.tables();
        if let Some(error) = tables.trouble() {
            return Err(errno::Error::new(error));
        }
        for page in pages.clone() {
            if let Some(mapped) = &mut tables.mapped[page] {
                mapped.protected = false;
            }
        }
        drop(tables);
        self.tell(pages.start);
        Ok(())
    }

    fn protect(&self, _: usize, pages: Range<usize>) -> Result<(), errno::Error> {
        let mut tables = self.tables();
        if let Some(error) = tables.trouble() {
            return Err(errno::Error::new(error));
        }
        tables.mapped[pages].iter_mut().flatten().for_each(|mapped| mapped.protected = true);
        Ok(())
    }

    fn wake(&self, _: usize, pages: Range<usize>) {
        self.tables().woken.extend(pages);
    }

    fn cold(&self, _: usize, _: Range<usize>) {}

    fn there(
        &self,
        _: usize,
        pages: Range<usize>,
        take: &mut dyn FnMut(Range<usize>),
    ) -> Result<(), errno::Error> {
        let tables = self.tables();
        pages.filter(|&page| tables.mapped[page].is_some()).for_each(|page| take(page..page + 1));
        Ok(())
    }

    fn look(&self, _: usize, pages: Range<usize>, leaf: usize) -> Result<Seen, errno::Error> {
        let tables = self.tables();
        let mut seen = Seen::default();
        for (page, leaf) in pages.zip(leaf..) {
            if let Some(mapped) = tables.mapped[page] {
                seen.present |= Leaves::one(leaf);
                seen.protected |= if mapped.protected { Leaves::one(leaf) } else { Leaves::NONE };
            }
        }
        Ok(seen)
    }
}

/// What the source has in a page.
fn original(page: usize) -> u8 {
    page as u8 | 1
}

#[derive(Debug, Default)]
struct Ledgered {
    /// Fetches from now until one fails.
    until_failure: Mutex<Option<usize>>,
}

impl PageSource for Ledgered {
    fn fetch(&self, pages: PageRange, into: &mut [u8]) -> io::Result<()> {
        assert_eq!(into.len() as u64, pages.bytes());
        if let Some(left) = &mut *self.until_failure.lock().unwrap() {
            if *left == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            *left -= 1;
        }
        for (gfn, page) in pages.iter().zip(into.chunks_mut(PAGE_BYTES)) {
            page.fill(original((gfn.0 - FRAMES.start.0) as usize));
        }
        Ok(())
    }
}

/// A guest's memory, and what is true of it.
struct World {
    pager: Pager<Sim>,
    worker: Worker,
    origin: Origin,
    /// What each page holds, whether it is mapped or not.
    contents: Vec<u8>,
    written: BTreeSet<usize>,
    /// Dropped by the host.
    dropped: BTreeSet<usize>,
    /// These may be reported without a write, and not as coarse: what was brought after the news of a drop and before the
    /// drop, once it is missed; and what was opened with its block and then unmapped behind the record's back.
    doubtful: BTreeSet<usize>,
    value: u8,
}

impl World {
    fn new(origin: Origin, policies: Policies) -> World {
        let file = origin == Origin::Cache;
        let holes = |page: usize| file && !page.is_multiple_of(5);
        let tables = Tables {
            mapped: vec![None; PAGES],
            contents: (0..PAGES).map(|page| if file && !holes(page) { original(page) } else { 0 }).collect(),
            cache: (0..PAGES).map(|page| file && !holes(page)).collect(),
            file,
            trouble: Vec::new(),
            woken: BTreeSet::new(),
        };
        let source: Option<Arc<dyn PageSource>> =
            (origin == Origin::Buffer).then(|| Arc::new(Ledgered::default()) as _);
        let ranges = [(0x300, 3), (0x410, 40), (0x5f0, 60)];
        let working_set =
            WorkingSet::new(ranges.map(|(start, pages)| PageRange { start: Gfn(start), pages }));
        let contents = (0..PAGES).map(|page| match origin {
            Origin::Zero => 0,
            Origin::Cache if holes(page) => 0,
            _ => original(page),
        });
        World {
            contents: contents.collect(),
            pager: Pager {
                kernel: Sim { tables: Mutex::new(tables), opened: Mutex::new(None) },
                stage2: Stage2::new([FRAMES]).unwrap(),
                slots: vec![Served {
                    frames: FRAMES,
                    hva: HVA,
                    origin,
                    source,
                    huge: false,
                    moves: origin == Origin::Buffer,
                }],
                policies,
                working_set,
                track: AtomicBool::new(false),
                news: RwLock::new(()),
                asked: AtomicU64::new(NONE),
                claims: Claims::default(),
                counters: Counters::default(),
            },
            worker: Worker::default(),
            origin,
            written: BTreeSet::new(),
            dropped: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            value: 0,
        }
    }

    fn serve(&mut self, page: usize, cause: Cause) -> Result<(), FaultError> {
        self.pager.kernel.tables().woken.clear();
        let address = HVA + page as u64 * 4096 + 123;
        let outcome = self.pager.serve(&mut self.worker, address, cause);
        if outcome.is_ok() {
            assert!(self.pager.kernel.tables().woken.contains(&page), "nobody woke who waits at {page}");
        }
        outcome
    }

    /// The guest accesses a page, and faults until it can.
    fn access(&mut self, page: usize, write: bool) {
        for _ in 0..20 {
            let (mapped, cached) = {
                let tables = self.pager.kernel.tables();
                (tables.mapped[page], tables.cache[page])
            };
            let cause = match mapped {
                None if cached => Cause::Minor { write },
                None => Cause::Missing { write },
                Some(Mapped { protected: true }) if write => Cause::Protected,
                Some(_) => {
                    let mut tables = self.pager.kernel.tables();
                    assert_eq!(tables.contents[page], self.contents[page], "page {page}");
                    if write {
                        self.value = self.value.wrapping_add(2);
                        tables.contents[page] = self.value;
                        self.contents[page] = self.value;
                        self.written.insert(page);
                    }
                    return;
                }
            };
            // An error is tried again.
            let _ = self.serve(page, cause);
        }
        panic!("the guest waits at page {page} for ever");
    }

    /// The host drops pages; the news comes first, and the guest may be quick.
    fn remove(&mut self, pages: Range<usize>, between: Option<(usize, bool)>, harvest: bool) {
        let address = |page: usize| HVA + page as u64 * 4096;
        let before = self.pager.kernel.tables().mapped.clone();
        self.pager.removed(&mut self.worker, address(pages.start)..address(pages.end)).unwrap();
        if let Some((page, write)) = between {
            // It may see the old contents or none, and what it writes may be dropped at once. An error leaves it asleep.
            let mapped = self.pager.kernel.tables().mapped[page];
            if !pages.contains(&page) {
                self.access(page, write);
            } else if let (true, Some(Mapped { protected: true })) = (write, mapped) {
                let _ = self.serve(page, Cause::Protected);
            } else if mapped.is_none() && self.origin != Origin::Cache {
                let _ = self.serve(page, Cause::Missing { write });
            }
        }
        if harvest {
            self.pager.kernel.tables().trouble.clear();
            let (taken, _) = self.harvest().unwrap();
            assert!(taken.is_superset(&self.written) && taken.is_superset(&self.dropped));
            self.written.clear();
            self.dropped.clear();
        }
        let recorded = |page: &usize| {
            let gfn = Gfn(FRAMES.start.0 + *page as u64);
            let block = self.pager.stage2.block(gfn).unwrap();
            block.leaf((gfn.0 % LEAVES_PER_BLOCK) as usize).present
        };
        self.doubtful.extend(pages.clone().filter(recorded));
        let mut tables = self.pager.kernel.tables();
        for page in pages {
            // What was gone before the harvest looked is in it already; what came after the news is the guest's doing.
            if !harvest || before[page].is_some() && tables.mapped[page].is_some() {
                self.dropped.insert(page);
            }
            tables.mapped[page] = None;
            tables.cache[page] = false;
            tables.contents[page] = 0;
            self.contents[page] = 0;
        }
    }

    fn harvest(&mut self) -> Result<(BTreeSet<usize>, BTreeSet<usize>), FaultError> {
        let (mut taken, mut coarse) = (BTreeSet::new(), BTreeSet::new());
        self.pager.harvest(&mut Spare::default(), |index, block, dirty, unsure| {
            assert_eq!(index, 0);
            assert!(dirty.includes(&unsure));
            for (leaves, set) in [(dirty, &mut taken), (unsure, &mut coarse)] {
                let frames = leaves.runs().flat_map(|run| block.frames(run).iter().collect::<Vec<_>>());
                set.extend(frames.map(|gfn| (gfn.0 - FRAMES.start.0) as usize));
            }
        })?;
        Ok((taken, coarse))
    }

    /// Whatever happens, no write can go unseen.
    fn check(&self) {
        let found = self.pager.check().unwrap();
        assert!(found.iter().all(|found| !found.what.is_harmful()), "{found:?}");
    }
}

#[derive(Clone, Debug)]
enum Op {
    Access {
        page: usize,
        write: bool,
    },
    Run {
        page: usize,
        pages: usize,
        write: bool,
    },
    Remove {
        page: usize,
        pages: usize,
        between: Option<(usize, bool)>,
        harvest: bool,
    },
    /// Private memory goes to a file's way: mappings go, contents stay.
    Unmap {
        page: usize,
        pages: usize,
    },
    Harvest,
    Track(bool),
    FillRest(usize),
    Trouble(usize, i32),
}

fn op() -> impl Strategy<Value = Op> {
    let between = prop::option::of((0..PAGES, any::<bool>()));
    prop_oneof![
        8 => (0..PAGES, any::<bool>()).prop_map(|(page, write)| Op::Access { page, write }),
        3 => (0..PAGES - 80, 1..80usize, any::<bool>())
            .prop_map(|(page, pages, write)| Op::Run { page, pages, write }),
        2 => (0..PAGES - 80, 1..80usize, between, any::<bool>()).prop_map(
            |(page, pages, between, harvest)| Op::Remove { page, pages, between, harvest }
        ),
        1 => (0..PAGES - 80, 1..80usize).prop_map(|(page, pages)| Op::Unmap { page, pages }),
        3 => Just(Op::Harvest),
        1 => any::<bool>().prop_map(Op::Track),
        1 => (0..PAGES).prop_map(Op::FillRest),
        1 => (0..30usize, prop_oneof![Just(libc::EAGAIN), Just(libc::ENOENT), Just(libc::ENOMEM)])
            .prop_map(|(calls, error)| Op::Trouble(calls, error)),
    ]
}

fn policies() -> impl Strategy<Value = Policies> {
    let split = prop_oneof![
        2 => Just(Split::Leaf),
        1 => Just(Split::Block),
        1 => (1..=100u64).prop_map(|leaves| Split::Adaptive(Threshold::new(leaves).unwrap())),
    ];
    let prefault = prop_oneof![
        Just(Prefault::None),
        Just(Prefault::Block),
        Just(Prefault::Recorded),
        (13..=18u32).prop_map(|bits| Prefault::Around(Window::new(1 << bits).unwrap())),
    ];
    let age = prop_oneof![Just(Age::Old), Just(Age::Young)];
    (split, prefault, age).prop_map(|(split, prefault, age)| Policies { split, prefault, age })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn contents_are_right_and_no_write_is_missed(
        ops in prop::collection::vec(op(), 1..40),
        policies in policies(),
        origin in prop_oneof![
            Just(Origin::Zero), Just(Origin::Buffer), Just(Origin::Cache), Just(Origin::Staged)
        ],
    ) {
        let mut world = World::new(origin, policies);
        let mut tracked = false;
        // Pages that are dirty although nobody wrote: they were dropped.
        let mut calm = true;
        for op in ops {
            match op {
                Op::Access { page, write } => world.access(page, write),
                Op::Run { page, pages, write } => {
                    (page..page + pages).for_each(|page| world.access(page, write));
                }
                Op::Remove { page, pages, between, harvest } => {
                    world.remove(page..page + pages, between, harvest);
                }
                Op::Unmap { page, pages } => if origin == Origin::Cache {
                    let mut tables = world.pager.kernel.tables();
                    // Reclaim: what is protected stays so by a marker, which a later mapping replaces.
                    tables.mapped[page..page + pages].fill(None);
                    drop(tables);
                    if policies.split != Split::Leaf {
                        world.doubtful.extend(page..page + pages);
                    }
                }
                Op::FillRest(page) => {
                    let gfn = Gfn(FRAMES.start.0 + page as u64);
                    if !matches!(origin, Origin::Zero | Origin::Cache) {
                        let _ = world.pager.fill_block(&mut world.worker, 0, gfn, |_| Leaves::ALL);
                    }
                }
                Op::Trouble(calls, error) => {
                    calm = false;
                    world.pager.kernel.tables().trouble = vec![(calls, error)];
                }
                Op::Track(on) => {
                    world.pager.kernel.tables().trouble.clear();
                    let outcome = if on { world.pager.track() } else { world.pager.untrack() };
                    match outcome {
                        Ok(()) => tracked = on,
                        Err(FaultError::Slots(TrackerError::AlreadyArmed)) => prop_assert!(tracked && on),
                        Err(error) => panic!("{error}"),
                    }
                    if on {
                        world.harvest().unwrap();
                    }
                    world.written.clear();
                    world.dropped.clear();
                    calm = tracked;
                }
                Op::Harvest => {
                    let outcome = world.harvest();
                    let (taken, coarse) = match outcome {
                        Ok(both) => both,
                        // What it had taken is owed by who called; here it counts as lost track of.
                        Err(_) => {
                            world.pager.kernel.tables().trouble.clear();
                            world.written.clear();
                            world.dropped.clear();
                            calm = false;
                            continue;
                        }
                    };
                    let owed: BTreeSet<_> = world.written.union(&world.dropped).copied().collect();
                    let missed: Vec<_> = owed.difference(&taken).collect();
                    prop_assert!(missed.is_empty(), "missed {:?}", missed);
                    let sure: BTreeSet<_> = taken.difference(&coarse).copied().collect();
                    if calm && tracked && origin != Origin::Staged {
                        // Exact, but for what the policy of splitting leaves in doubt.
                        let extra: Vec<_> =
                            sure.difference(&owed).filter(|page| !world.doubtful.contains(page)).collect();
                        prop_assert!(extra.is_empty(), "extra {:?}", extra);
                        prop_assert!(policies.split != Split::Leaf || coarse.is_empty(), "{:?}", coarse);
                    }
                    world.written.clear();
                    world.dropped.clear();
                    if !tracked {
                        calm = false;
                    }
                }
            }
            world.check();
        }
    }

    #[test]
    fn only_what_was_touched_is_young(
        pages in prop::collection::btree_set(0..PAGES / 16, 1..30),
        write in any::<bool>(),
        track in any::<bool>(),
    ) {
        // One page of a window each.
        let old = Policies { prefault: Prefault::Around(Window::default()), ..Policies::default() };
        for age in [Age::Old, Age::Young] {
            let mut world = World::new(Origin::Buffer, Policies { age, ..old });
            if track {
                world.pager.track().unwrap();
            }
            for page in &pages {
                world.access(page * 16 + page % 16, write);
            }
            let touched = WorkingSet::touched(&world.pager.stage2).pages();
            let counts = world.pager.counters.now();
            let asked = pages.len() as u64;
            prop_assert_eq!(touched, if age == Age::Old { asked } else { asked * 16 });
            prop_assert_eq!((counts.installed, counts.prefaulted), (asked * 16, asked * 15));
            prop_assert_eq!(counts.old, if age == Age::Old { asked * 15 } else { 0 });
            prop_assert_eq!((counts.hits, counts.untouched()), (0, counts.old));
            // Whoever writes to one that came along has touched it.
            let page = *pages.first().unwrap() * 16 + (*pages.first().unwrap() + 1) % 16;
            world.access(page, true);
            let counts = world.pager.counters.now();
            prop_assert_eq!(counts.hits, u64::from(age == Age::Old));
        }
    }
}

#[test]
fn a_source_that_fails_leaves_the_guest_asleep_and_nothing_in_between() {
    let mut world = World::new(Origin::Buffer, Policies::default());
    let source = Arc::new(Ledgered { until_failure: Mutex::new(Some(0)) });
    world.pager.slots[0].source = Some(source.clone());
    let outcome = world.serve(40, Cause::Missing { write: true });
    assert!(matches!(outcome, Err(FaultError::Fetch { gfn: Gfn(0x318), .. })), "{outcome:?}");
    assert!(world.pager.kernel.tables().mapped.iter().all(Option::is_none));
    assert_eq!(world.pager.counters.now().installed, 0);
    *source.until_failure.lock().unwrap() = None;
    world.access(40, true);
    // A neighbour that cannot be had does not keep the page from coming: the second of two runs fails, and the page
    // comes alone.
    world.access(72, true);
    let block = world.pager.stage2.block(Gfn(0x318)).unwrap();
    assert_eq!(block.present().count(), 32);
    drop(block);
    let mut other = World::new(Origin::Buffer, Policies { prefault: Prefault::Block, ..Policies::default() });
    other
        .pager
        .stage2
        .block(Gfn(0x308))
        .unwrap()
        .map(&Leaves::one(0x108), Mapping { protected: false, old: false }, &mut Spare::default())
        .unwrap();
    other.pager.slots[0].source = Some(Arc::new(Ledgered { until_failure: Mutex::new(Some(1)) }));
    other.serve(0x10, Cause::Missing { write: false }).unwrap();
    assert_eq!(other.pager.counters.now().installed, 1);
}

/// What was mapped before anybody served it, or behind the server's back, is written unseen until it is known.
#[test]
fn what_is_there_already_is_recorded() {
    for adopted in [true, false] {
        let mut world = World::new(Origin::Zero, Policies::default());
        for page in [16, 20] {
            world.pager.kernel.tables().mapped[page] = Some(Mapped { protected: page == 20 });
        }
        let known = |world: &World| world.pager.check().unwrap().is_empty();
        assert!(!known(&world));
        if adopted {
            world.pager.adopt().unwrap();
        } else {
            // The window of page 17 has them.
            world.access(17, false);
        }
        assert!(known(&world));
        let (taken, coarse) = world.harvest().unwrap();
        assert!(taken.contains(&16) && coarse.contains(&16) && !taken.contains(&20), "{taken:?}");
        world.access(16, true);
        assert_eq!(world.harvest().unwrap().0, BTreeSet::from([16]));
    }
}

#[test]
fn a_huge_page_is_one_thing() {
    let mut world = World::new(Origin::Buffer, Policies::default());
    let frames = PageRange { start: Gfn(0x400), pages: 0x400 };
    world.pager.stage2 = Stage2::new([frames]).unwrap();
    world.pager.slots[0].frames = frames;
    world.pager.slots[0].hva = 0x7000_0000_0000;
    world.pager.slots[0].huge = true;
    #[derive(Debug)]
    struct Ones;
    impl PageSource for Ones {
        fn fetch(&self, _: PageRange, into: &mut [u8]) -> io::Result<()> {
            into.fill(1);
            Ok(())
        }
    }
    world.pager.slots[0].source = Some(Arc::new(Ones));
    world.pager.track().unwrap();
    let at = |page: u64| 0x7000_0000_0000 + page * 4096;
    world.pager.serve(&mut world.worker, at(700), Cause::Missing { write: false }).unwrap();
    let kind = |world: &World| world.pager.stage2.block(Gfn(0x600)).unwrap().kind();
    assert_eq!(kind(&world), Kind::Huge { protected: true });
    assert!(world.pager.kernel.tables().woken.contains(&700));
    world.pager.serve(&mut world.worker, at(700), Cause::Protected).unwrap();
    assert_eq!(kind(&world), Kind::Huge { protected: false });
    let mut taken = Vec::new();
    let mut harvest = || {
        taken.clear();
        world
            .pager
            .harvest(&mut Spare::default(), |_, block, dirty, coarse| {
                assert!(coarse.is_empty());
                taken.extend(dirty.runs().map(|run| block.frames(run)));
            })
            .unwrap();
        taken.clone()
    };
    assert_eq!(harvest(), [PageRange { start: Gfn(0x600), pages: 512 }]);
    assert_eq!(harvest(), []);
    assert_eq!(kind(&world), Kind::Huge { protected: true });
    assert_eq!(world.pager.counters.now().splits, 0);
}

#[test]
fn what_a_strange_address_says_is_counted_and_harms_nobody() {
    let mut world = World::new(Origin::Zero, Policies::default());
    for address in [0, HVA - 1, HVA + FRAMES.bytes(), u64::MAX] {
        world.pager.serve(&mut world.worker, address, Cause::Protected).unwrap();
    }
    assert_eq!(world.pager.counters.now().strange, 4);
    world.pager.removed(&mut world.worker, 0..u64::MAX).unwrap();
    world.access(5, false);
}

/// A page becomes writable before the record says so, and another vCPU may write to it and be stopped. The harvest that
/// begins then must wait for the record.
#[test]
fn a_harvest_waits_for_who_is_opening_a_page() {
    for protected in [false, true] {
        let mut world =
            World::new(Origin::Zero, Policies { prefault: Prefault::None, ..Policies::default() });
        world.pager.track().unwrap();
        if protected {
            world.access(9, false);
        }
        let (opened, begin) = mpsc::channel();
        let (done, finished) = mpsc::channel();
        let finished = Mutex::new(finished);
        *world.pager.kernel.opened.lock().unwrap() = Some(Box::new(move |page| {
            opened.send(page).unwrap();
            // As long as a harvest takes that does not wait.
            let _ = finished.lock().unwrap().recv_timeout(Duration::from_millis(100));
        }));
        let cause = if protected { Cause::Protected } else { Cause::Missing { write: true } };
        let World { pager, worker, .. } = &mut world;
        let pager = &*pager;
        let harvested = std::thread::scope(|scope| {
            let harvester = scope.spawn(move || {
                assert_eq!(begin.recv().unwrap(), 9);
                let mut taken = 0;
                pager.harvest(&mut Spare::default(), |_, _, dirty, _| taken += dirty.count()).unwrap();
                let _ = done.send(());
                taken
            });
            pager.serve(worker, HVA + 9 * 4096, cause).unwrap();
            harvester.join().unwrap()
        });
        assert_eq!(harvested, 1, "protected: {protected}");
    }
}

proptest! {
    #[test]
    fn few_runs_reach_all_that_came_along_and_nothing_that_is_young(words in any::<[[u64; 8]; 3]>()) {
        // Sparse ones, so that there are gaps.
        let young = Leaves(words[0]) & Leaves(words[1]);
        let along = Leaves(words[1]) & Leaves(words[2]) & !young;
        let (mut reached, mut calls) = (Leaves::NONE, 0);
        hulls(&along, &young, |run| {
            assert!(along.contains(run.start) && along.contains(run.end - 1));
            reached |= Leaves::range(run);
            calls += 1;
        });
        prop_assert!(reached.includes(&along));
        prop_assert!((reached & young).is_empty());
        prop_assert!(calls <= young.count() + 1);
    }
}
