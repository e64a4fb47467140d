//! What a harvest is: a set of pages that is owed until it is committed.
//!
//! The set lives in the tracker. A harvest ORs what the epoch brought into it and lends it out; committing
//! empties it, dropping does not. So an uncommitted harvest, or one that failed half way, costs nothing and
//! needs no undo: its pages are still in the set when the next harvest is added to it.

use std::ops::Range;
use std::time::Duration;

use crate::addr::{Gfn, PageRange};
use crate::bitmap::{self, PAGES_PER_WORD};
use crate::tracker::Slot;
use crate::tracker::chosen::Chosen;
use crate::tracker::wp_slot::masks;

/// The dirty pages of one slot.
#[derive(Debug)]
pub struct SlotSet {
    id: u32,
    frames: PageRange,
    /// No others are ever added.
    chosen: Chosen,
    words: Vec<u64>,
    host: Vec<u64>,
    /// The words that may have pages, here and in the sets below: all others are clean. Most epochs dirty a small
    /// part of a slot, and nothing looks at the rest.
    touched: Range<usize>,
    /// For each vCPU the pages that it wrote, which are in `words` as well. Empty with a tracker that cannot
    /// tell them apart.
    by_vcpu: Vec<Vec<u64>>,
    /// Those of `words` of which it is not known that they were written. Empty where all are known.
    coarse: Vec<u64>,
}

impl SlotSet {
    fn new(slot: &Slot) -> SlotSet {
        let clean = || bitmap::clean_words(slot.frames().pages as usize);
        SlotSet {
            id: slot.id(),
            frames: slot.frames(),
            chosen: slot.chosen().clone(),
            words: clean(),
            host: clean(),
            touched: 0..0,
            by_vcpu: Vec::new(),
            coarse: Vec::new(),
        }
    }

    /// The memslot's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The slot's frames, dirty or not.
    pub fn frames(&self) -> PageRange {
        self.frames
    }

    /// Dirty pages, one bit each, counted from the slot's first frame; see [`crate::bitmap`].
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Those of them that the host wrote (the guest may have written them as well).
    pub fn host_words(&self) -> &[u64] {
        &self.host
    }

    /// Those of them that vCPU number `vcpu` wrote, as [`SlotSet::words`]; see [`Harvest::vcpus`].
    pub fn words_by(&self, vcpu: usize) -> &[u64] {
        self.by_vcpu.get(vcpu).map_or(&[], Vec::as_slice)
    }

    /// Those of them that are coarse; see [`Harvest::is_coarse`]. Empty when the tracker is never coarse.
    pub fn coarse_words(&self) -> &[u64] {
        &self.coarse
    }

