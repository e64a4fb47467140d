//! Serving the guest's faults: pages that are missing, and pages whose first write is to be seen.

pub mod age;
pub mod prefault;
pub mod split;
mod text;
pub mod working_set;

pub use age::Age;
pub use prefault::{Prefault, Window};
pub use split::{Split, Threshold};
pub use text::ParseError;
pub use working_set::WorkingSet;
