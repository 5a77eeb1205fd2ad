//! The engine's promises, shown on real HTTP instances in the test process.

mod control;
mod crash;
mod direction;
mod events;
mod faults;
mod moves;
mod planner;
mod receipts;
mod steps;
mod support;
mod verdicts;
mod warming;
