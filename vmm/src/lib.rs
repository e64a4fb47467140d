//! A KVM virtual machine monitor that knows which memory its guest touched.
//!
//! ARCHITECTURE.md in the repository says how the parts work together; a reader of the code starts at
//! [`run`] (what `vmm run` does) or at [`machine`] (what a machine is made of).

pub mod acpi;
pub mod api;
pub mod bench;
mod beside;
pub mod board;
pub mod boot;
mod brake;
mod control;
pub mod cost;
pub mod cpuid;
pub mod devices;
pub mod dirty;
pub mod doctor;
pub mod dump;
pub mod fault;
pub mod forecast;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gate;
pub mod host;
pub mod layout;
pub mod ledger;
pub mod live;
pub mod logfile;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod observe;
pub mod options;
pub mod owners;
pub mod panel;
pub mod run;
pub mod sampled;
mod show;
pub mod snapshot;
pub mod state;
pub mod sys;
pub mod terminal;
pub mod timing;
pub mod track;
pub mod vcpu;
pub mod working_set;