    /// The maximal runs of coarse frames.
    pub fn coarse_runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.frames_of(&self.coarse)
    }

    /// The maximal runs of dirty frames.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.frames_of(&self.words)
    }

    /// The maximal runs of frames that the host wrote.
    pub fn host_runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.frames_of(&self.host)
    }

    /// The maximal runs of frames that vCPU number `vcpu` wrote.
    pub fn written_by(&self, vcpu: usize) -> impl Iterator<Item = PageRange> + '_ {
        self.frames_of(self.words_by(vcpu))
    }

    fn frames_of<'a>(&self, words: &'a [u64]) -> impl Iterator<Item = PageRange> + use<'a> {
        let start = self.frames.start.0 + (self.touched.start * PAGES_PER_WORD) as u64;
        bitmap::runs(self.part(words))
            .map(move |run| PageRange { start: Gfn(start + run.start as u64), pages: run.len() as u64 })
    }

    /// The words of a set, [`words`](Self::words) or another, that may have pages.
    fn part<'a>(&self, words: &'a [u64]) -> &'a [u64] {
        words.get(self.touched.clone()).unwrap_or(&[])
    }

    fn count_of(&self, words: &[u64]) -> u64 {
        bitmap::count(self.part(words)) as u64
    }

    fn touch(&mut self, word: usize) {
        if self.touched.is_empty() {
            self.touched = word..word + 1;
        } else {
            self.touched = self.touched.start.min(word)..self.touched.end.max(word + 1);
        }
    }

    fn touch_all(&mut self) {
        self.touched = 0..self.words.len();
    }

    /// Adds the pages of `bits` in word number `word`.
    pub(crate) fn add(&mut self, word: usize, bits: u64) {
        self.touch(word);
        self.words[word] |= bits & self.chosen.bits(word);
    }

    /// Adds every page of the slot.
    pub(crate) fn add_all(&mut self) {
        self.touch_all();
        self.words.fill(u64::MAX);
        let beyond = self.words.len() * PAGES_PER_WORD - self.frames.pages as usize;
        if let Some(last) = self.words.last_mut() {
            *last >>= beyond;
        }
        self.chosen.mask(&mut self.words);
    }

    /// Reports the pages of `chosen` from now on, and forgets others.
    fn choose(&mut self, chosen: &Chosen) {
        for word in self.touched.clone() {
            self.remove(word, !chosen.bits(word));
        }
        self.chosen = chosen.clone();
    }

    /// Adds the pages of `bits` in word number `word`, as written by the host.
    pub(crate) fn add_host(&mut self, word: usize, bits: u64) {
        let bits = bits & self.chosen.bits(word);
        self.touch(word);
        self.words[word] |= bits;
        self.host[word] |= bits;
        if let Some(coarse) = self.coarse.get_mut(word) {
            *coarse &= !bits;
        }
    }

    /// Adds the pages of `bits` in word number `word`, as coarse unless they are owed already.
    pub(crate) fn add_coarse(&mut self, word: usize, bits: u64) {
        let bits = bits & self.chosen.bits(word);
        self.touch(word);
        if let Some(coarse) = self.coarse.get_mut(word) {
            *coarse |= bits & !self.words[word];
        }
        self.words[word] |= bits;
    }

    /// Makes room for coarse pages.
    pub(crate) fn allow_coarse(&mut self) {
        self.coarse.resize(self.words.len(), 0);
    }

    /// Takes the pages of `bits` in word number `word` out.
    pub(crate) fn remove(&mut self, word: usize, bits: u64) {
        self.words[word] &= !bits;
        self.host[word] &= !bits;
        let others = self.by_vcpu.iter_mut().chain(std::iter::once(&mut self.coarse));
        for words in others.filter(|words| !words.is_empty()) {
            words[word] &= !bits;
        }
    }

    /// To add pages that vCPU number `vcpu` wrote, chosen or not.
    pub(crate) fn marks_of(&mut self, vcpu: usize) -> VcpuMarks<'_> {
        self.touch_all();
        let by_vcpu = self.by_vcpu.get_mut(vcpu).map_or(&mut [][..], Vec::as_mut_slice);
        VcpuMarks { words: &mut self.words, by_vcpu }
    }

    /// Makes room for what `vcpus` vCPUs wrote.
    fn tell_apart(&mut self, vcpus: usize) {
        let words = self.words.len();
        if self.by_vcpu.len() < vcpus {
            self.by_vcpu.resize_with(vcpus, || vec![0; words]);
        }
    }

    /// Moves what `other`, a set of the same slot, has to this one; pages that are not chosen here are dropped.
    fn absorb(&mut self, other: &mut SlotSet) {
        self.tell_apart(other.by_vcpu.len());
        if other.touched.is_empty() {
            return;
        }
        self.touch(other.touched.start);
        self.touch(other.touched.end - 1);
        other.touched = 0..0;
        for (index, bits) in other.words.iter_mut().enumerate().filter(|(_, bits)| **bits != 0) {
            let chosen = self.chosen.bits(index);
            self.words[index] |= std::mem::take(bits) & chosen;
            self.host[index] |= std::mem::take(&mut other.host[index]) & chosen;
            for (to, from) in self.by_vcpu.iter_mut().zip(&mut other.by_vcpu) {
                to[index] |= std::mem::take(&mut from[index]) & chosen;
            }
        }
    }

    /// Word number and bit of a frame of this slot.
    fn locate(&self, gfn: Gfn) -> Option<(usize, u64)> {
        let page = self.frames.contains(gfn).then(|| (gfn.0 - self.frames.start.0) as usize)?;
        Some((page / PAGES_PER_WORD, 1 << (page % PAGES_PER_WORD)))
    }

    fn clear(&mut self) {
        for index in std::mem::take(&mut self.touched) {
            // Words that are clean stay untouched, and so does the zeroed memory that they may still be.
            if self.words[index] != 0 {
                self.words[index] = 0;
                self.host[index] = 0;
                if let Some(coarse) = self.coarse.get_mut(index) {
                    *coarse = 0;
                }
                for words in &mut self.by_vcpu {
                    words[index] = 0;
                }
            }
        }
    }
}

/// Where the pages of one slot go that one vCPU wrote.
pub(crate) struct VcpuMarks<'a> {
    words: &'a mut [u64],
    by_vcpu: &'a mut [u64],
}

impl VcpuMarks<'_> {
    /// Adds the pages of `bits` in word number `word`.
    pub(crate) fn add(&mut self, word: usize, bits: u64) {
        self.words[word] |= bits;
        if let Some(word) = self.by_vcpu.get_mut(word) {
            *word |= bits;
        }
    }
}

