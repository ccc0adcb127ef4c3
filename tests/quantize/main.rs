//! The method: importance, statistics, the solver, what it finds, and how codes are packed.

#[cfg(feature = "run")]
mod effective_tokens;
mod findings;
#[cfg(feature = "run")]
mod importance;
mod pack;
mod solver;
mod solver_golden;
#[path = "../support/mod.rs"]
mod support;
