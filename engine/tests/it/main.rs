//! The engine's promises, shown on real HTTP instances in the test process.

mod audit;
mod backup;
mod control;
mod crash;
mod cutover;
mod cutover_counts;
mod direction;
mod elsewhere;
mod events;
mod faults;
mod hangs;
mod mirroring;
mod moves;
mod planner;
mod previous;
mod receipts;
mod steps;
mod support;
mod vault;
mod verdicts;
mod warming;