/// The pages that a tracker owes its user: collected, and not yet committed.
#[derive(Debug)]
pub(crate) struct OwedSet {
    slots: Vec<SlotSet>,
    /// See [`Harvest::protecting`].
    protecting: Duration,
}

impl OwedSet {
    /// An empty set over `slots`, which are in the order of their addresses.
    pub(crate) fn new<'a>(slots: impl IntoIterator<Item = &'a Slot>) -> OwedSet {
        OwedSet { slots: slots.into_iter().map(SlotSet::new).collect(), protecting: Duration::ZERO }
    }

    pub(crate) fn slot(&mut self, index: usize) -> &mut SlotSet {
        &mut self.slots[index]
    }

    /// Becomes a set over `slots`. What it has of a slot that stays it keeps, as far as it is still chosen.
    pub(crate) fn set_slots<'a>(&mut self, slots: impl IntoIterator<Item = &'a Slot>) {
        let mut old = std::mem::take(&mut self.slots);
        for slot in slots {
            let same = |set: &SlotSet| set.id == slot.id() && set.frames == slot.frames();
            let set = match old.iter().position(same) {
                Some(at) => {
                    let mut set = old.swap_remove(at);
                    set.choose(slot.chosen());
                    set
                }
                None => SlotSet::new(slot),
            };
            self.slots.push(set);
        }
    }

    /// Makes room for coarse pages in all slots.
    pub(crate) fn allow_coarse(&mut self) {
        self.slots.iter_mut().for_each(SlotSet::allow_coarse);
    }

    pub(crate) fn clear(&mut self) {
        self.slots.iter_mut().for_each(SlotSet::clear);
    }

    /// Makes room for what `vcpus` vCPUs wrote, so that it is told apart from then on.
    pub(crate) fn tell_apart(&mut self, vcpus: usize) {
        self.slots.iter_mut().for_each(|slot| slot.tell_apart(vcpus));
    }

    /// Moves what `other`, a set over the same slots, has to this one.
    pub(crate) fn absorb(&mut self, other: &mut OwedSet) {
        for (slot, other) in self.slots.iter_mut().zip(&mut other.slots) {
            slot.absorb(other);
        }
    }

    pub(crate) fn lend(&mut self) -> Harvest<'_> {
        Harvest { protecting: std::mem::take(&mut self.protecting), owed: self }
    }

    /// Notes that protecting what is lent next has taken so much longer.
    pub(crate) fn protected_for(&mut self, time: Duration) {
        self.protecting += time;
    }
}

/// The pages that were written in the epoch that a harvest closed, and those of earlier harvests that were
/// not committed.
///
/// They are protected again already: contents copied from now on are as new as this harvest, and a later
/// write puts the page into the next one.
///
/// Pages that the tracker leaves writable (see [`crate::rearm`]) are the exception to the first half of that: no
/// protection stands behind them, and instead they are in *every* harvest until they are protected again.
/// That keeps the promise: a copy made from this harvest is newest, or the page is in the next one. But such
/// a tracker's harvests do not run empty while the guest runs, so a copy is complete only after the vCPUs
/// were paused and harvested once more, or after the policy was set to [`Rearm::All`](crate::rearm::Rearm).
///
/// **It is a transaction.** [`commit`](Harvest::commit) it when its pages are where they had to go. Dropped
/// uncommitted (an error, a `?`, a panic), all its pages are in the next harvest as well.
#[derive(Debug)]
#[must_use = "dropping a harvest leaves its pages to the next one; commit it when they are dealt with"]
pub struct Harvest<'a> {
    owed: &'a mut OwedSet,
    protecting: Duration,
}

