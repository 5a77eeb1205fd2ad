//! Store, state, planner, rollouts, machines and runtimes.
