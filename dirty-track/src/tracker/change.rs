//! From the slots that are tracked to those that are to be: the plan of a change while a tracker is armed.
//!
//! A tracker carries a change out in this order, which is why nothing of the slots that stay is lost whatever fails:
//! it begins to track what is *gained*; if that fails it ends what it had begun, and nothing has changed. Then it
//! *lets go* of what is lost; what the kernel does not let go stays tracked. What is known of the slots that stay is
//! carried over, and never looked at meanwhile.

use std::ops::Range;

use crate::tracker::chosen::Chosen;
use crate::tracker::{Slot, TrackerError};

/// A slot as a tracker holds it.
pub(crate) trait Tracked: Clone {
    /// The slot, and which of its pages are tracked.
    fn slot(&self) -> &Slot;
    /// The same with other pages tracked.
    fn choosing(&self, chosen: Chosen) -> Self;
}

/// What happens to one slot.
#[derive(Debug)]
pub(crate) struct Step<S> {
    /// As it will be; as it was, if it goes.
    pub(crate) slot: S,
    /// It was not tracked before.
    pub(crate) new: bool,
    /// It is not to be tracked any more.
    pub(crate) goes: bool,
    /// Pages that were not tracked before.
    pub(crate) gained: Vec<Range<usize>>,
    /// Pages that are tracked and not to be.
    lost: Vec<Range<usize>>,
}

impl<S: Tracked> Step<S> {
    /// The slot with what is tracked of it now: all that it will have, and what it still has.
    fn slot_now(&self) -> Option<S> {
        let slot = self.slot.slot();
        let own = if self.goes { &[][..] } else { slot.chosen().ranges() };
        let chosen = Chosen::of(&[own, &self.lost].concat(), slot.frames().pages as usize);
        (!chosen.ranges().is_empty()).then(|| self.slot.choosing(chosen))
    }
}

/// The plan, in the order of the slots' addresses.
#[derive(Debug)]
pub(crate) struct Change<S>(Vec<Step<S>>);

impl<S: Tracked> Change<S> {
    /// From the slots `old` to the slots `new`, each list checked and in the order of the addresses.
    ///
    /// # Errors
    /// [`TrackerError::BadSlot`] for a new slot that has the number, guest addresses or memory of another one that
    /// is still tracked.
    pub(crate) fn new(old: &[S], new: Vec<S>) -> Result<Change<S>, TrackerError> {
        let mut steps = Vec::new();
        for slot in &new {
            let was = old.iter().find(|old| old.slot().is(slot.slot()));
            if was.is_none() && old.iter().any(|old| old.slot().excludes(slot.slot())) {
                let why = "its number, addresses or memory are another slot's that is tracked: remove that one first";
                return Err(TrackerError::BadSlot { id: slot.slot().id(), why });
            }
            let chosen = slot.slot().chosen();
            steps.push(Step {
                slot: slot.clone(),
                new: was.is_none(),
                goes: false,
                gained: was.map_or(chosen.ranges().to_vec(), |was| chosen.minus(was.slot().chosen())),
                lost: was.map_or(Vec::new(), |was| was.slot().chosen().minus(chosen)),
            });
        }
        for old in old.iter().filter(|old| !new.iter().any(|new| new.slot().is(old.slot()))) {
            let lost = old.slot().chosen().ranges().to_vec();
            steps.push(Step { slot: old.clone(), new: false, goes: true, gained: Vec::new(), lost });
        }
        steps.sort_by_key(|step| step.slot.slot().gpa());
        Ok(Change(steps))
    }

    pub(crate) fn steps(&self) -> &[Step<S>] {
        &self.0
    }

    /// Every range of pages that is gained.
    pub(crate) fn gained(&self) -> impl Iterator<Item = (&S, Range<usize>)> + Clone {
        self.0.iter().flat_map(|step| step.gained.iter().map(|pages| (&step.slot, pages.clone())))
    }

    /// Lets every range of lost pages go, and returns the first error. What fails does not keep the others from it.
    pub(crate) fn let_go<E>(
        &mut self,
        mut end: impl FnMut(&S, Range<usize>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut outcome = Ok(());
        for Step { slot, lost, .. } in &mut self.0 {
            lost.retain(|pages| {
                let ended = end(slot, pages.clone());
                let stays = ended.is_err();
                if outcome.is_ok() {
                    outcome = ended;
                }
                stays
            });
        }
        outcome
    }

    /// The same for a tracker that can let go of whole slots only: pages of slots that stay are just not reported.
    pub(crate) fn let_slots_go<E>(&mut self, mut end: impl FnMut(&S) -> Result<(), E>) -> Result<(), E> {
        let mut outcome = Ok(());
        for step in self.0.iter_mut().filter(|step| !step.lost.is_empty()) {
            match if step.goes { end(&step.slot) } else { Ok(()) } {
                Ok(()) => step.lost.clear(),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    /// The slots, in the order of their addresses, with all pages that were gained and those not let go (yet).
    pub(crate) fn slots(&self) -> Vec<S> {
        self.0.iter().filter_map(Step::slot_now).collect()
    }
}

/// Rearranges `values`, one for each of the slots `old`, to be one for each of the slots `new`; `make` makes those of
/// slots that were not there.
pub(crate) fn carry<S: Tracked, T>(old: &[S], new: &[S], values: &mut Vec<T>, mut make: impl FnMut(&S) -> T) {
    let mut left: Vec<_> = values.drain(..).map(Some).collect();
    let kept = |slot: &S| old.iter().position(|old| old.slot().is(slot.slot()));
    values.extend(
        new.iter().map(|slot| kept(slot).and_then(|at| left[at].take()).unwrap_or_else(|| make(slot))),
    );
}