impl Harvest<'_> {
    /// Accepts the pages as dealt with: they are reported again only when they are written again.
    pub fn commit(self) {
        self.owed.clear();
    }

    /// How much of the harvest's time went into protecting again what it reports, for trackers to which that is a step of its
    /// own (`kvm-manual`, where KVM_CLEAR_DIRTY_LOG does it, and `kvm-ring`, where KVM_RESET_DIRTY_RINGS does); nothing for the
    /// others, which protect as they look.
    pub fn protecting(&self) -> Duration {
        self.protecting
    }

    /// The slots, in the order of their addresses, with or without dirty pages.
    pub fn slots(&self) -> &[SlotSet] {
        &self.owed.slots
    }

    /// The dirty frames as runs, in ascending order. Runs do not reach across slots.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.slots().iter().flat_map(SlotSet::runs)
    }

    /// Those frames that the host wrote, as runs.
    pub fn host_runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.slots().iter().flat_map(SlotSet::host_runs)
    }

    /// Number of vCPUs whose writes the tracker tells apart: all of the VM's, or 0 with a tracker that cannot
    /// ([`Guarantees::per_vcpu`](crate::tracker::Guarantees::per_vcpu)). They are numbered from 0 on.
    pub fn vcpus(&self) -> usize {
        self.slots().first().map_or(0, |slot| slot.by_vcpu.len())
    }

    /// The frames that vCPU number `vcpu` wrote, as runs; none for a vCPU that is not told apart. A page that
    /// several vCPUs wrote is reported for the first of them, and may be for others.
    pub fn written_by(&self, vcpu: usize) -> impl Iterator<Item = PageRange> + '_ {
        self.slots().iter().flat_map(move |slot| slot.written_by(vcpu))
    }

    /// Number of pages that vCPU number `vcpu` wrote; see [`Harvest::written_by`].
    pub fn count_by(&self, vcpu: usize) -> u64 {
        self.slots().iter().map(|slot| slot.count_of(slot.words_by(vcpu))).sum()
    }

    /// The coarse frames as runs; see [`is_coarse`](Harvest::is_coarse).
    pub fn coarse_runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.slots().iter().flat_map(SlotSet::coarse_runs)
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        self.slots().iter().map(|slot| slot.count_of(&slot.words)).sum()
    }

    /// Number of dirty pages that the host wrote.
    pub fn host_count(&self) -> u64 {
        self.slots().iter().map(|slot| slot.count_of(&slot.host)).sum()
    }

    /// Number of coarse pages: an upper bound of how many are in this harvest and were not written.
    pub fn coarse_count(&self) -> u64 {
        self.slots().iter().map(|slot| slot.count_of(&slot.coarse)).sum()
    }

    /// Whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.slots().iter().all(|slot| slot.part(&slot.words).iter().all(|&word| word == 0))
    }

    /// Whether `gfn` is dirty.
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.find(gfn).is_some_and(|(slot, word, bit)| self.slots()[slot].words[word] & bit != 0)
    }

    /// Whether the host wrote `gfn`.
    pub fn from_host(&self, gfn: Gfn) -> bool {
        self.find(gfn).is_some_and(|(slot, word, bit)| self.slots()[slot].host[word] & bit != 0)
    }

    /// Whether `gfn` is dirty only as far as anybody knows: the guest could write it all through the epoch
    /// without being seen, so it counts as written and may not have been.
    pub fn is_coarse(&self, gfn: Gfn) -> bool {
        self.find(gfn).is_some_and(|(slot, word, bit)| {
            self.slots()[slot].coarse.get(word).is_some_and(|coarse| coarse & bit != 0)
        })
    }

    /// Number of blocks (2 MiB, guest-physical) with at least one dirty leaf.
    pub fn dirty_blocks(&self) -> u64 {
        let mut last = None;
        let mut blocks = 0;
        for slot in self.slots() {
            let first = Gfn(slot.frames.start.0 + (slot.touched.start * PAGES_PER_WORD) as u64);
            for (block, _) in bitmap::block_counts(slot.part(&slot.words), first) {
                // A block that two slots share is one block.
                if last != Some(block) {
                    blocks += 1;
                    last = Some(block);
                }
            }
        }
        blocks
    }

    /// Takes `gfn` out of the set, committed or not, and says whether it was in there: for a page whose
    /// contents nobody needs, such as one that the guest has reported free.
    pub fn discard(&mut self, gfn: Gfn) -> bool {
        let Some((slot, word, bit)) = self.find(gfn) else { return false };
        let slot = self.owed.slot(slot);
        let was_dirty = slot.words[word] & bit != 0;
        slot.remove(word, bit);
        was_dirty
    }

    /// Takes those of `pages` of `slot` out of the set that the host has not written.
    pub(crate) fn discard_guests(&mut self, slot: &Slot, pages: Range<usize>) {
        let Some(set) = self.owed.slots.iter_mut().find(|set| set.id == slot.id()) else { return };
        masks(pages, |word, bits| set.remove(word, bits & !set.host[word]));
    }

    /// Slot index, word number and bit of `gfn`.
    fn find(&self, gfn: Gfn) -> Option<(usize, usize, u64)> {
        let index = self.slots().partition_point(|slot| slot.frames.start <= gfn).checked_sub(1)?;
        let (word, bit) = self.slots()[index].locate(gfn)?;
        Some((index, word, bit))
    }
}
