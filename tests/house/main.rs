//! The sources and what is made of them: rules of the house, a build's commit, generated bindings, and how the benches count.

#[path = "../support/alone.rs"]
mod alone;
mod bench_timing;
mod bindings;
mod commit;
mod links;
mod rooms;
mod rules;
